"""The one place where the PyTorch front end calls Horovod's collectives, and where their bytes are counted.

Everything else hands tensors to a :class:`Collectives` and waits on the :class:`Handle` it gets,
so that names in Horovod's timeline, process sets and byte accounting are decided once.
"""

from __future__ import annotations

import contextlib
import operator
import pickle
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as horovod
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops

from hvd_ext.consistency.error_epoch import ErrorEpoch, error_epoch
from hvd_ext.consistency.scopes import Scope, SharedName, outside_of_set
from hvd_ext.reducers.traffic import Traffic, allreduce_bytes, by_kind
from hvd_ext.watchdog.watchdog import WATCH


@dataclass
class Handle:
    """A collective under way. ``wait()`` once; it raises ``HorovodInternalError`` when it failed."""

    collectives: Collectives
    ticket: Any
    kind: str | Mapping[str, int]
    counted: bool = True
    dtype: torch.dtype | None = None
    name: str = "a collective"
    memory: Any = None
    into: Sequence[torch.Tensor] = ()  # where results go that stand for another dtype or layout

    def is_done(self) -> bool:
        """Whether ``wait()``, not called yet, would return or raise at once."""
        try:
            return bool(horovod.poll(self.ticket))
        except ValueError:  # Horovod has been shut down: wait() says why
            return False

    def wait(self) -> torch.Tensor:
        """The result of the collective, a tensor on the device of its input."""
        result = wait_for(self.ticket, self.name)
        tensor = result[0] if isinstance(result, tuple) else result
        if not self.counted:
            for kind, count in by_kind(self.kind, count_bytes(tensor)).items():
                self.collectives.traffic.count_bytes(kind, received=count)
        tensor = tensor if self.dtype is None else tensor.view(self.dtype)
        return _copied_back([tensor], self.into)[0] if self.into else tensor

    def wait_all(self) -> list[torch.Tensor]:
        """The results of a grouped collective, in the order of its inputs."""
        result = wait_for(self.ticket, self.name)
        results = list(result) if isinstance(result, tuple) else [result]
        return _copied_back(results, self.into) if self.into else results


