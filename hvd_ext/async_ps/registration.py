"""All ranks meet: a communicator of our own, everything that must agree compared, ends watched.

Every rank learns of every rank's fault, so that all of them raise within seconds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from hvd_ext.async_ps.checkpoint import Checkpoint
from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.liveness import LOCAL, LivenessClient, LivenessServer
from hvd_ext.async_ps.model import Array, FlatModel
from hvd_ext.async_ps.plan import Plan
from hvd_ext.checkpoint.files import check_writable
from hvd_ext.watchdog.addresses import local_addresses

RECORD = 4096  # bytes


@dataclass
class Membership:
    """What a rank holds after registration.

    Attributes:
        comm: a communicator of this run's own.
        host: the primary server's end of the watch; None on the others.
        guest: the others' end.
        checkpoint: the one to go on from; None for a fresh start.
    """

    comm: MPI.Comm
    host: LivenessServer | None
    guest: LivenessClient | None
    checkpoint: Checkpoint | None


def register_ranks(comm: MPI.Comm, servers: int, model: FlatModel, weights: Array,
                   settings: ServerSettings) -> tuple[Plan, Membership]:
    """Called by all ranks of ``comm`` together.

    Args:
        comm: the ranks that take part; left untouched.
        servers: number of server ranks.
        model, weights: this rank's model and its weights, flat (n,).
        settings: the run's settings.

    Raises:
        ValueError: ranks differ in parameters, weights or settings, or there are too few.
        TimeoutError: not all ranks came within ``settings.start_timeout``.
    """
    if comm.size < 2:
        Plan(comm.size, servers, len(weights))
    deadline = time.monotonic() + settings.start_timeout
    own, request = comm.Idup()
    _wait_request(request, deadline, settings)
    plan, error = _attempt_call(lambda: Plan(comm.size, servers, len(weights)))
    mine = {
        "error": error, "numel": len(weights), "dtype": str(model.dtype),
        "shapes": [list(shape) for shape in model.shapes][:60],
        "shapes_digest": _digest_data(json.dumps([list(shape) for shape in model.shapes]).encode()),
        "weights": _digest_data(np.ascontiguousarray(weights).tobytes()),
        "settings": f"servers={servers} {settings.settings_digest()}",
        "node": MPI.Get_processor_name(),
    }
    records = _exchange_records(own, mine, deadline, settings)
    _compare_records(records, settings)
    assert plan is not None
    local = len({record["node"] for record in records}) == 1
    host = LivenessServer(local=local) if own.rank == 0 else None
    checkpoint, error = _attempt_call(lambda: _find_checkpoint(plan, model, settings))
    offered = {
        "error": error, "port": host.port if host else 0, "token": host.token if host else "",
        "addresses": [] if local else local_addresses(), "node": MPI.Get_processor_name(),
        "update": checkpoint.update if checkpoint else -1,
    }
    offers = _exchange_records(own, offered, deadline, settings)
    first = offers[0]
    for rank, offer in enumerate(offers):
        if offer["error"]:
            raise ValueError(f"rank {rank}: {offer['error']}")
        if offer["update"] != first["update"]:
            raise ValueError(
                f"rank {rank} found the checkpoint after {offer['update']} updates, rank 0 the one "
                f"after {first['update']}; put checkpoints where all ranks see the same files"
            )
    guest = None
    if host is None:
        same = first["node"] == MPI.Get_processor_name()
        guest = LivenessClient(own.rank, addresses=[LOCAL] if same else first["addresses"],
                               port=first["port"], token=first["token"], seconds=5.0)
    else:
        host.accept_ranks(set(range(1, own.size)), seconds=10.0)
    return plan, Membership(own, host, guest, checkpoint)


def _find_checkpoint(plan: Plan | None, model: FlatModel, settings: ServerSettings) -> Checkpoint | None:
    found = None
    if settings.resume is not None and plan is not None:
        found = Checkpoint(settings.resume)
        found.check_compatible(plan, settings, dtype=str(model.dtype),
                               shapes=[tuple(shape) for shape in model.shapes])
    if settings.checkpoint_dir is not None:
        check_writable(settings.checkpoint_dir, resumed=None if found is None else found.folder)
    return found


def _attempt_call(make: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result, or what went wrong, as a text to send to the other ranks."""
    try:
        return make(), None
    except (ValueError, TypeError, OSError, KeyError) as error:
        return None, str(error)


def _compare_records(records: list[dict[str, Any]], settings: ServerSettings) -> None:
    first = records[0]
    for rank, record in enumerate(records):
        if record["error"]:
            raise ValueError(f"rank {rank}: {record['error']}")
        if (record["shapes_digest"], record["dtype"]) != (first["shapes_digest"], first["dtype"]):
            raise ValueError(
                f"rank {rank} is refused: its parameters differ from rank 0's, "
                f"{_describe_difference(record, first)}; build the same model on every rank"
            )
        if record["settings"] != first["settings"]:
            raise ValueError(
                f"rank {rank} was given other settings than rank 0; pass the same arguments to "
                "ParameterServer on every rank"
            )
    if settings.resume is None and not settings.broadcast:
        for rank, record in enumerate(records):
            if record["weights"] != first["weights"]:
                raise ValueError(
                    f"the weights of rank {rank} differ from rank 0's at the start; set the same "
                    "seed before building the model, or pass broadcast=True to start from rank 0's"
                )


def _describe_difference(record: dict[str, Any], first: dict[str, Any]) -> str:
    if record["dtype"] != first["dtype"]:
        return f"{record['dtype']} instead of {first['dtype']}"
    for index, (shape, expected) in enumerate(zip(record["shapes"], first["shapes"], strict=False)):
        if shape != expected:
            return f"parameter {index} is {tuple(shape)} instead of {tuple(expected)}"
    return f"{record['numel']} entries instead of {first['numel']}"


def _exchange_records(comm: MPI.Comm, record: dict[str, Any], deadline: float,
                      settings: ServerSettings) -> list[dict[str, Any]]:
    """Every rank's record, by rank."""
    text = json.dumps(record).encode()
    if len(text) > RECORD and "shapes" in record:
        text = json.dumps({**record, "shapes": []}).encode()
    if len(text) > RECORD:
        text = json.dumps({**record, "error": str(record["error"])[: RECORD // 2]}).encode()
    mine = np.frombuffer(text.ljust(RECORD), dtype=np.uint8)
    everyone = np.empty((comm.size, RECORD), dtype=np.uint8)
    _wait_request(comm.Iallgather(mine, everyone), deadline, settings, (mine, everyone))
    return [json.loads(row.tobytes().decode().rstrip()) for row in everyone]


_UNANSWERED: list[Any] = []  # requests that were given up, with the memory MPI may still touch


def _wait_request(request: MPI.Request, deadline: float, settings: ServerSettings,
                  memory: Any = None) -> None:
    while not request.Test():
        if time.monotonic() > deadline:
            _UNANSWERED.append((request, memory))
            raise TimeoutError(
                f"not all ranks constructed ParameterServer within {settings.start_timeout:g} s; "
                "look for an error on another rank, or raise start_timeout"
            )
        time.sleep(0.001)


def _digest_data(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
