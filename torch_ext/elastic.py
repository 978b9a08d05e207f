"""Horovod elastic for PyTorch, with a state that carries the extensions'.

``TorchState(model=model, optimizer=optimizer, ...)`` is Horovod's; for an optimizer with extensions
it brings a rank that joins to the step of the others. What belongs to one rank stays with it: the
residuals of a rank that joins are zero, those of a rank that was killed are lost (``report()`` counts them).
"""

from __future__ import annotations

import copy
from typing import Any

from horovod.torch.elastic import *  # noqa: F403
from horovod.torch.elastic import TorchState, run, state
from horovod.torch.elastic.sampler import ElasticSampler
from horovod.torch.functions import broadcast_object

from hvd_ext import aliases
from hvd_ext.torch.replicas import broadcast_optimizer_state
from hvd_ext.torch.wrapper import ExtendedOptimizer

__all__ = ["ElasticSampler", "TorchState", "run"]
__path__: list[str] = []  # hvd_ext.torch.elastic.sampler and .state are Horovod's
__getattr__ = aliases.names_of(__name__, "horovod.torch.elastic")


class ExtendedOptimizerHandler(state.OptimizerStateHandler):  # type: ignore[misc]
    """What ``TorchState`` does with an optimizer that has extensions."""

    value: ExtendedOptimizer

    def __init__(self, optimizer: ExtendedOptimizer) -> None:
        super().__init__(optimizer)
        self._place = self._here()

    def _here(self) -> tuple[int, int]:
        collectives = self.value._hvd_ext.collectives
        return collectives.rank, collectives.size

    def save(self) -> None:
        """Keep the optimizer's state in memory, with all of this rank's."""
        super().save()
        self._place = self._here()

    def restore(self) -> None:
        """Take back what was saved; what belongs to a rank only if this is still that rank."""
        self.value.load_state_dict(copy.deepcopy(self._saved_optimizer_state),
                                   reset_per_rank_state=self._place != self._here())

    def sync(self) -> None:
        """Bring all ranks to rank 0's step."""
        wrapper = self.value._hvd_ext
        wrapper.load_shared_state(broadcast_object(wrapper.shared_state(), 0, "hvd_ext/shared_state"))
        broadcast_optimizer_state(self.value, 0)
        self.save()


def _install() -> None:
    registry: list[tuple[Any, Any]] = state.get_handler_registry()
    registry.insert(0, (ExtendedOptimizer, ExtendedOptimizerHandler))


_install()