class Collectives:
    """Asynchronous, named collectives over one process set.

    ``kind`` says what the bytes are ("gradients", "values", "weights", ...); ``traffic`` adds up
    what this rank sends and receives by kind, from the sizes of the messages themselves. For a
    collective whose bytes depend on the library's algorithm (allreduce, broadcast) the
    bandwidth-optimal ring is counted: ``2 (M-1)/M`` and ``1`` times the tensor.
    """

    def __init__(self, process_set: Any = None, scope: Scope | None = None) -> None:
        self.process_set = horovod.global_process_set if process_set is None else process_set
        self.scope = scope
        self.traffic = Traffic()

    def without_counting(self) -> Collectives:
        """The same ranks and names, for what is no part of a step's bytes."""
        return Collectives(self.process_set, self.scope)

    def full_name(self, name: str) -> str:
        """The name that Horovod is given: with the scope, and another one after an error on all ranks."""
        if self.scope is None or isinstance(name, SharedName):
            return name
        return self.scope.add_to(name) + self.errors.suffix

    @property
    def errors(self) -> ErrorEpoch:
        """Errors that all ranks of the process set have raised together."""
        everyone = self.process_set.process_set_id == 0
        return error_epoch(() if everyone else tuple(self.process_set.ranks or ()))

    @property
    def is_member(self) -> bool:
        """Whether this rank is a member of the process set; one that is not is alone."""
        return bool(self.process_set.included())

    @property
    def size(self) -> int:
        """M, the number of ranks."""
        return int(self.process_set.size()) if self.is_member else 1

    @property
    def rank(self) -> int:
        """This rank's number within the process set."""
        return int(self.process_set.rank()) if self.is_member else 0

    def global_rank(self, rank: int) -> int:
        """The global number of the process set's member ``rank``; broadcasts name roots so."""
        ranks = self.process_set.ranks
        return rank if ranks is None else int(list(ranks)[rank])

    def refuse_outside(self, what: str) -> None:
        """Refuse a rank that is no member, and would write over what the members write.

        Raises:
            ValueError: this is one.
        """
        if not self.is_member:
            raise ValueError(outside_of_set(what, horovod.rank(), self.process_set.ranks))

    def allreduce_async_(self, tensor: torch.Tensor, name: str, *, op: Any = horovod.Average,
                         kind: str = "gradients", **scale: float) -> Handle:
        """Reduce ``tensor`` over the ranks, in place.

        bfloat16 travels and is added up as float32, and the result is rounded once; bool and integers of
        less than 32 bits travel as int32. A tensor that is not contiguous travels as a contiguous copy.
        """
        sent = _as_addable(tensor)
        ticket = _submit_collective(horovod.allreduce_async_, sent, name=self.full_name(name), op=op,
                                    process_set=self.process_set, **scale)
        moved = allreduce_bytes(count_bytes(sent), self.size)
        self.traffic.count_bytes(kind, sent=moved, received=moved)
        return Handle(self, ticket, kind, name=name, memory=sent,
                      into=() if sent is tensor else (tensor,))

    def grouped_allreduce_async_(self, tensors: Sequence[torch.Tensor], name: str, *,
                                 op: Any = horovod.Average, kind: str = "gradients",
                                 **scale: float) -> Handle:
        """Reduce tensors of one dtype and device as one group, in place; see ``Handle.wait_all``."""
        if len(tensors) == 1:
            return self.allreduce_async_(tensors[0], name, op=op, kind=kind, **scale)
        sent = [_as_addable(tensor) for tensor in tensors]
        ticket = _submit_collective(horovod.grouped_allreduce_async_, sent, name=self.full_name(name), op=op,
                                    process_set=self.process_set, **scale)
        moved = allreduce_bytes(sum(map(count_bytes, sent)), self.size)
        self.traffic.count_bytes(kind, sent=moved, received=moved)
        return Handle(self, ticket, kind, name=name, memory=sent,
                      into=() if all(map(operator.is_, sent, tensors)) else tensors)

    def alltoall_async(self, tensor: torch.Tensor, splits: Sequence[int], name: str, *,
                       kind: str | Mapping[str, int] = "gradients",
                       out: torch.Tensor | None = None) -> Handle:
        """Send ``splits[s]`` rows of ``tensor`` to rank s; the result is what all sent here, by rank.

        ``out`` lends memory for the result, which is resized in place: fresh memory for every
        message costs more in page faults than the message itself on a CPU.
        """
        tensor = tensor.contiguous()
        memory = _output_tensor(out, tensor)
        counts = torch.tensor(splits, dtype=torch.int32)
        ticket = _submit_collective(mpi_ops._alltoall_async, as_carrier(tensor), counts, memory,
                                    torch.empty(0, dtype=torch.int32), self.full_name(name), self.process_set)
        row = count_bytes(tensor) // max(1, tensor.shape[0])
        own = splits[self.rank] * row
        kept = by_kind(kind, own)
        for part, all_of_it in by_kind(kind, count_bytes(tensor)).items():
            self.traffic.count_bytes(part, sent=all_of_it - kept[part], received=-kept[part])
        # The counts are kept too. In older releases of torch, Horovod's thread needs the interpreter's lock
        # to free a tensor whose Python object is gone. Where hvd-ext has not built Horovod, that thread
        # has another lock meanwhile in a shutdown, which whoever submits a collective waits for.
        return Handle(self, ticket, kind, counted=False, dtype=tensor.dtype, name=name,
                      memory=(tensor, memory, counts))

    def allgather_async(self, tensor: torch.Tensor, name: str, *,
                        kind: str | Mapping[str, int] = "gradients",
                        out: torch.Tensor | None = None) -> Handle:
        """Concatenate the ranks' tensors along their first axis, whose length may differ by rank.

        A message that holds several kinds says with ``kind`` how many bytes are of each. ``out``
        lends memory for the result, as in :meth:`alltoall_async`.
        """
        tensor = tensor.contiguous()
        memory = _output_tensor(out, tensor)
        ticket = _submit_collective(mpi_ops._allgather_async, as_carrier(tensor), memory,
                                    self.full_name(name),
                                    self.process_set)
        for part, own in by_kind(kind, count_bytes(tensor)).items():
            self.traffic.count_bytes(part, sent=(self.size - 1) * own, received=-own)
        return Handle(self, ticket, kind, counted=False, dtype=tensor.dtype, name=name,
                      memory=(tensor, memory))

    def broadcast_async_(self, tensor: torch.Tensor, root: int, name: str, *,
                         kind: str = "weights") -> Handle:
        """Copy the tensor of member ``root`` of the process set to all, in place."""
        sent = tensor.detach().contiguous()
        ticket = _submit_collective(horovod.broadcast_async_, as_carrier(sent), self.global_rank(root),
                                    name=self.full_name(name), process_set=self.process_set)
        if self.rank == root:
            self.traffic.count_bytes(kind, sent=(self.size - 1) * count_bytes(tensor))
        else:
            self.traffic.count_bytes(kind, received=count_bytes(tensor))
        return Handle(self, ticket, kind, dtype=tensor.dtype, name=name, memory=sent,
                      into=() if sent.data_ptr() == tensor.data_ptr() else (tensor,))

    def allgather_object(self, thing: Any, name: str) -> list[Any]:
        """Every rank's picklable ``thing``, by rank. For errors and checks, not for data."""
        if self.size == 1:
            return [thing]
        mine = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)
        sizes = self.allgather_async(torch.tensor([mine.numel()]), _extend_name(name, "sizes"),
                                     kind="objects").wait()
        gathered = self.allgather_async(mine, name, kind="objects").wait()
        return [pickle.loads(part.numpy().tobytes()) for part in gathered.split(sizes.tolist())]

    def broadcast_object(self, thing: Any, root: int, name: str) -> Any:
        """The picklable ``thing`` of member ``root`` of the process set, on all ranks."""
        if self.size == 1:
            return thing
        mine = self.rank == root
        data = bytearray(pickle.dumps(thing)) if mine else bytearray()
        count = torch.tensor([len(data)])
        self.broadcast_async_(count, root, _extend_name(name, "size"), kind="objects").wait()
        flat = torch.frombuffer(data, dtype=torch.uint8) if mine else torch.empty(
            int(count), dtype=torch.uint8)
        self.broadcast_async_(flat, root, name, kind="objects").wait()
        return thing if mine else pickle.loads(flat.numpy().tobytes())


