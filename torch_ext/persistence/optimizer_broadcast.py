"""``broadcast_optimizer_state``: one rank's optimizer state and settings brought to all ranks.

Horovod builds the state of a rank that has none by a step with gradients of zero, which counts as a step and
lets weight decay move the weights. Here a rank's state is built from what the root has; where that is
nothing, nothing is built.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hvd_ext.consistency.fingerprint import digest_parts, mismatch_message
from hvd_ext.state import dropped_message
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.persistence import optimizer_state
from hvd_ext.torch.persistence.state_exchange import broadcast_state
from hvd_ext.torch.sharding import sharded_state

NAME = "hvd_ext/optimizer_state"


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int,
                              model: torch.nn.Module | None = None) -> None:
    """Bring the root's optimizer state and settings to all ranks, in place. Every rank must call it.

    Unlike Horovod's it takes no step: an optimizer that is fresh on the root is fresh on all ranks after it.
    With ``server="rank0"`` or ``"sharded"`` moments stay with their owners, and only the settings of the
    parameter groups (learning rate, ...) are broadcast.

    Where the ranks' extensions are not at the same point, as when only the root has loaded a checkpoint, what
    they share comes from the root too, and what each rank keeps of its own begins new, with a warning.

    Args:
        optimizer: a torch optimizer, distributed or not.
        root_rank: the global rank whose state all get.
        model: not needed; Horovod's argument.

    Raises:
        ValueError: on every rank: LBFGS, whose state Horovod does not broadcast either; a rank that does not
            exist; optimizers with other parameters; moments that only some of their owners have loaded.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("cannot broadcast torch.optim.LBFGS state")
    ranks = Collectives()
    if isinstance(root_rank, bool) or not 0 <= int(root_rank) < ranks.size:
        raise ValueError(f"root_rank must be a global rank from 0 to {ranks.size - 1}, got {root_rank!r}")
    if ranks.size == 1:
        return
    everyone: list[Holding] = ranks.allgather_object(_describe_holding(optimizer), NAME)
    _check_parameters(ranks, optimizer, everyone)
    _check_owners(everyone)
    root = everyone[root_rank]
    levels = [one for one in everyone if one.extension is not None]
    differ = len({one.extension for one in levels}) > 1
    extended = getattr(optimizer, "_hvd_ext", None)
    wrapper = extended if differ and extended is not None and extended.collectives.is_member else None
    if wrapper is not None:
        wrapper.abort_step()
        wrapper.reducer.drop_in_flight()
    tree = {"groups": _group_settings(optimizer), "state": None if root.server else _state_of(optimizer),
            "extension": None if wrapper is None else optimizer_state.shared_state(wrapper)}
    tree = broadcast_state(ranks, tree, root_rank, f"{NAME}/values")
    if ranks.rank != root_rank:
        _install_tree(optimizer, tree)
    if wrapper is not None and tree["extension"] is not None:
        optimizer_state.begin_from(wrapper, tree["extension"])
        dropped = sorted({label for one in levels for label in one.kept})
        if dropped and ranks.rank == 0 and any(one.extension[0] is None for one in levels if one.extension):
            warnings.warn(dropped_message(dropped, (
                "broadcast_optimizer_state has found the ranks at different points of training and brought "
                f"all of them to rank {root_rank}'s")), stacklevel=2)
    if extended is not None:
        extended.loaded = None


@dataclass(frozen=True)
class Holding:
    """What one rank has of an optimizer's state.

    Attributes:
        parameters: a number that is equal where the parameters are.
        server: its ``server=``, where moments are owned by some ranks only; else None.
        members: the global ranks that share the optimizer.
        filled: whether this rank has state of what it owns; None where it owns nothing.
        extension: where the extensions are: what was loaded since the last step, and their counters; None
            on a rank that uses none.
        kept: what this rank's extensions keep of their own, for a message.
    """

    parameters: int
    server: str | None
    members: tuple[int, ...]
    filled: bool | None
    extension: tuple[Any, ...] | None = None
    kept: tuple[str, ...] = ()


def _describe_holding(optimizer: torch.optim.Optimizer) -> Holding:
    server, number = _sharing_server(optimizer), digest_parts(_parameter_lines(optimizer))
    wrapper = getattr(optimizer, "_hvd_ext", None)
    extension, kept = None, ()
    if wrapper is not None and wrapper.collectives.is_member:
        extension, kept = optimizer_state.extension_progress(wrapper)
    if server is None:
        return Holding(number, None, (), None, extension, kept)
    server.plan_owners()
    filled = [bool(server.optimizer.state.get(server.parameters[number])) for number in server.pieces]
    collectives = server.collectives
    members = tuple(collectives.global_rank(rank) for rank in range(collectives.size))
    return Holding(number, server.where, members, any(filled) if filled else None, extension, kept)


