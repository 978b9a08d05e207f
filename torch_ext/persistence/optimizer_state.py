"""The state of a distributed optimizer: the wrapped optimizer's and, under "hvd_ext", the extensions'."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hvd_ext.reducers.delayed_update import STATE as DELAYED_STATE
from hvd_ext.seng import CURVATURE
from hvd_ext.sharding import OwnedState, check_loadable
from hvd_ext.state import check_methods, dropped_message, split_state
from hvd_ext.torch.reducers import declared_state

if TYPE_CHECKING:
    from hvd_ext.torch.step import DistributedStep

STATE_KEY = "hvd_ext"


def state_dict(wrapper: DistributedStep, state: dict[str, Any], *, gather: bool) -> dict[str, Any]:
    """The wrapped optimizer's ``state`` and, under "hvd_ext", this rank's of the extensions.

    Args:
        wrapper: the extensions.
        state: of the wrapped optimizer, as this rank holds it.
        gather: complete it with what other ranks own; a collective.
    """
    if not wrapper.collectives.is_member:  # this rank trains alone
        return {**state, STATE_KEY: {"rank": 0, "size": 1, "reducer": {}}}
    wrapper._hook_parameters()  # what was added since has state too, of zeros
    own: dict[str, Any] = {"rank": wrapper.collectives.rank, "size": wrapper.collectives.size,
                           "method": wrapper.reducer.state_method, "reducer": wrapper.reducer.state_dict()}
    if wrapper.preconditioner is not None:
        own["preconditioner"] = wrapper.preconditioner.state_dict()
    if wrapper.server is not None and wrapper.collectives.is_member:
        serve = wrapper.server.gather_state if gather else wrapper.server.state_dict
        state, own["server"] = serve(state)
    return {**state, STATE_KEY: own}


def shared_state(wrapper: DistributedStep) -> dict[str, Any]:
    """What is the same on every rank: a rank that joins takes it over."""
    seng = wrapper.preconditioner
    return {"errors": wrapper.collectives.errors.number, "reducer": wrapper.reducer.shared_state(),
            "step": None if seng is None else seng.shared_state()}


def load_shared_state(wrapper: DistributedStep, state: dict[str, Any]) -> None:
    """Take over what another rank's :func:`shared_state` gave, and compare the ranks' settings again."""
    wrapper.abort_step()
    wrapper.collectives.errors.number = state["errors"]
    wrapper.reducer.load_shared_state(state["reducer"])
    if wrapper.preconditioner is not None:
        wrapper.preconditioner.load_shared_state(state["step"])
    wrapper.reducer.met = None


def begin_from(wrapper: DistributedStep, shared: dict[str, Any]) -> None:
    """Begin what this rank keeps of its own new, and take over another rank's :func:`shared_state`."""
    wrapper.reducer.reset_per_rank_state()
    if wrapper.preconditioner is not None:
        wrapper.preconditioner.reset_state()
    load_shared_state(wrapper, shared)


