"""The interface of a reducer: what turns each rank's gradients into the reduced gradient.

``step.py`` owns the hooks. It tells the reducer about every gradient as the backward pass yields
it; the reducer starts its collectives then, and hands back reduced gradients when the step needs them.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_ext.consistency.fingerprint import Fingerprint
from hvd_ext.reducers.options import DenseReduction, ReductionOptions
from hvd_ext.reducers.registry import describe_reduction, public_name, public_op
from hvd_ext.state import LOST_RESIDUALS, NUMBER, OWN, RANK, SHARED, Part, complete_declaration, split_state
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.reducers import declared_state


@dataclass(frozen=True, eq=False)
class NamedParameter:
    """A parameter under its name, with the number of its parameter group.

    ``groups`` gives the optimizer's groups as they are now: ``load_state_dict`` replaces them.
    """

    name: str
    parameter: torch.nn.Parameter
    group_index: int
    groups: Callable[[], Sequence[dict[str, Any]]]

    @property
    def group(self) -> dict[str, Any]:
        """The parameter's group as it is now."""
        return self.groups()[self.group_index]


def norm_and_finite(gradients: Sequence[torch.Tensor]) -> tuple[float, bool]:
    """The 2-norm of all, and whether all their elements are finite."""
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    # The norm of huge but finite gradients overflows: only then look at every element.
    return norm, math.isfinite(norm) or all(bool(one.isfinite().all()) for one in gradients)