def _sharing_server(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer's server, where it leaves moments with their owners; else None."""
    server = getattr(getattr(optimizer, "_hvd_ext", None), "server", None)
    return None if server is None or server.alone else server


def _parameter_lines(optimizer: torch.optim.Optimizer) -> list[str]:
    return [f"group {number}: {list(parameter.shape)} {parameter.dtype}"
            for number, group in enumerate(optimizer.param_groups) for parameter in group["params"]]


def _check_parameters(ranks: Collectives, optimizer: torch.optim.Optimizer,
                      everyone: Iterable[Holding]) -> None:
    if len({one.parameters for one in everyone}) > 1:
        raise ValueError(mismatch_message(
            "broadcast_optimizer_state was given optimizers with different parameters",
            ranks.allgather_object(_parameter_lines(optimizer), f"{NAME}/differ"),
            "Build the same model and parameter groups on every rank before it"))


def _check_owners(everyone: Iterable[Holding]) -> None:
    everyone = list(everyone)
    for one in everyone:
        owners = [other for other in everyone if other.members == one.members and other.filled is not None]
        if one.server is not None and len({
                (other.filled, other.filled and other.extension and other.extension[0] is None)
                for other in owners}) > 1:
            raise ValueError(
                f"under server={one.server!r} each rank keeps the optimizer state of what it owns, and only "
                "some ranks have loaded it: save optimizer.gather_state_dict(), called on every rank, and "
                "call load_state_dict() with the checkpoint on every rank before broadcasting; or use "
                "hvd.save_checkpoint and hvd.load_checkpoint")


# The state as plain containers: parameters by their number, other keys as they are

def _parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups]


def _state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[int, Any], dict[Any, Any]]:
    """By the number of the parameter, and by other keys."""
    parameters = _parameters_of(optimizer)
    known = {id(parameter) for parameter in parameters}
    by_number = {number: optimizer.state[parameter] for number, parameter in enumerate(parameters)
                 if parameter in optimizer.state}
    return by_number, {key: value for key, value in optimizer.state.items() if id(key) not in known}


@torch.no_grad()
def _install_tree(optimizer: torch.optim.Optimizer, tree: dict[str, Any]) -> None:
    """Take over the root's settings and state; tensors that fit are written into."""
    for group, values in zip(optimizer.param_groups, tree["groups"], strict=True):
        for key, value in values.items():
            group[key] = _write_into(group.get(key), value)
    if tree["state"] is None:
        return
    by_number, others = tree["state"]
    server = _sharing_server(optimizer)
    if server is not None:  # the root keeps whole moments, and this rank those of what it owns
        by_number = sharded_state.cut_to(server, {"state": by_number}, None)["state"]
    parameters = _parameters_of(optimizer)
    for number, parameter in enumerate(parameters):
        if number not in by_number:
            optimizer.state.pop(parameter, None)
            continue
        before = optimizer.state.get(parameter, {})
        optimizer.state[parameter] = _for_parameter(parameter, before, by_number[number])
    known = {id(parameter) for parameter in parameters}
    for key in [key for key in optimizer.state if id(key) not in known and key not in others]:
        del optimizer.state[key]
    optimizer.state.update(others)


def _for_parameter(parameter: torch.Tensor, before: Any, state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    before = before if isinstance(before, dict) else {}
    return {key: _write_into(before.get(key), value, parameter) for key, value in state.items()}


def _write_into(before: Any, value: Any, parameter: torch.Tensor | None = None) -> Any:
    """``value`` in the tensor that was there before, if it fits; else where the parameter's state belongs."""
    if not isinstance(value, torch.Tensor) or value.is_sparse:
        return value
    if isinstance(before, torch.Tensor) and not before.is_sparse \
            and (before.shape, before.dtype) == (value.shape, value.dtype):
        return before.copy_(value)
    if parameter is None:
        return value
    device = value.device if value.device.type == "cpu" else parameter.device
    if value.shape == parameter.shape:  # the layout of its weights
        return torch.empty_like(parameter, dtype=value.dtype, device=device, requires_grad=False).copy_(value)
    return value.to(device)
