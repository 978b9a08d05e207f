"""Bringing one rank's optimizer state to all, also with extensions that keep state per rank."""

from __future__ import annotations

import horovod.torch as horovod
import torch


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int,
                              model: torch.nn.Module | None = None) -> None:
    """Horovod's function; refuses to pretend that state kept per rank came along.

    With ``server="rank0"`` or ``"sharded"`` moments stay with their owners: only the parameter
    groups' settings are broadcast, and a checkpoint is to be loaded on every rank.

    A checkpoint read on one rank and broadcast brings the wrapped optimizer's state, but the
    extensions' state is each rank's own. When the ranks' differ in age, that is an error.

    Raises:
        ValueError: on every rank, when some have extension state of other steps than the root's.
    """
    reducer = getattr(optimizer, "_hvd_reducer", None)
    if reducer is not None and reducer.collectives.included:
        ages = reducer.collectives.allgather_object(
            reducer.state_dict().get("steps", 0), "hvd_ext/state_age"
        )
        if len(set(ages)) > 1:
            raise ValueError(
                f"the ranks' extension state is of different steps ({ages}, by rank); load each "
                "rank's own checkpoint before broadcasting, or load the one file on every rank "
                "with load_state_dict(state, reset_per_rank_state=True)"
            )
    server = getattr(optimizer, "_hvd_server", None)
    if server is not None and not server.alone:
        server.broadcast_settings(root_rank)
    elif optimizer is not None:
        horovod.broadcast_optimizer_state(optimizer, root_rank, model)
