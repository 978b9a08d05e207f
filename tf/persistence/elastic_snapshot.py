"""What an elastic state does with a distributed optimizer: gather, hand on, take part among other ranks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as horovod
import numpy as np
import tensorflow as tf

from hvd_ext.membership import MembershipChange
from hvd_ext.sharding.ownership import EVERY_RANK
from hvd_ext.tensorflow.belonging import ONCE
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.persistence.keras_checkpoint_layout import ACCUMULATOR
from hvd_ext.tensorflow.variables import as_tf, is_per_rank

OWNER = "_hvd_ext_optimizer"


def mark_owner(optimizer: Any) -> None:
    """Let :func:`optimizers_of` find the optimizer from its variables."""
    for variable in optimizer.variables:
        setattr(as_tf(variable), OWNER, weakref.ref(optimizer))


def optimizers_of(variables: Sequence[Any]) -> list[Any]:
    """The distributed optimizers that some of these variables belong to, each once, in their order."""
    found: list[Any] = []
    for variable in variables:
        optimizer = getattr(variable, OWNER, lambda: None)()
        if optimizer is not None and not any(optimizer is one for one in found):
            found.append(optimizer)
    return found


class ElasticSnapshot:
    """A distributed optimizer under Horovod elastic.

    Raises:
        ValueError: it reduces over a process set.
    """

    def __init__(self, optimizer: Any) -> None:
        wrapper = optimizer._hvd_ext
        if wrapper.collectives.process_set.process_set_id not in (0, None):
            raise ValueError(
                f"an elastic state cannot carry an optimizer with process_set="
                f"{wrapper.collectives.process_set}: Horovod forgets process sets when the ranks change; "
                "use the global one, the default")
        self.optimizer = optimizer
        self.wrapper = wrapper
        self.prefix = wrapper.reducer.prefix
        self._seng: list[np.ndarray] = []

    @property
    def alone(self) -> list[tf.Variable]:
        """What each rank keeps for itself: residuals, gradients accumulated so far."""
        wrapper = self.wrapper
        accumulated = [variable for variable in map(as_tf, self.optimizer.variables)
                       if wrapper.references.get(id(variable), (None, ""))[1] == ACCUMULATOR]
        return [*wrapper.reducer.local_state(), *map(as_tf, wrapper.sums.values()), *accumulated]

    @property
    def served(self) -> list[tuple[tf.Variable, int]]:
        """Moments that ``server=`` has one rank keep up to date, and which one."""
        wrapper, found = self.wrapper, []
        if wrapper.server is None:
            return []
        for variable in map(as_tf, self.optimizer.variables):
            reference, kind = wrapper.references.get(id(variable), (None, ""))
            owner = EVERY_RANK if reference is None else wrapper.server.owner_of(reference)
            owner = wrapper.server.busy[0] if kind == ONCE else owner
            if owner != EVERY_RANK and kind != ACCUMULATOR:
                found.append((variable, owner))
        return found

    def gather_state(self) -> None:
        """Give every rank what another one keeps of the state of all. A collective."""
        collectives = Collectives()  # no part of a step's bytes
        if collectives.size == 1 or not collectives.is_elastic:  # there each rank has room for its own alone
            return
        for number, (variable, owner) in enumerate(self.served):
            variable.assign(collectives.broadcast(variable.read_value(), owner,
                                                  f"{self.prefix}/owned_state{number}"))
        self.wrapper.reducer.gather_state(collectives)

    def average_local_state(self) -> None:
        """What each rank keeps alone becomes the mean over all: whoever leaves takes nothing away.

        A reduced gradient lacks ``(1/M) sum_i e_i``, and does so still with that mean on each of M' ranks.
        """
        collectives = Collectives()
        if collectives.size == 1:
            return
        for number, variable in enumerate(self.alone):
            variable.assign(collectives.allreduce(variable.read_value(), f"{self.prefix}/local_state{number}",
                                                  op=horovod.Average))

    def keep_local(self) -> None:
        """Keep what is in no variable of the optimizer."""
        if self.wrapper.preconditioner is not None:
            self._seng = [as_tf(one).numpy() for one in self.wrapper.preconditioner.variables]

    def restore(self) -> None:
        """Follow the optimizer's restored variables: nothing is under way, the curvature is the commit's."""
        self.wrapper.reducer.abort_step()
        if self.wrapper.server is not None:
            self.wrapper.server.abort_step()
        if self.wrapper.preconditioner is None:
            return
        variables = self.wrapper.preconditioner.variables
        if len(variables) != len(self._seng):  # made after the commit
            self.wrapper.preconditioner.reset_state()
            return
        for variable, value in zip(variables, self._seng, strict=True):
            as_tf(variable).assign(value)

    def rejoin(self, reunion: MembershipChange) -> None:
        """Take part among other ranks than those of the last commit, from there. A collective.

        Variables that are the same on every rank were broadcast before.
        """
        wrapper, collectives = self.wrapper, Collectives()
        seng = None if wrapper.preconditioner is None else wrapper.preconditioner.shared_state()
        lost, seng = horovod.broadcast_object((wrapper.reducer.lost_ranks + reunion.lost, seng), 0,
                                              name="hvd_ext.rejoin")
        alone = self.alone
        own = {id(variable) for variable in alone}
        brought = [variable for variable in map(as_tf, self.optimizer.variables)
                   if is_per_rank(variable) and (reunion.handed_on or id(variable) not in own)]
        for number, variable in enumerate(brought):
            variable.assign(collectives.broadcast(variable.read_value(), 0,
                                                  f"{self.prefix}/restored{number}"))
        if collectives.rank in reunion.joined and not reunion.handed_on:
            for variable in alone:
                variable.assign(tf.zeros_like(variable))
        wrapper.reducer.lost_ranks = lost
        self.rebuild_for_world_size()
        if wrapper.preconditioner is not None:
            wrapper.preconditioner.load_shared_state(seng)

    def rebuild_for_world_size(self) -> None:
        """Plan anew for the ranks that are here; what was traced for others is traced again."""
        wrapper = self.wrapper
        if wrapper.server is not None:
            wrapper.server.rebuild_for_world_size()
        wrapper.reducer.rebuild_for_world_size()
        wrapper.stamp_rank()
