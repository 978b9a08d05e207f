"""What an elastic state does with a distributed optimizer: gather, hand on, take part among other ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hvd_ext.torch.distributed_optimizer_class import ExtendedOptimizer
from hvd_ext.torch.persistence.optimizer_state import load_wrapped

Commit = dict[str, Any]


class ElasticSnapshot:
    """A distributed optimizer under Horovod elastic.

    Raises:
        ValueError: it reduces over a process set.
    """

    def __init__(self, optimizer: ExtendedOptimizer) -> None:
        wrapper = optimizer._hvd_ext
        process_set = wrapper.collectives.process_set
        if process_set.process_set_id != 0:
            raise ValueError(
                f"an elastic state cannot carry an optimizer with process_set={process_set}: Horovod forgets "
                "process sets when the ranks change; use the global one, the default")
        self.optimizer = optimizer
        self.wrapper = wrapper

    def gather_commit(self) -> Commit:
        """All that is needed to go on among any number of ranks, in host memory; a collective."""
        wrapper, seng = self.wrapper, self.wrapper.preconditioner
        state = super(ExtendedOptimizer, self.optimizer).state_dict()
        state, mark = (state, None) if wrapper.server is None else wrapper.server.gather_state(state)
        return on_host({"wrapped": state, "server": mark, "errors": wrapper.collectives.errors.number,
                        "reducer": wrapper.reducer.elastic_state(),
                        "preconditioner": None if seng is None else seng.state_dict(),
                        "step": None if seng is None else seng.shared_state()})

    def average_local_state(self) -> None:
        """What each rank keeps alone becomes the mean over all; a collective, before a commit."""
        self.wrapper.reducer.average_local_state()

    def restore(self, commit: Commit, own: Commit | None, *, same_ranks: bool) -> None:
        """Go on from a commit.

        Args:
            commit: the same on all ranks, but for what belongs to one.
            own: the reducer's part of the commit to take what a rank keeps alone from; None for nothing.
            same_ranks: these are the ranks that committed, with the same numbers.
        """
        wrapper, optimizer = self.wrapper, self.optimizer
        commit, own = copy.deepcopy(commit), copy.deepcopy(own)
        wrapper.abort_step()
        errors = wrapper.collectives.errors
        errors.number = max(errors.number, commit["errors"])
        load_wrapped(wrapper, commit["wrapped"], commit["server"],
                     super(ExtendedOptimizer, optimizer).load_state_dict)
        wrapper.reducer.restore(commit["reducer"], own)
        if wrapper.preconditioner is not None and same_ranks:
            wrapper.preconditioner.load_state_dict(commit["preconditioner"])
        elif wrapper.preconditioner is not None:  # the curvature is taken anew at the next step
            wrapper.preconditioner.reset_state()
            wrapper.preconditioner.load_shared_state(commit["step"])
        optimizer._should_synchronize = True


def on_host(thing: Any) -> Any:
    """A copy of nested containers with every tensor in host memory."""
    if isinstance(thing, torch.Tensor):
        return thing.detach().to("cpu", copy=True)
    if isinstance(thing, dict):
        return {key: on_host(value) for key, value in thing.items()}
    if type(thing) in (list, tuple):
        return type(thing)(on_host(value) for value in thing)
    return copy.deepcopy(thing)