def extension_progress(wrapper: DistributedStep) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Where the extensions are, equal on ranks that may go on together; what this rank keeps of its own."""
    reducer, seng = wrapper.reducer, wrapper.preconditioner
    counters = () if seng is None else tuple(seng.shared_state().values())
    kept = reducer.kept_by_rank()
    if seng is not None and seng.state.systems:
        kept = (*kept, CURVATURE.label)
    return (wrapper.loaded, *reducer.progress_values(), *counters), kept


def load_state_dict(wrapper: DistributedStep, state_dict: dict[str, Any],
                    load: Callable[[dict[str, Any]], None], *,
                    reset_per_rank_state: bool) -> None:
    """Restore the extensions, and with ``load`` the wrapped optimizer; nothing where something is refused.

    Raises:
        ValueError: part of the state would be dropped, or does not fit.
    """
    state_dict = dict(state_dict)
    own = state_dict.pop(STATE_KEY, None)
    wrapper._hook_parameters()  # parameters that were added or unfrozen since
    saved = dict(own or {})
    if not wrapper.collectives.is_member:
        load_wrapped(wrapper, state_dict, saved.get("server"), load)
        return
    collectives = wrapper.collectives
    here = (collectives.rank, collectives.size)
    _check_extensions(wrapper, saved, reset=reset_per_rank_state)
    joined = None if reset_per_rank_state else saved.get("joined")  # of all ranks that saved
    theirs = own is not None and (own["rank"], own["size"]) != here and not joined
    reducer, seng = wrapper.reducer, wrapper.preconditioner
    reduced, curvature = saved.get("reducer") or {}, saved.get("preconditioner")
    if not _method_names(wrapper) >= set(_saved_methods(saved)):  # dropped on request
        reduced = reduced if saved.get("method", reducer.state_method) == reducer.state_method else {}
        reduced = {key: value for key, value in reduced.items() if key != DELAYED or reducer.staleness}
    dropped: list[str] = []
    if theirs or reset_per_rank_state:
        dropped = rank_state(wrapper, reduced, curvature)
        reduced = reducer.of_other_rank(reduced, same_ranks=saved.get("size") == collectives.size)
    elif curvature is not None and seng is not None and not joined:
        seng.check_state_dict(curvature)
    if joined:
        for rank, state in enumerate(joined):
            reducer.check_state_dict(state, ranks=len(joined), rank=rank)
    elif reduced:
        reducer.check_state_dict(reduced)
    check_server(wrapper, state_dict, saved.get("server"))
    holds = any(declared_state.state_tensors(holder, part) for holder, part in reducer.declared_state())
    wrapper.abort_step()
    load_wrapped(wrapper, state_dict, saved.get("server"), load)
    if joined:
        reducer.join_states(joined)
    else:
        reducer.load_state_dict(reduced) if reduced else reducer.reset_per_rank_state()
    if seng is not None:
        if curvature is None or theirs or joined or reset_per_rank_state:
            seng.reset_state()
            if curvature is not None:
                seng.load_shared_state(curvature)
        else:
            seng.load_state_dict(curvature)
    wrapper.loaded = "new" if own is None or theirs or reset_per_rank_state else "own"
    lowest = 1 if theirs and (own["rank"], own["size"]) == (0, collectives.size) else 0
    if dropped and not reset_per_rank_state and collectives.rank == lowest:
        warnings.warn(dropped_message(dropped, (
            f"this optimizer state was saved by rank {own['rank']} of {own['size']} and is loaded by rank "
            f"{here[0]} of {here[1]}")) + "; reset_per_rank_state=True silences this", stacklevel=4)
    methods = sorted(_method_names(wrapper))
    if own is None and (state_dict["state"] or holds) and methods and not reset_per_rank_state \
            and collectives.rank == 0:
        warnings.warn(WITHOUT_EXTENSIONS.format(", ".join(methods)), stacklevel=4)


def rank_state(wrapper: DistributedStep, reduced: dict[str, Any],
               curvature: dict[str, Any] | None) -> list[str]:
    """The labels of what a saved state holds that belongs to one rank."""
    found = split_state(wrapper.reducer.state_parts, reduced)[1]
    return [*found, *([CURVATURE.label] if curvature is not None and curvature.get("layers") else [])]


WITHOUT_EXTENSIONS = (
    "this optimizer state holds nothing of {}, whose state begins new on every rank: it was saved without an "
    'extension, or by a tool that leaves out the entry "hvd_ext", such as torch.distributed.checkpoint. '
    "hvd.save_checkpoint keeps it; reset_per_rank_state=True silences this")
DELAYED = DELAYED_STATE[0].name
KEYS = {"mean_square": "DelayCompensated", "q": "Compression.powersgd", "owned": "Compression.topk",
        "residual": "Compression.topk"}  # of states that do not say whose they are


def _saved_methods(saved: dict[str, Any]) -> list[str]:
    reduced = saved.get("reducer") or {}
    method = saved.get("method") or next((name for key, name in KEYS.items() if key in reduced), None)
    return [*([method] if method and set(reduced) - {DELAYED} else []),
            *(["overlap="] if DELAYED in reduced else []),
            *(["SENG"] if saved.get("preconditioner") else [])]


def _method_names(wrapper: DistributedStep) -> set[str]:
    reducer = wrapper.reducer
    return {*([reducer.state_method] if reducer.state_method else []),
            *(["overlap="] if reducer.staleness else []),
            *(["SENG"] if wrapper.preconditioner is not None else [])}


def _check_extensions(wrapper: DistributedStep, saved: dict[str, Any], *, reset: bool) -> None:
    if reset:
        return
    check_methods(_saved_methods(saved), sorted(_method_names(wrapper)))
    if not getattr(wrapper.server, "replies", None) and (saved.get("server") or {}).get("reply"):
        raise ValueError("this state was saved with Server(downlink=...), and the weights that its ranks "
                         "held lack what was still to be sent; pass downlink= here too, or save the model "
                         "within optimizer.exact_weights() and pass reset_per_rank_state=True")


def check_server(wrapper: DistributedStep, state: dict[str, Any], mark: dict[str, Any] | None) -> None:
    """Refuse a state that lacks moments which this rank needs."""
    if wrapper.server is not None and wrapper.collectives.is_member:
        wrapper.server.check_state_dict(state, mark)
    elif mark is not None:
        ranks = wrapper.collectives
        rank = ranks.rank if ranks.is_member else 0
        check_loadable(OwnedState.from_dict(mark), OwnedState("None", rank, ranks.size, None))


def load_wrapped(wrapper: DistributedStep, state: dict[str, Any], mark: dict[str, Any] | None,
                 load: Callable[[dict[str, Any]], None]) -> None:
    """Restore the wrapped optimizer with ``load``; ``mark`` is the server's, from the same state."""
    check_server(wrapper, state, mark)
    if wrapper.server is not None and wrapper.collectives.is_member:
        state = wrapper.server.load_state_dict(state, mark)
    load(state)
    original = wrapper.original()
    if original is not None:  # a scheduler that was made before wrapping goes on setting its groups
        original.param_groups, original.state = wrapper.optimizer.param_groups, wrapper.optimizer.state


def report(wrapper: DistributedStep) -> dict[str, Any]:
    """Figures of the last step: bytes by kind, and those of each extension in use."""
    traffic = wrapper.collectives.traffic
    figures = {"steps": wrapper.state.updates, "sent": dict(traffic.last_sent),
               "received": dict(traffic.last_received), **wrapper.reducer.report()}
    for name, extension in (("preconditioner", wrapper.preconditioner), ("server", wrapper.server)):
        if extension is not None:
            figures[name] = extension.report()
    return figures
