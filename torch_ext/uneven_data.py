"""Uneven data: ranks that run out of batches at different times, and end together.

A rank that has left its loop shadows the others: it takes part in their steps with gradients of zero until
nobody has a batch. Each step carries one more small sum, who has a batch, which a rank submits at the first
gradient of the step and a shadowing rank before it does anything else. Where some rank has none, a second one
follows the reduction: what the loop does with the reduced gradients, which the shadowing ranks do as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch as horovod
import numpy as np
import numpy.typing as npt
import torch

from hvd_ext.consistency.fingerprint import digest_parts
from hvd_ext.horovod_api import join_barrier
from hvd_ext.horovod_api.signatures import refuse_old_names
from hvd_ext.reducers.registry import describe_reduction
from hvd_ext.torch.collectives import Collectives, Handle, await_pending, keep_alive_until_done
from hvd_ext.torch.sharding.clipping import clip_reduced_gradients
from hvd_ext.torch.step import ACTIVE_WRAPPERS
from hvd_ext.uneven_inputs import (
    OVERLAP_UNSUPPORTED_MSG,
    Attendance,
    Decision,
    GradientWeighting,
    attendance_row,
    check_samples,
    check_weighting,
    missing_samples,
)
from hvd_ext.watchdog.watchdog import WATCH

_ACTIVE_CONTEXTS: list[Uneven] = []


def is_active() -> bool:
    """Whether this process is inside ``hvd.uneven_inputs``."""
    return bool(_ACTIVE_CONTEXTS)


@refuse_old_names(weigh="average_over=")
@contextmanager
def uneven_inputs(optimizer: Any, average_over: str = "ranks", *,
                  on_shadow_step: Callable[[], Any] | None = None) -> Iterator[Uneven]:
    """Loop over an epoch's batches, whose number may differ by rank; every rank enters and leaves it.

    ::

        with hvd.uneven_inputs(optimizer, average_over="samples") as data:
            for x, y in loader:
                data.samples(len(x))
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()

    A rank that comes to the end of the block goes on taking part in the steps of the others, with
    gradients of zero (TopK and PowerSGD: with its residual) and with every update, so that the weights
    stay the same on all ranks. What the loop does between ``synchronize()`` and ``step()``, such as clipping
    or unscaling, need not run there: the gradients it leaves, the parameter groups' settings and the
    GradScaler's scale come from a rank that has a batch. The block ends on all ranks together. A step that
    was begun when the batches ended (``backward_passes_per_step``) is taken with the micro-batches it has.

    Args:
        optimizer: a ``DistributedOptimizer``.
        average_over: "ranks": the mean over all ranks, with zeros from those without a batch. "active":
            over the ranks that have a batch. "samples": weighed by ``samples(n)`` of each rank; ranks
            then wait for each other at the first gradient of each step.
        on_shadow_step: called after each update without a batch, as for a schedule.

    Raises:
        TypeError: the optimizer is not one of ``DistributedOptimizer``'s.
        ValueError: the optimizer's reduction cannot be weighed so.
        RuntimeError: inside another such block.
    """
    wrapper = getattr(optimizer, "_hvd_ext", None)
    if wrapper is None:
        raise TypeError("optimizer must be a hvd.DistributedOptimizer (not with op=hvd.Adasum alone, nor "
                        f"LBFGS), got {type(optimizer).__name__} of {type(optimizer).__module__}")
    if _ACTIVE_CONTEXTS:
        raise RuntimeError("this is inside hvd.uneven_inputs already; use one block around the loop, with "
                           "one optimizer: a rank that shadows takes part in the steps of one alone")
    data = Uneven(optimizer, average_over, on_shadow_step)
    wrapper.uneven = data
    _ACTIVE_CONTEXTS.append(data)
    try:
        yield data
        data.take_shadow_steps()
    finally:
        data.abort_step()
        wrapper.uneven = None
        _ACTIVE_CONTEXTS.remove(data)


class Uneven:
    """What ``with hvd.uneven_inputs(optimizer) as data`` gives.

    Attributes:
        shadow_steps: steps that this rank has taken without a batch of its own.
    """

    def __init__(self, optimizer: Any, average_over: str, on_shadow_step: Callable[[], Any] | None) -> None:
        self._optimizer = optimizer
        self._wrapper = optimizer._hvd_ext
        reducer = self._wrapper.reducer
        if reducer.staleness:
            raise ValueError(OVERLAP_UNSUPPORTED_MSG)
        reduction = describe_reduction(reducer.settings)[0].removeprefix("reduction: ")
        self.average_over = check_weighting(average_over, reduction=reduction, weighable=reducer.averages,
                                     whole=reducer.linear)
        self._on_shadow_step = on_shadow_step
        self.shadow_steps = 0
        self._name = "uneven"
        self._samples = 0.0
        self._handle: Handle | None = None
        self._attendance: Attendance | None = None  # of this step
        self._sent = 0.0
        self._weighed: set[torch.Tensor] = set()
        self._reduced: Attendance | None = None  # of a step that is reduced, until it is applied or abandoned
        self._last: Attendance | None = None  # of the last step that was reduced
        self._decision: Decision | None = None  # that this rank follows
        self._absent = False  # this rank has had no batch in the last step
        self.touched = False  # the loop may have changed the reduced gradients

    def samples(self, count: float) -> None:
        """Say how many samples the batch has whose backward pass follows; micro-batches add up.

        Raises:
            TypeError, ValueError: ``count`` is not a number above 0, or ``average_over`` is not "samples".
        """
        self._samples += check_samples(count, self.average_over)

    # The step of a rank that has a batch

    def gradient_ready(self, parameter: torch.Tensor, *, last: bool) -> None:
        """A backward pass has made a gradient; ``last`` when it is complete and is going to be sent."""
        if self.average_over != "samples":
            self.announce_batch(active=True)
        elif last:
            self.announce_batch(active=True)
            self._weigh_gradient(parameter)

    def announce_batch(self, *, active: bool) -> None:
        """Tell the others, once a step, whether this rank has a batch."""
        if self._handle is not None or self._attendance is not None:
            return
        if active and self.average_over == "samples" and not self._samples:
            raise missing_samples()
        self._sent = self._samples if active else 0.0
        collectives = self._wrapper.collectives
        if not collectives.is_member or collectives.size == 1:
            self._attendance = Attendance(int(active), self._sent, 0 if active else None, True, 1)
            return
        row = attendance_row(active, self._sent, digest_parts(shared_settings(self._wrapper)),
                             collectives.rank,
                             collectives.size)
        self._handle = self._sum_rows(row, "active")

    def _sum_rows(self, row: npt.NDArray[np.float64], what: str) -> Handle:
        return self._wrapper.collectives.allreduce_async_(
            torch.from_numpy(row), f"{self._name}/{what}", op=horovod.Sum, kind="agreement")

    def read_attendance(self) -> Attendance:
        """Who has a batch in this step."""
        if self._attendance is None:
            assert self._handle is not None
            handle, self._handle = self._handle, None
            self._attendance = Attendance.from_sum(handle.wait().numpy(), self._wrapper.collectives.size)
        return self._attendance

    def _weigh_gradient(self, parameter: torch.Tensor) -> None:
        """Multiply a gradient that is about to be sent by its weight."""
        self._weighed.add(parameter)
        factor = self._gradient_weighting().local_factor(self._sent, self.read_attendance().samples)
        if factor != 1.0 and parameter.grad is not None:
            parameter.grad.detach().mul_(factor)

    def _gradient_weighting(self) -> GradientWeighting:
        return GradientWeighting(self.average_over, self._wrapper.collectives.size)

    def before_reduce(self) -> None:
        """At the start of ``synchronize()``: every rank says whether it has a batch, if it has not yet."""
        self.announce_batch(active=True)
        reducer = self._wrapper.reducer
        if self.average_over == "samples":
            for entry in reducer.entries:
                if entry.parameter not in self._weighed:
                    self._weigh_gradient(entry.parameter)
        found = self.read_attendance()
        reducer.active = found.active if self.average_over == "active" else None
        if found.missing and not found.alike:
            self._follow_settings(found)

    def after_reduce(self) -> None:
        """Turn the mean over all ranks into the one that was asked for."""
        reducer, found = self._wrapper.reducer, self.read_attendance()
        factor = 1.0 if reducer.counts_active else self._gradient_weighting().global_factor(found.active)
        if factor != 1.0:
            for entry in reducer.entries:
                if entry.parameter.grad is not None:
                    entry.parameter.grad.detach().mul_(factor)
        self.mark_step_done()
        self._reduced = self._last = found

    def mark_step_done(self) -> None:
        """The step is reduced, or dropped on all ranks alike."""
        if self._handle is not None:
            self.read_attendance()
        self._forget_step()

    def abort_step(self) -> None:
        """Let go of a step that nobody may answer."""
        if self._handle is not None:
            keep_alive_until_done([self._handle])
            self._handle = None
        self._forget_step()

    def _forget_step(self) -> None:
        self._attendance = self._reduced = self._decision = None
        self._samples = self._sent = 0.0
        self._weighed.clear()
        self._wrapper.reducer.active = None

    # What the loop does with reduced gradients, where some rank has no loop any more

    def update_follows(self) -> None:
        """They are applied: as the first rank with a batch has them, if the loop may have changed them."""
        self._end_step(Decision("update", touched=self.touched))

    def abandon_follows(self) -> None:
        """They are thrown away; a loss scale that has changed since goes to the ranks without a batch."""
        self._end_step(Decision("abandon"))

    def _end_step(self, decision: Decision) -> None:
        known, found = self._exchange_decision(decision), self._reduced
        self._reduced = self._decision = None
        if known is not None and found is not None:
            if not known.alike:
                self._follow_settings(found)
            if known.touched and not self._wrapper.reducer.owner_only:
                self._share_gradients(found)

    def gather_follows(self) -> None:
        """All ranks get all of them."""
        self._exchange_decision(Decision("gather"))

    def clipping_follows(self, max_norm: float, norm_type: float) -> None:
        """Each rank clips those it owns by the norm of all."""
        self._exchange_decision(Decision("clip", max_norm=max_norm, norm_type=norm_type))

    def _exchange_decision(self, decision: Decision | None) -> Decision | None:
        """Tell ranks without a batch, or learn there (None), what is done; None where all have one."""
        found, known = self._reduced, self._decision
        if found is None or not found.missing or known is not None:
            return known
        settings = digest_parts(shared_settings(self._wrapper))
        row = Decision.empty_row(settings) if decision is None else decision.encode_row(
            settings, root=self._wrapper.collectives.rank == found.root)
        return Decision.from_sum(self._sum_rows(row, "decision").wait().numpy(), found.active)

    def _follow_settings(self, found: Attendance) -> None:
        """Take over the settings of a rank that has a batch, on ranks that have none."""
        collectives = self._wrapper.collectives
        everyone = collectives.allgather_object(shared_settings(self._wrapper), f"{self._name}/settings")
        if self._absent:
            take_settings(self._wrapper, everyone[found.root or 0])

    def _share_gradients(self, found: Attendance) -> None:
        """Bring the gradients of a rank that has a batch to all."""
        collectives, root, handles = self._wrapper.collectives, found.root or 0, []
        parameters = [entry.parameter for entry in self._wrapper.reducer.entries]
        present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        collectives.broadcast_async_(present, root, f"{self._name}/present", kind="gradients").wait()
        for number, parameter in enumerate(parameters):
            if not present[number]:
                parameter.grad = None
                continue
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            sent = (gradient.to_dense() if gradient.is_sparse else gradient).detach().contiguous()
            handles.append((parameter, gradient, sent, collectives.broadcast_async_(
                sent, root, f"{self._name}/gradient{number}", kind="gradients")))
        with torch.no_grad():
            for parameter, gradient, sent, handle in handles:
                handle.wait()
                if gradient.is_sparse:
                    parameter.grad = sent.to_sparse(1)
                else:
                    parameter.grad = gradient if gradient.is_contiguous() else gradient.copy_(sent)

    # A rank that has none

    def take_shadow_steps(self) -> None:
        """Take part in the others' steps until no rank has a batch."""
        if self._wrapper.step_in_progress():
            self._optimizer.step()  # with the micro-batches it has
        self._wrapper.abandon_step()
        while True:
            self.announce_batch(active=False)
            if self.read_attendance().active == 0:
                if not self.read_attendance().alike and self._last is not None:
                    self._follow_settings(self._last)
                return
            self._absent = self._wrapper.reducer.absent = True
            try:
                updated = self._take_step()
            finally:
                self._wrapper.reducer.absent = False
            self.shadow_steps += updated
            if updated and self._on_shadow_step is not None:
                self._on_shadow_step()

    def _take_step(self) -> bool:
        """A step of the others; whether they made an update."""
        wrapper = self._wrapper
        for entry in wrapper.reducer.entries:
            entry.parameter.grad = None
        wrapper.synchronize(settle=True)
        while True:
            decision = self._decision = self._exchange_decision(None)
            assert decision is not None
            if decision.code == "update":
                self._optimizer.step()
                return True
            if decision.code == "abandon":
                wrapper.abandon_step()
                return False
            if decision.code == "gather":
                wrapper.gather_gradients()
            else:
                clip_reduced_gradients(wrapper, decision.max_norm, decision.norm_type)
            self._decision = None