def _extend_name(name: str, part: str) -> str:
    """The name of a part of what ``name`` is."""
    return type(name)(f"{name}/{part}")


def _submit_collective(collective: Any, *args: Any, **kwargs: Any) -> Any:
    """Start a collective of Horovod's.

    Raises:
        HorovodInternalError: another rank has failed, with its reason.
    """
    try:
        return collective(*args, **kwargs)
    except (HorovodInternalError, ValueError) as error:  # the latter: Horovod has been shut down
        if WATCH.verdict is None:
            raise
        raise HorovodInternalError(WATCH.verdict) from error


def shutdown() -> None:
    """Shut Horovod down; waits for a shutdown after a time limit, if one is in progress."""
    await_exchanges_for_next_step()
    WATCH.await_abort()
    horovod.shutdown()


# Tickets of what a step has begun for the next one (late=).
_FOR_NEXT_STEP: set[Any] = set()


def begin_for_next_step(handles: Iterable[Handle]) -> None:
    """Note what this step does not wait for: this process does not end before all ranks have begun it."""
    _FOR_NEXT_STEP.intersection_update(mpi_ops._handle_map)
    _FOR_NEXT_STEP.update(handle.ticket for handle in handles)
    WATCH.call_before_end(await_exchanges_for_next_step)


def await_exchanges_for_next_step() -> None:
    """Let the other ranks begin what this one has: a shutdown before would be an error for them."""
    tickets = _FOR_NEXT_STEP & set(mpi_ops._handle_map)
    _FOR_NEXT_STEP.clear()
    if tickets and WATCH.verdict is None and horovod.is_initialized():
        with contextlib.suppress(HorovodInternalError):  # given up, which the watch has reported
            _await_tickets(tickets)


def wait_for(ticket: Any, what: str) -> Any:
    """Horovod's result of a collective, waited for as long as :mod:`hvd_ext.watchdog.watchdog` allows.

    Raises:
        HorovodInternalError: the collective failed; when the wait was given up, with the reason.
    """
    WATCH.start_wait(what)
    try:
        return horovod.synchronize(ticket)
    except (HorovodInternalError, ValueError) as error:  # the latter: the shutdown cleared the handle
        if WATCH.verdict is None:
            raise
        raise HorovodInternalError(WATCH.verdict) from error
    finally:
        WATCH.end_wait()


def await_pending() -> None:
    """Wait until every collective that this process has begun is over, without taking its result.

    Raises:
        HorovodInternalError: the wait was given up.
    """
    _await_tickets(set(mpi_ops._handle_map) - {handle.ticket for handle in _UNFINISHED})


def _await_tickets(tickets: Iterable[Any]) -> None:
    WATCH.start_wait("the collectives under way")
    try:
        for ticket in tickets:
            while not horovod.poll(ticket):
                time.sleep(0.0005)
    except (HorovodInternalError, ValueError) as error:
        raise HorovodInternalError(WATCH.verdict or str(error)) from error
    finally:
        WATCH.end_wait()


# Collectives that were given up while under way: Horovod may still read and write their memory.
_UNFINISHED: list[Any] = []


def keep_alive_until_done(handles: Iterable[Handle]) -> None:
    """Let go of collectives that nobody will wait for; their memory is kept until they are over."""
    _UNFINISHED.extend(handles)
    _UNFINISHED[:] = [handle for handle in _UNFINISHED if not _is_over(handle)]


def _is_over(handle: Handle) -> bool:
    try:
        if not horovod.poll(handle.ticket):
            return False
        horovod.synchronize(handle.ticket)
    except (HorovodInternalError, ValueError, RuntimeError):
        pass
    return True


# What Horovod's collectives do not take, and the dtype of the same size that carries the same bits.
CARRIERS = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}
# And the dtype that is added up in its place.
ADDABLE = {torch.bfloat16: torch.float32,
           **dict.fromkeys((torch.bool, torch.uint8, torch.int8, torch.int16), torch.int32)}


def as_carrier(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under a dtype that Horovod can move; it knows neither bfloat16 nor bool."""
    return tensor.view(CARRIERS[tensor.dtype]) if tensor.dtype in CARRIERS else tensor


def _as_addable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that Horovod can add up in this one's place: the same where it can be, else a copy."""
    if tensor.dtype in ADDABLE:
        return tensor.detach().to(ADDABLE[tensor.dtype]).contiguous()
    return tensor if tensor.is_contiguous() else tensor.detach().contiguous()


@torch.no_grad()
def _copied_back(results: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    for result, tensor in zip(results, into, strict=True):
        tensor.copy_(result)
    return list(into)


def _output_tensor(out: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The tensor that Horovod is to resize and fill."""
    return as_carrier(like).new_empty(0) if out is None else as_carrier(out)


def count_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's elements."""
    return tensor.numel() * tensor.element_size()
