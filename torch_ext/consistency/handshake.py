"""The ranks' comparison before an optimizer's first exchange: settings, parameters and weights."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import horovod.torch as horovod
import torch

from hvd_ext.consistency import checksum
from hvd_ext.consistency.fingerprint import mismatch_message
from hvd_ext.consistency.handshake import (
    REMEDY,
    SETTINGS_DIFFER,
    Offer,
    Offers,
    checks_weights,
    compare_offers,
)
from hvd_ext.consistency.scopes import SharedName
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.consistency.weight_digest import digest_tensors
from hvd_ext.torch.kernels import kernel_implementation
from hvd_ext.versions import HVD_EXT
from hvd_ext.watchdog.peer_status import StatusServer
from hvd_ext.watchdog.watchdog import WATCH

_ONE_AT_A_TIME = threading.RLock()  # threads that train


def agree_on_optimizers(wrapper: Any, others: Sequence[Any]) -> None:
    """Compare an optimizer with the other ranks' before its first exchange, and after every change.

    Args:
        wrapper: the optimizer whose step it is.
        others: all live optimizers of this rank; those not compared yet are compared along with it.

    Raises:
        ValueError: on every rank, when settings, parameters or weights differ.
    """
    if wrapper.collectives.size == 1 or _is_agreed(wrapper):
        return
    with _ONE_AT_A_TIME:
        if _is_agreed(wrapper):  # another thread's comparison included it
            return
        WATCH.start_watching(horovod.rank(), horovod.shutdown, horovod.is_initialized)
        ranks = Collectives(wrapper.collectives.process_set)
        offered = {one.collectives.scope.label: one for one in others if _joins_in(one, wrapper)}
        offered[wrapper.collectives.scope.label] = wrapper  # made again, where there is another of its scope
        plans = {label: one.reducer.plan for label, one in offered.items()}
        mine = Offers(wrapper.collectives.scope.label,
                      {label: _build_offer(one) for label, one in offered.items()})
        total = torch.from_numpy(checksum.encode_checksum(mine.number, asks=not _know_each_other(ranks)))
        ranks.allreduce_async_(total, SharedName(checksum.NAME), op=horovod.Sum, kind="agreement").wait()
        agreed = set(offered)
        if not checksum.all_equal(total.numpy()):
            error, agreed = compare_offers(ranks.allgather_object(mine, SharedName(checksum.DIFFER)))
            if error is not None:
                raise ranks.errors.raise_together(error)
        for label in agreed:
            offered[label].reducer.met = plans[label]
            offered[label].reducer.after_agreement()
        if checksum.is_requested(total.numpy(), ranks.size):
            _register_rank(ranks)


def broadcast_weights(collectives: Collectives, names: Sequence[str],
                      parameters: Sequence[torch.Tensor]) -> None:
    """Bring the weights of member 0 of the process set to all; a collective.

    Raises:
        RuntimeError: under Horovod elastic, where a rank that joins would be alone in it.
        ValueError: on every rank, when their parameters differ.
    """
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        raise RuntimeError("broadcast_weights=True under Horovod elastic: a rank that joins would wait for "
                           "the others; give model and optimizer to hvd.elastic.TorchState")
    if not collectives.is_member or collectives.size == 1:
        return
    lines = [f"{name}{list(p.shape)} {p.dtype}" for name, p in zip(names, parameters, strict=True)]
    by_rank = collectives.allgather_object(lines, "weights/parameters")
    if any(one != by_rank[0] for one in by_rank):
        raise ValueError(mismatch_message(SETTINGS_DIFFER, by_rank, REMEDY))
    for handle in [collectives.broadcast_async_(parameter, 0, f"weights/{number}")
                   for number, parameter in enumerate(parameters)]:
        handle.wait()


def _is_agreed(wrapper: Any) -> bool:
    return bool(wrapper.reducer.met == wrapper.reducer.plan)


def _joins_in(one: Any, wrapper: Any) -> bool:
    """Whether an optimizer can be compared in the step of another one."""
    here, there = (each.collectives.process_set.process_set_id for each in (one, wrapper))
    return (here == there and one.collectives.is_member and one.ranks == one.collectives.size
            and bool(one.reducer.entries) and not _is_agreed(one))


def _build_offer(wrapper: Any) -> Offer:
    entries = wrapper.reducer.entries
    weights: list[int] = digest_tensors([entry.parameter for entry in entries]) if checks_weights() else []
    server = ["server: None"] if wrapper.server is None else wrapper.server.settings.fingerprint_lines()
    lines = (f"hvd_ext {HVD_EXT} for PyTorch", f"kernels: {kernel_implementation()}",
             f"preconditioner: {type(wrapper.preconditioner).__name__}", *server,
             *wrapper.reducer.build_fingerprint().lines,
             f"names of collectives: {wrapper.collectives.scope.label}")
    return Offer(lines, tuple(zip((entry.name for entry in entries), weights, strict=False)))


def _know_each_other(ranks: Collectives) -> bool:
    """Whether this rank can ask the others what they do; under elastic they come and go."""
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        return True
    return all(ranks.global_rank(rank) in WATCH.others for rank in range(ranks.size))


def _register_rank(ranks: Collectives) -> None:
    if WATCH.listener is None:
        WATCH.listener = StatusServer(local=horovod.local_size() == horovod.size())
    mine = (horovod.rank(), WATCH.listener.address)
    WATCH.others = {**WATCH.others, **dict(ranks.allgather_object(mine, SharedName("hvd_ext/addresses")))}