def shared_settings(wrapper: Any) -> dict[str, Any]:
    """What ranks without a batch take over: numbers and texts of the parameter groups, the loss scale."""
    scaler = wrapper.grad_scaler
    groups = []
    for group in wrapper.optimizer.param_groups:
        plain = {key: _to_plain(value) for key, value in group.items() if key != "params"}
        groups.append({key: value for key, value in plain.items() if value is not NotImplemented})
    return {"groups": groups, "scaler": None if scaler is None else scaler.state_dict()}


def _to_plain(value: Any) -> Any:
    """A setting as numbers and text; NotImplemented for anything else."""
    if isinstance(value, torch.Tensor):
        return value.tolist() if value.numel() <= 16 else NotImplemented
    if isinstance(value, (tuple, list)):
        parts = [_to_plain(one) for one in value]
        return NotImplemented if NotImplemented in parts else tuple(parts)
    return value if value is None or isinstance(value, (bool, int, float, str)) else NotImplemented


def take_settings(wrapper: Any, settings: dict[str, Any]) -> None:
    """Take over what :func:`shared_settings` gave on another rank."""
    for group, values in zip(wrapper.optimizer.param_groups, settings["groups"], strict=True):
        for key, value in values.items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].copy_(torch.tensor(value, dtype=group[key].dtype))
            else:
                group[key] = value
    if wrapper.grad_scaler is not None and settings["scaler"]:
        wrapper.grad_scaler.load_state_dict(settings["scaler"])