class Reducer(abc.ABC):
    """Turns each rank's local gradients into the reduced gradient, the same bits on every rank.

    Args:
        collectives: the ranks to reduce over.
        settings: of this way to reduce, as the user gave them.
        options: what every way to reduce is given.
    """

    def __init__(self, collectives: Collectives, settings: Any, options: ReductionOptions) -> None:
        self.collectives = collectives
        self.settings = settings
        self.options = options
        self.passes = options.passes
        self.entries: list[NamedParameter] = []
        self.met: tuple[int, ...] | None = None  # the plan that the ranks agreed on
        self.frozen: set[NamedParameter] = set()  # without a gradient in this step, and not to be trained
        self.required: set[torch.Tensor] | None = None  # what Horovod's _requires_update is set to
        self.absent = False  # this rank has no batch in this step (hvd.uneven_inputs)
        self.active: int | None = None  # ranks that have one, where the mean is over those

    def register_parameters(self, entries: Sequence[NamedParameter]) -> None:
        """Take the parameters whose gradients are to be reduced; called again when there are more."""
        self.entries = list(entries)

    def find_frozen(self, passes_done: Mapping[torch.Tensor, int]) -> None:
        """Before a reduction: find what is frozen in it. Frozen parameters have no gradient, and stay still.

        Args:
            passes_done: how many gradients of this step each parameter has had; one that has had any is
                not frozen yet.
        """
        self.frozen = {entry for entry in self.entries if not passes_done.get(entry.parameter, 0)
                       and not (entry.parameter.requires_grad and self.takes_part(entry.parameter))}
        for entry in self.frozen:
            entry.parameter.grad = None

    def takes_part(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter takes part in a step in which no backward pass has reached it."""
        return self.required is None or parameter in self.required

    def frozen_lines(self) -> list[str]:
        """What the ranks compare of it."""
        return [f"frozen: {entry.name}" for entry in self.entries if entry in self.frozen]

    staleness = 0
    """Steps by which the gradients that ``finish()`` gives are late."""

    untouched = False
    """Whether the gradients of one rank are the reduced ones."""

    repeatable = False
    """Whether reducing gradients a second time before the update gives what one process would have."""

    @property
    def name(self) -> str:
        """What a user wrote to get this reducer, for errors."""
        settings = self.settings
        return public_op(settings.op) if isinstance(settings, DenseReduction) else public_name(settings)

    @property
    def parts(self) -> int:
        """How many exchanges of its own a step has: one, unless every backward pass is."""
        return 1

    @property
    def averages(self) -> bool:
        """Whether the reduced gradient is a mean over the ranks."""
        return True

    @property
    def linear(self) -> bool:
        """Whether a rank's gradient may be weighed by multiplying it."""
        return True

    @property
    def counts_active(self) -> bool:
        """Whether the reducer divides by ``active`` itself."""
        return False

    @property
    def plan(self) -> tuple[int, ...]:
        """What changes when the ranks have to agree again."""
        return len(self.entries), self.passes

    def after_agreement(self) -> None:  # noqa: B027
        """The ranks have agreed on the plan, and begin to exchange gradients by it."""

    @abc.abstractmethod
    def gradient_ready(self, entry: NamedParameter, passes_done: int, pass_number: int) -> None:
        """A backward pass has finished ``entry.parameter.grad``; the ``passes_done``-th this step.

        ``pass_number`` counts the step's backward passes from 1, also those that the parameter took no
        part in; it is kept only where ``parts`` is above 1.
        """

    def start_remaining(self) -> None:
        """Start all of this step's exchange that is not started yet, also for missing gradients.

        What a reducer needs for ``overlap=``.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be used with overlap=: it has no "
                                  "start_all()")

    def poll(self) -> None:  # noqa: B027
        """Let an exchange under way go on as far as it can without waiting; called during backward passes."""

    def flush(self) -> bool:
        """Put gradients that are late, if any, into ``parameter.grad``; whether there are, to be applied."""
        return False

    @abc.abstractmethod
    def finish(self) -> bool:
        """Wait for the reduced gradients and put them into ``parameter.grad``.

        What the reducer keeps between steps stays as it is until ``commit()``.

        Returns whether the step may be taken; False, on all ranks, when it must be skipped.
        """

    def commit(self) -> None:  # noqa: B027
        """The update is about to be made: what ``finish()`` has left pending holds from here on."""

    def abandon(self) -> None:  # noqa: B027
        """The reduced gradients are not used: drop what ``finish()`` has left pending, on all ranks alike."""

    def skip_step(self) -> None:
        """As ``abandon()``; gradients that were kept from a step before, and handed out now, are gone too."""
        self.abandon()

    owner_only = False
    """Whether this rank has the reduced gradients of what it owns only, until ``gather_gradients()``."""

    def gather_gradients(self) -> None:  # noqa: B027
        """Bring reduced gradients that only their owners have to all ranks."""

    def owned_gradients(self) -> list[torch.Tensor]:
        """The reduced gradients of what this rank owns, while they are ``partial``."""
        return []

    def on_weights_updated(self) -> None:  # noqa: B027
        """The update has been taken."""

    @abc.abstractmethod
    def abort_step(self) -> None:
        """Abort the current step after an error; pending collectives may never complete."""

    @abc.abstractmethod
    def pending_handles(self) -> list[Handle]:
        """The collectives that were started for this step and not waited for."""

    def drain(self) -> None:
        """Drop what was begun for this step on all ranks alike: wait for it, and make no use of it."""
        for handle in self.pending_handles():
            # Horovod may have ended meanwhile (elastic), and its handles with it.
            with contextlib.suppress(HorovodInternalError, ValueError):
                handle.wait_all()
        self.abort_step()

    STATE: Sequence[Part] = ()
    """What the reducer keeps between steps; each part's value is in the attribute of that name."""

    state_scale = 1.0
    """The loss scale of the parts that carry one."""

    lost_residuals = 0
    """Ranks that have left with what they kept alone."""

    def declared_state(self) -> list[tuple[Reducer, Part]]:
        """All that is kept between steps, each part with the reducer that holds it."""
        return [(self, part) for part in complete_declaration(self.STATE)]

    @property
    def state_parts(self) -> list[Part]:
        """The declaration of what ``state_dict()`` holds."""
        return [part for _, part in self.declared_state()]

    @property
    def state_method(self) -> str | None:
        """The extension whose state this is, as a user writes it; None where there is none."""
        return None if isinstance(self.settings, DenseReduction) else public_name(self.settings)

    def settle(self) -> None:  # noqa: B027
        """Before the state is read: wait for what a step before has sent, on all ranks alike."""

    def forget_step(self) -> None:
        """Before other state is taken: drop the step under way."""
        self.abort_step()
        self.abandon()

    def fold_local_state(self) -> None:  # noqa: B027
        """Before a mean over the ranks: put state that has another form into the parts that are averaged."""

    def on_state_taken(self) -> None:  # noqa: B027
        """Another rank's state was taken, perhaps among other ranks."""

    def state_dict(self) -> dict[str, Any]:
        """What this rank keeps between steps. Under ``overlap=`` all ranks must be at this step."""
        self.settle()
        return declared_state.save_state(self)

    def shared_state(self) -> dict[str, Any]:
        """What is the same on every rank, such as counters: a rank that joins takes it over."""
        self.settle()
        return declared_state.save_state(self, shared_only=True)

    def check_state_dict(self, state: dict[str, Any], *, ranks: int | None = None,
                         rank: int | None = None) -> None:
        """Refuse what ``load_state_dict`` could not take, before anything is changed.

        Args:
            state: as saved.
            ranks, rank: where it was saved; None: here.

        Raises:
            ValueError: it is of another model or other settings.
        """
        declared_state.check_state(self, state, ranks=ranks, rank=rank)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict()`` gave, bit for bit."""
        self.check_state_dict(state)
        self.forget_step()
        declared_state.load_state(self, state)

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Take over what another rank's ``shared_state()`` gave."""
        self.forget_step()
        declared_state.load_shared(self, state)
        self.on_state_taken()

    def reset_per_rank_state(self) -> None:
        """Start what this rank keeps between steps anew."""
        self.forget_step()
        declared_state.load_state(self, {})

    def of_other_rank(self, state: dict[str, Any], *, same_ranks: bool) -> dict[str, Any]:
        """What of another rank's ``state_dict()`` this rank takes: the shared parts.

        Args:
            state: as saved.
            same_ranks: by one of as many ranks.
        """
        common = {part.name: getattr(holder, part.attribute).common_state(state[part.name])
                  for holder, part in self.declared_state()
                  if same_ranks and part.layout == OWN and part.scope == RANK and state.get(part.name)}
        return {**split_state(self.state_parts, state)[0], **common}

    def progress_values(self) -> tuple[float, ...]:
        """Numbers that are equal on ranks that may go on together."""
        return tuple(getattr(holder, part.attribute) for holder, part in self.declared_state()
                     if part.scope == SHARED and part.layout == NUMBER)

    def kept_by_rank(self) -> tuple[str, ...]:
        """What this rank keeps of its own, for a message; without waiting for anything."""
        return tuple(declared_state.held_labels(self))

    def drop_in_flight(self) -> None:  # noqa: B027
        """Drop what a step before has sent and nobody has waited for, on all ranks alike."""

    # When the number of ranks changes

    def average_local_state(self) -> None:
        """Before ranks may leave: what each rank keeps alone becomes the mean over all; a collective."""
        self.settle()
        self.fold_local_state()
        declared_state.average_state(self)

    def elastic_state(self) -> dict[str, Any]:
        """What is needed to go on among any number of ranks; a collective."""
        return declared_state.gather_slices(self, self.state_dict())

    def restore(self, committed: dict[str, Any], own: dict[str, Any] | None) -> None:
        """Go on from what ``elastic_state()`` gave, on however many ranks there are now.

        Args:
            committed: the same commit on all ranks.
            own: that to take from what a rank keeps alone; None to begin with nothing.
        """
        alone = {part.name: None if own is None else own[part.name]
                 for part in self.state_parts if part.scope == RANK}
        self.forget_step()
        declared_state.load_state(self, declared_state.cut_slices(self, {**committed, **alone}))
        self.on_state_taken()

    def join_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the ``state_dict()`` of every rank that saved, by rank, however many there were.

        ``check_state_dict`` must have taken each of them.
        """
        self.forget_step()
        declared_state.join_states(self, states)
        self.on_state_taken()

    def on_ranks_lost(self, ranks: int) -> None:
        """So many ranks have left with what they kept alone."""
        if LOST_RESIDUALS in self.state_parts:
            self.lost_residuals += ranks

    def build_fingerprint(self) -> Fingerprint:
        """What must be the same on every rank."""
        lines = [f"{entry.name}{list(entry.parameter.shape)} {entry.parameter.dtype}"
                 for entry in self.entries]
        return Fingerprint((*describe_reduction(self.settings), f"half precision: {self.options.half}",
                            f"{self.passes} backward passes per step", *lines, *self.frozen_lines()))

    def report(self) -> dict[str, Any]:
        """Figures of the last step, for people and programs to read."""
        return {}
