"""The wrapped optimizer's state where each rank holds that of what it owns: gathered, and cut again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hvd_ext.sharding import OwnedState, check_loadable
from hvd_ext.torch.persistence.state_exchange import gather_states
from hvd_ext.torch.sharding.shards import cut_state, join_states
from hvd_ext.torch.sharding.weight_sync import LABEL

if TYPE_CHECKING:
    from hvd_ext.torch.sharding.updater import ShardedUpdater


def in_order(server: ShardedUpdater) -> list[torch.Tensor]:
    """The parameters by their number in ``state_dict()["param_groups"]``."""
    return [p for group in server.optimizer.param_groups for p in group["params"]]


def parameter_numbers(server: ShardedUpdater) -> dict[int, int]:
    """The number of each parameter in ``state_dict()["param_groups"]``, by its ``id``."""
    return {id(parameter): number for number, parameter in enumerate(in_order(server))}


def held_state(server: ShardedUpdater) -> OwnedState:
    """What of the state this rank holds."""
    rank, size = server.collectives.rank, server.collectives.size
    if server.alone or (server.where == "rank0" and rank == 0):
        return OwnedState(server.where, rank, size, None)
    return owned_state(server)


def owned_state(server: ShardedUpdater) -> OwnedState:
    """What of the state this rank owns."""
    known = parameter_numbers(server)
    mine = {known[id(server.parameters[number])]: piece for number, piece in server.pieces.items()}
    return OwnedState(server.where, server.collectives.rank, server.collectives.size, tuple(sorted(mine)),
                      tuple((number, piece.start, piece.stop) for number, piece in sorted(mine.items())
                            if not server.is_whole(piece)))


def gather_state(server: ShardedUpdater, state: dict[str, Any]) -> dict[str, Any]:
    """The complete state from what each rank holds; a collective of one message a bucket."""
    known = parameter_numbers(server)
    mine = {}
    for number, piece in server.pieces.items():
        saved = known[id(server.parameters[number])]
        if saved in state["state"]:
            mine[saved] = piece.start, state["state"][saved]
    parts: dict[int, list[tuple[int, Any]]] = {}
    for one in gather_states(server.collectives, mine, f"{LABEL}/state"):
        for saved, part in one.items():
            parts.setdefault(saved, []).append(part)
    parameters = in_order(server)
    whole = {saved: join_states([one for _, one in sorted(found, key=lambda part: part[0])],
                                parameters[saved].shape) for saved, found in sorted(parts.items())}
    return {**state, "state": {**state["state"], **whole}}


def cut_to(server: ShardedUpdater, state: dict[str, Any], mark: OwnedState | None) -> dict[str, Any]:
    """What of a saved state this rank owns.

    Raises:
        ValueError: it lacks the state of a parameter that this rank owns.
    """
    check_loadable(mark, owned_state(server))
    known, kept = parameter_numbers(server), {}
    for number, piece in server.pieces.items():
        parameter = server.parameters[number]
        key = known[id(parameter)]
        found = state["state"].get(key)
        if found is None:
            continue
        inside = None if mark is None else mark.range_of(key)
        if inside is not None:
            found = cut_state(found, (inside[1] - inside[0],), piece.start - inside[0],
                              piece.stop - inside[0])
        elif not server.is_whole(piece):
            found = cut_state(found, parameter.shape, piece.start, piece.stop)
        kept[key] = found
    return {**state, "state": kept}