def join(device: int = -1) -> int:
    """Wait for all ranks, as Horovod's ``join``.

    A rank that waits takes part in the others' allreduces with zeros. Where an optimizer of this process
    has an extension, that is impossible, and all ranks have to come here after the same number of steps.

    Args:
        device: Horovod's: the GPU of the zeros that are sent; -1 for the CPU.

    Returns:
        The last rank to join.

    Raises:
        RuntimeError: an extension is in use, and another rank trains on.
    """
    extensions = [what for wrapper in list(ACTIVE_WRAPPERS) if wrapper.collectives.size > 1
                  and (what := wrapper.beyond_allreduce() or (wrapper.reducer.staleness and "overlap="))]
    if extensions and horovod.size() > 1:
        _await_all_ranks(extensions[0])
    return int(horovod.join(device))


def _await_all_ranks(extension: str) -> None:
    WATCH.start_watching(horovod.rank(), horovod.shutdown, horovod.is_initialized)
    await_pending()  # Horovod's join loses what is still under way, such as the exchange of overlap=
    # Under another process set a rank may well train on without this one.
    global_only = len(horovod.mpi_ops._basics._get_process_set_ids_and_ranks()) == 1
    with join_barrier.fail_if_a_rank_trains_on(extension, idle=lambda: global_only):
        Collectives().allreduce_async_(torch.ones(1), join_barrier.NAME, op=horovod.Sum,
                                       kind="agreement").wait()
