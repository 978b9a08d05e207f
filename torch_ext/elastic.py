"""Horovod elastic for PyTorch, with a state that carries the extensions'.

``TorchState(model=model, optimizer=optimizer, ...)`` is Horovod's; for an optimizer with extensions a
commit keeps all that any number of ranks would need to go on: a commit is a collective then. Before ranks
leave or join in good order all share what each of them keeps alone (residuals).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from horovod.common.exceptions import HostsUpdatedInterrupt
from horovod.torch.elastic import *  # noqa: F403
from horovod.torch.elastic import TorchState as HorovodTorchState
from horovod.torch.elastic import run, state
from horovod.torch.elastic.sampler import ElasticSampler
from horovod.torch.functions import broadcast_object

from hvd_ext.horovod_api import aliases
from hvd_ext.membership import CommitInfo, MembershipChange
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.consistency.replicas import broadcast_parameters
from hvd_ext.torch.distributed_optimizer_class import ExtendedOptimizer
from hvd_ext.torch.persistence import optimizer_state
from hvd_ext.torch.persistence.elastic_snapshot import Commit, ElasticSnapshot
from hvd_ext.torch.persistence.optimizer_broadcast import broadcast_optimizer_state
from hvd_ext.torch.persistence.optimizer_state import STATE_KEY

__all__ = ["ElasticSampler", "TorchState", "run"]
__path__: list[str] = []  # hvd_ext.torch.elastic.sampler and .state are Horovod's
__getattr__ = aliases.module_getattr(__name__, "horovod.torch.elastic")


class TorchState(HorovodTorchState):  # type: ignore[misc]
    """Horovod's ``TorchState``, which also carries optimizers with extensions.

    ``commit()``, ``save()``, ``sync()`` and ``check_host_updates()`` are to be called by all ranks
    together. A check that finds hosts added or removed commits, and ``sync()`` follows on all ranks.
    """

    def save(self) -> None:
        """Keep everything in host memory, or nothing when a rank fails meanwhile."""
        for handler in self._extended_handlers():
            handler.prepare()
        super().save()

    def sync(self) -> None:
        """Bring all ranks to rank 0's step, whoever has left or joined, and commit."""
        super().sync()
        self.save()

    def check_host_updates(self) -> None:
        """Raise ``HostsUpdatedInterrupt`` on all ranks when hosts were added or will be removed."""
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:
            for handler in self._extended_handlers():
                handler.carried.average_local_state()
            self.save()
            for handler in self._extended_handlers():
                handler.mark_handed_on()
            # Horovod skips sync() where ranks only leave; owners and slices have moved then, too.
            raise HostsUpdatedInterrupt(False) from None

    def _extended_handlers(self) -> list[ExtendedOptimizerHandler]:
        return [one for one in self._handlers.values() if isinstance(one, ExtendedOptimizerHandler)]


class ExtendedOptimizerHandler(state.OptimizerStateHandler):  # type: ignore[misc]
    """What ``TorchState`` does with an optimizer that has extensions.

    Before the first ``sync()`` nothing here is a collective: a rank that joins stands alone then.
    """

    value: ExtendedOptimizer

    def __init__(self, optimizer: ExtendedOptimizer) -> None:
        ElasticSnapshot(optimizer)  # refuses what cannot be carried, before anything of it is read
        super().__init__(optimizer)
        self._check_idle()

    def _check_idle(self) -> None:
        self.carried = ElasticSnapshot(self.value)
        self.committed: Commit = {}
        self._place: CommitInfo | None = None  # of the last commit
        self._commits = 0
        self._prepared: Commit | None = None

    def prepare(self) -> None:
        """Bring together what any number of ranks needs to go on. A collective; ``save`` keeps it."""
        self._prepared = self.carried.gather_commit()

    def save(self) -> None:
        """Keep what was prepared. Without, a collective."""
        if self._prepared is None:
            self.prepare()
        assert self._prepared is not None
        self.committed, self._prepared = self._prepared, None
        self._commits += 1
        self._place = replace(self._commit_info(), commit=self._commits)

    def mark_handed_on(self) -> None:
        """The last commit holds what all ranks have shared."""
        assert self._place is not None
        self._place = replace(self._place, handed_on=True)

    def restore(self) -> None:
        """Take back the last commit."""
        self._prepared = None
        here = self._commit_info()
        if self._place is None:  # what the optimizer had when this was made
            own = self._saved_optimizer_state[STATE_KEY]
            self.value.load_state_dict(
                copy.deepcopy(self._saved_optimizer_state),
                reset_per_rank_state=(own["rank"], own["size"]) != (here.rank, here.ranks))
        else:
            self.carried.restore(
                self.committed, self.committed["reducer"],
                same_ranks=(self._place.rank, self._place.ranks) == (here.rank, here.ranks))

    def set_value(self, value: ExtendedOptimizer) -> None:
        """Take another optimizer; the next commit is its first."""
        self.value, self._saved_optimizer_state = value, copy.deepcopy(value.state_dict())
        self._check_idle()

    def sync(self) -> None:
        """Bring all ranks to rank 0's step, whoever has left or joined. A collective; a commit follows."""
        wrapper = self.value._hvd_ext
        reunion = MembershipChange.from_places(Collectives().allgather_object(self._place,
                                                                              "hvd_ext/membership"))
        if reunion.first:
            wrapper.rebuild_for_world_size()  # the ranks may have changed before training began
            optimizer_state.load_shared_state(wrapper, broadcast_object(
                optimizer_state.shared_state(wrapper), 0, "hvd_ext/shared_state"))
        elif reunion.changed:
            self._rejoin_group(reunion)
        broadcast_optimizer_state(self.value, 0)
        self._commits = reunion.commit

    def _rejoin_group(self, reunion: MembershipChange) -> None:
        """Take part among other ranks than those of the last commit, from rank 0's."""
        wrapper, commit = self.value._hvd_ext, self.committed
        # Not the commit's: a reset callback may have changed the rate since.
        settings = broadcast_object([{key: value for key, value in group.items() if key != "params"}
                                     for group in self.value.param_groups], 0, "hvd_ext/settings")
        own = None if self._place is None else commit["reducer"]
        if not reunion.level:
            commit = broadcast_object({**commit, "preconditioner": None}, 0, "hvd_ext/commit")
        wrapper.rebuild_for_world_size()
        self.carried.restore(commit, commit["reducer"] if reunion.handed_on else own, same_ranks=False)
        wrapper.reducer.on_ranks_lost(reunion.lost)
        for group, values in zip(self.value.param_groups, settings, strict=True):
            group.update(values)

    def _commit_info(self) -> CommitInfo:
        collectives = self.value._hvd_ext.collectives
        return CommitInfo(collectives.rank, collectives.size)


class OptimizerHandler(state.OptimizerStateHandler):  # type: ignore[misc]
    """Horovod's handler of other optimizers; a rank that joins takes no step to get the root's state."""

    def sync(self) -> None:
        """Bring rank 0's state to all ranks."""
        broadcast_optimizer_state(self.value, 0)


class ModelHandler(state.ModelStateHandler):  # type: ignore[misc]
    """Horovod's handler of models, for weights of any layout and dtype."""

    def sync(self) -> None:
        """Bring rank 0's weights and buffers to all ranks."""
        broadcast_parameters(self.value.state_dict(), 0)


def _install_handlers() -> None:
    registry: list[tuple[Any, Any]] = state.get_handler_registry()
    registry[:0] = [(ExtendedOptimizer, ExtendedOptimizerHandler),
                    (torch.optim.Optimizer, OptimizerHandler), (torch.nn.Module, ModelHandler)]


_install_handlers()
