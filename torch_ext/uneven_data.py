"""Uneven data: ranks that run out of batches at different times, and end together.

A rank that has left its loop shadows the others: it takes part in their steps with gradients of zero until
nobody has a batch. Each step carries one more small sum, ``[active, samples]``, which a rank submits at the
first gradient of the step and a shadowing rank before it does anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch as horovod
import torch

from hvd_ext.agreement import digest
from hvd_ext.composition import describe_settings
from hvd_ext.torch.collectives import SHARED_ERRORS, Handle, abandon
from hvd_ext.torch.wrapper import LIVE
from hvd_ext.uneven import JOIN, LATE, Weighing, check, check_samples, missing_samples

_OPEN: list[Uneven] = []


def active() -> bool:
    """Whether this process is inside ``hvd.uneven``."""
    return bool(_OPEN)


@contextmanager
def uneven(optimizer: Any, weigh: str = "ranks", *,
           on_shadow_step: Callable[[], Any] | None = None) -> Iterator[Uneven]:
    """The loop over an epoch's batches, whose number may differ by rank; every rank enters and leaves it.

    ::

        with hvd.uneven(optimizer, weigh="samples") as data:
            for x, y in loader:
                data.samples(len(x))
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()

    A rank that comes to the end of the block goes on taking part in the steps of the others, with
    gradients of zero (TopK and PowerSGD: with its residual) and with every update, so that the weights
    stay the same on all ranks. The block ends on all ranks together. A step that was begun when the
    batches ended (``backward_passes_per_step``) is taken with the micro-batches it has. An error inside
    the block leaves it at once.

    Args:
        optimizer: a ``DistributedOptimizer``.
        weigh: what the mean is taken over. "ranks": all of them, as if those without a batch had gradients
            of zero. "active": those that have a batch. "samples": every rank's gradient weighs as many
            samples as ``samples(n)`` says; the ranks then meet at the first gradient of each step.
        on_shadow_step: called after each step that this rank takes without a batch, for what the loop does
            beside it: a learning-rate schedule must step here too.

    Raises:
        TypeError: the optimizer is not one of ``DistributedOptimizer``'s.
        ValueError: the optimizer's reduction cannot be weighed so.
        RuntimeError: inside another such block.
    """
    wrapper = getattr(optimizer, "_hvd_ext", None)
    if wrapper is None:
        raise TypeError("optimizer must be a hvd.DistributedOptimizer (not with op=hvd.Adasum alone, nor "
                        f"LBFGS), got {type(optimizer).__name__} of {type(optimizer).__module__}")
    if _OPEN:
        raise RuntimeError("this is inside hvd.uneven already; use one block around the loop, with one "
                           "optimizer: a rank that shadows takes part in the steps of one alone")
    data = Uneven(optimizer, weigh, on_shadow_step)
    wrapper.uneven = data
    _OPEN.append(data)
    try:
        yield data
        data.shadow()
    finally:
        data.forget()
        wrapper.uneven = None
        _OPEN.remove(data)


class Uneven:
    """What ``with hvd.uneven(optimizer) as data`` gives.

    Attributes:
        shadow_steps: steps that this rank has taken without a batch of its own.
    """

    def __init__(self, optimizer: Any, weigh: str, on_shadow_step: Callable[[], Any] | None) -> None:
        self._optimizer = optimizer
        self._wrapper = optimizer._hvd_ext
        reducer = self._wrapper.reducer
        if reducer.staleness:
            raise ValueError(LATE)
        reduction = describe_settings(reducer.settings)[0].removeprefix("reduction: ")
        self.weigh = check(weigh, reduction=reduction, weighable=reducer.averages, whole=reducer.linear)
        self._on_shadow_step = on_shadow_step
        self.shadow_steps = 0
        shapes = [(tuple(p.shape), str(p.dtype)) for g in optimizer.param_groups for p in g["params"]]
        self._name = f"uneven.{digest(shapes) & 0xFFFF:04x}"
        self._samples = 0.0
        self._handle: Handle | None = None
        self._total: tuple[int, float] | None = None  # active ranks and samples of this step
        self._sent = 0.0
        self._weighed: set[torch.Tensor] = set()

    def samples(self, count: float) -> None:
        """Say how many samples the batch has whose backward pass follows; micro-batches add up.

        Raises:
            TypeError, ValueError: ``count`` is not a number above 0, or ``weigh`` is not "samples".
        """
        self._samples += check_samples(count, self.weigh)

    # The step of a rank that has a batch

    def gradient_ready(self, parameter: torch.Tensor, *, last: bool) -> None:
        """A backward pass has made a gradient; ``last`` when it is complete and is going to be sent."""
        if self.weigh != "samples":
            self.begin(active=True)
        elif last:
            self.begin(active=True)
            self._weigh(parameter)

    def begin(self, *, active: bool) -> None:
        """Tell the others, once a step, whether this rank has a batch."""
        if self._handle is not None or self._total is not None:
            return
        if active and self.weigh == "samples" and not self._samples:
            raise missing_samples()
        self._sent = self._samples if active else 0.0
        row = torch.tensor([float(active), self._sent], dtype=torch.float64)
        if not self._wrapper.collectives.included or self._wrapper.collectives.size == 1:
            self._total = int(active), self._sent
            return
        after = f".after{len(SHARED_ERRORS)}" if SHARED_ERRORS else ""
        self._handle = self._wrapper.collectives.allreduce_async_(
            row, f"{self._name}{after}/active", op=horovod.Sum, kind="agreement")

    def total(self) -> tuple[int, float]:
        """How many ranks have a batch in this step, and how many samples all together."""
        if self._total is None:
            assert self._handle is not None
            handle, self._handle = self._handle, None
            ranks, samples = handle.wait().tolist()
            self._total = int(ranks), samples
        return self._total

    def _weigh(self, parameter: torch.Tensor) -> None:
        """Multiply a gradient that is about to be sent by its weight."""
        self._weighed.add(parameter)
        factor = self._weighing().before(self._sent, self.total()[1])
        if factor != 1.0 and parameter.grad is not None:
            parameter.grad.detach().mul_(factor)

    def _weighing(self) -> Weighing:
        return Weighing(self.weigh, self._wrapper.collectives.size)

    def before_reduce(self) -> None:
        """At the start of ``synchronize()``: every rank says whether it has a batch, if it has not yet."""
        self.begin(active=True)
        reducer = self._wrapper.reducer
        if self.weigh == "samples":
            for entry in reducer.entries:
                if entry.parameter not in self._weighed:
                    self._weigh(entry.parameter)
        reducer.active = self.total()[0] if self.weigh == "active" else None

    def after_reduce(self) -> None:
        """Turn the mean over all ranks into the one that was asked for."""
        reducer = self._wrapper.reducer
        factor = 1.0 if reducer.counts_active else self._weighing().after(self.total()[0])
        if factor != 1.0:
            for entry in reducer.entries:
                if entry.parameter.grad is not None:
                    entry.parameter.grad.detach().mul_(factor)

    def step_over(self) -> None:
        """The step is reduced, or dropped on all ranks alike."""
        if self._handle is not None:
            self.total()
        self._forget_step()

    def forget(self) -> None:
        """Let go of a step that nobody may answer."""
        if self._handle is not None:
            abandon([self._handle])
            self._handle = None
        self._forget_step()

    def _forget_step(self) -> None:
        self._total = None
        self._samples = self._sent = 0.0
        self._weighed.clear()
        self._wrapper.reducer.active = None

    # A rank that has none

    def shadow(self) -> None:
        """Take part in the others' steps until no rank has a batch."""
        if self._wrapper.begun() and not self._optimizer._synchronized:
            self._optimizer.step()  # with the micro-batches it has
        while True:
            self.begin(active=False)
            if self.total()[0] == 0:
                return
            self._wrapper.reducer.absent = True
            try:
                self._take_step()
            finally:
                self._wrapper.reducer.absent = False
            self.shadow_steps += 1
            if self._on_shadow_step is not None:
                self._on_shadow_step()

    def _take_step(self) -> None:
        for entry in self._wrapper.reducer.entries:
            entry.parameter.grad = None
        scaler = self._wrapper.grad_scaler
        if scaler is None or not scaler.is_enabled():
            self._optimizer.step()
            return
        scaler.scale(torch.zeros((), device=self._wrapper.reducer.entries[0].parameter.device))
        self._optimizer.synchronize()
        with self._optimizer.skip_synchronize():
            scaler.step(self._optimizer)
        scaler.update()


def join(device: int = -1) -> int:
    """Horovod's: wait for all ranks, taking part in their allreduces with zeros; the last rank to join.

    Raises:
        RuntimeError: an optimizer of this process has an extension that needs other collectives.
    """
    for wrapper in list(LIVE):
        what = wrapper.beyond_allreduce()
        if what is not None and wrapper.collectives.size > 1:
            raise RuntimeError(JOIN.format(what=what))
    return int(horovod.join(device))
