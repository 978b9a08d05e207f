"""Checkpoints of synchronous training: the model, the optimizer and what each rank keeps.

``folder/update-000000001000/`` holds ``model.pt`` (the model and the user's values, of rank 0) and
``rank0003.pt`` of each rank: its optimizer's state with that of the extensions, and the model's buffers,
which differ by rank. Where a server's replies are compressed the model is w, the exact weights, and what the
ranks held of it, w^, lies beside it. :mod:`hvd_ext.checkpoint.protocol` says when one counts.
"""

from __future__ import annotations

import io
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch

from hvd_ext.checkpoint import protocol
from hvd_ext.checkpoint.protocol import CheckpointFiles, CheckpointRef, LoadedCheckpoint, rank_file
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.persistence.optimizer_state import STATE_KEY
from hvd_ext.torch.sharding.shards import join_states

MODEL = "model.pt"


def save_checkpoint(folder: str | os.PathLike[str], step: int, *, model: torch.nn.Module,
                    optimizer: torch.optim.Optimizer, keep: int = 3, **more: Any) -> None:
    """Save a training as it is between two steps, whole or not at all. Every rank must call it.

    When it returns, the checkpoint is on the disk. A rank that fails or dies leaves the one before.

    Args:
        folder: on a file system that all hosts share; empty, or one that this run has loaded from.
        step: of the training, above that of the last checkpoint.
        model: what is trained.
        optimizer: its optimizer, distributed or not.
        keep: how many checkpoints of this run stay, at least 1.
        more: further values that ``load_checkpoint`` gives back, of rank 0: numbers, text, tensors, and
            lists and dicts of them, such as ``epoch=3`` or ``scheduler=scheduler.state_dict()``.

    Raises:
        ValueError, TypeError: on all ranks, for bad arguments, a folder with another run's checkpoints,
            or values that ``torch.load(weights_only=True)`` would refuse.
        CheckpointNotWrittenError: on all ranks, when one cannot write its file, with its reason.
    """
    ranks = _collectives_of(optimizer)
    ranks.refuse_outside("hvd.save_checkpoint")
    exact = _exact_weights(optimizer)

    def contents() -> CheckpointFiles:
        _refuse_begun(optimizer)
        held = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)
                if id(parameter) in exact}
        state = model.state_dict()
        state.update({name: exact[id(parameter)].view(parameter.shape)
                      for name, parameter in model.named_parameters(remove_duplicate=False) if name in held})
        trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        own = {"optimizer": optimizer.state_dict(),
               "buffers": {name: value for name, value in state.items() if name not in trained}}
        things: dict[str, Any] = {rank_file(ranks.rank, "pt"): own}
        if ranks.rank == 0:
            things[MODEL] = {"model": state, "more": more, **({"held": held} if held else {})}
        for name, thing in things.items():
            _refuse_unreadable(name, thing)
        return CheckpointFiles({name: lambda file, thing=thing: _write_tensor_file(thing, file)  # type: ignore[misc]
                                for name, thing in things.items()}, _describe_run(optimizer))

    protocol.save_together(ranks, folder, step, keep=keep, contents=contents)


def load_checkpoint(folder: str | os.PathLike[str], *, model: torch.nn.Module,
                    optimizer: torch.optim.Optimizer,
                    reset_per_rank_state: bool = False) -> LoadedCheckpoint | None:
    """Go on from the newest checkpoint in ``folder``, bit for bit. Every rank must call it.

    Call it after wrapping the optimizer; no broadcast is needed after it. Nothing is loaded before all
    ranks have checked their files, and nothing is unpickled but what ``weights_only=True`` takes.

    A checkpoint of another number of ranks is brought together: each rank takes the mean of all residuals and
    its slice of MeanSquare, and SENG recomputes its curvature at the next step. Each rank reads all files.

    Args:
        folder: as for ``save_checkpoint``, or one of the ``update-*`` folders in it.
        model: as it was when it was saved.
        optimizer: as it was when it was saved.
        reset_per_rank_state: take a checkpoint of other extensions, and start anew what they keep per
            rank (TopK's residuals, MeanSquare, SENG's curvature). The wrapped optimizer's moments are
            loaded, whichever rank kept them.

    Returns:
        The step and the further values saved with it; None where there is no checkpoint.

    Raises:
        DamagedCheckpointError: on all ranks, with the name of a file that was cut short or altered.
        ValueError: on all ranks; it is of another model or optimizer.
    """
    ranks = _collectives_of(optimizer)
    ranks.refuse_outside("hvd.load_checkpoint")
    found = protocol.find_checkpoint(ranks, folder, {**_describe_run(optimizer), "joins": True},
                                     reset_per_rank_state=reset_per_rank_state)
    if found is None:
        return None
    names = [MODEL, *_rank_files(ranks, found, optimizer)]

    same_owners = len(names) == 2 and found.ranks == ranks.size

    def parse(paths: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        read = {name: torch.load(path, map_location="cpu", weights_only=True)
                for name, path in paths.items()}
        own = read[rank_file(ranks.rank, "pt") if ranks.size == found.ranks else names[1]]
        state = {**read[MODEL]["model"], **(own["buffers"] if ranks.size == found.ranks else {})}
        _check_model(model, state)
        if same_owners and _downlink_of(optimizer) is not None:
            state.update(read[MODEL].get("held", {}))
        else:  # the model is w, and no rank holds anything else
            own["optimizer"].get(STATE_KEY, {}).get("server", {}).pop("reply", None)
        saved = own["optimizer"] if len(names) == 2 else _join_states(
            [read[name]["optimizer"] for name in names[1:]], own["optimizer"], optimizer)
        if ranks.size != found.ranks and STATE_KEY in saved:
            saved[STATE_KEY]["joined"] = [read[name]["optimizer"][STATE_KEY]["reducer"] for name in names[1:]]
        return state, saved, read[MODEL]["more"]

    state, saved, more = protocol.read_files(ranks, found, names, parse)

    def load() -> None:
        if hasattr(optimizer, "_hvd_ext"):
            optimizer.load_state_dict(saved, reset_per_rank_state=reset_per_rank_state)
        else:
            saved.pop(STATE_KEY, None)
            optimizer.load_state_dict(saved)
        model.load_state_dict(state)

    protocol.load_together(ranks, found, load)
    return LoadedCheckpoint(int(found.manifest["step"]), more)


def _collectives_of(optimizer: Any) -> Collectives:
    wrapper = getattr(optimizer, "_hvd_ext", None)
    return Collectives(None if wrapper is None else wrapper.collectives.process_set)


def _downlink_of(optimizer: Any) -> Any:
    return getattr(getattr(getattr(optimizer, "_hvd_ext", None), "server", None), "replies", None)


def _exact_weights(optimizer: Any) -> dict[int, torch.Tensor]:
    """The exact weights where replies are compressed, 1-D, by the parameter's ``id``; a collective there."""
    wrapper = getattr(optimizer, "_hvd_ext", None)
    if _downlink_of(optimizer) is None or not wrapper.collectives.is_member:
        return {}
    return dict(wrapper.server.gather_exact())


def _describe_run(optimizer: Any) -> dict[str, Any]:
    """What a run that goes on must have in common."""
    wrapper = getattr(optimizer, "_hvd_ext", None)
    extensions = "no extension" if wrapper is None else ", ".join(
        getattr(one, "saved_as", type(one).__name__) for one in (wrapper.reducer, wrapper.preconditioner)
        if one is not None)
    return {"front_end": "PyTorch", "optimizer": type(optimizer).__name__, "extensions": extensions,
            "server": _server_name(optimizer)}


def _server_name(optimizer: Any) -> str | None:
    server = getattr(getattr(optimizer, "_hvd_ext", None), "server", None)
    return None if server is None else str(server.where)


def _rank_files(ranks: Collectives, found: CheckpointRef, optimizer: Any) -> list[str]:
    """The files that this rank needs: its own, or all of them where moments are kept elsewhere now."""
    everyone = [rank_file(rank, "pt") for rank in range(found.ranks)]
    if found.ranks == ranks.size and found.manifest["server"] == _server_name(optimizer):
        return [everyone[ranks.rank]]
    return everyone


def _join_states(states: list[dict[str, Any]], own: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """One rank's optimizer state with the moments of all: whole ones, and those of pieces put together."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, Any] = {}
    pieces: dict[int, dict[int, Any]] = {}
    for state in states:
        mark = state.get(STATE_KEY, {}).get("server") or {}
        starts = {number: start for number, start, _ in mark.get("cut", ())}
        for number, one in state["state"].items():
            if number in starts:
                pieces.setdefault(number, {})[starts[number]] = one
            else:
                moments[number] = one
    moments.update({number: join_states([by_start[start] for start in sorted(by_start)], shapes[number])
                    for number, by_start in pieces.items()})
    joined = {**own, "state": moments}
    extensions = own.get(STATE_KEY)
    if extensions is not None and "server" in extensions:
        joined[STATE_KEY] = {**extensions, "server": {**extensions["server"], "owned": None, "cut": ()}}
    return joined


def _check_model(model: torch.nn.Module, saved: dict[str, Any]) -> None:
    """Refuse another model's state before any of it is loaded."""
    here = model.state_dict()
    odd = sorted(saved.keys() ^ here.keys())
    if odd:
        where = "in the checkpoint, not in the model" if odd[0] in saved else "not in the checkpoint"
        raise ValueError(f"{odd[0]} is {where}; build the model that was saved")
    for name, value in here.items():
        if isinstance(value, torch.Tensor):
            there = saved[name]
            if (there.shape, there.dtype) != (value.shape, value.dtype):
                raise ValueError(f"{name} is {tuple(there.shape)} {there.dtype} in the checkpoint and "
                                 f"{tuple(value.shape)} {value.dtype} here; build the model that was saved")


def _refuse_begun(optimizer: Any) -> None:
    wrapper = getattr(optimizer, "_hvd_ext", None)
    if wrapper is not None and wrapper.step_in_progress():
        raise ValueError("save_checkpoint was called after loss.backward() and before optimizer.step(); "
                         "save between two steps")


def _refuse_unreadable(name: str, thing: Any) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would; tensors are left out of the trial."""
    trial = io.BytesIO()
    try:
        torch.save(_without_tensors(thing), trial)
        trial.seek(0)
        torch.load(trial, weights_only=True)
    except Exception as error:
        known = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = known[1] if known else str(error).strip().splitlines()[0]
        raise TypeError(f"{name} would hold what torch.load(weights_only=True) refuses: {reason}; save "
                        "numbers, text, tensors, and lists and dicts of them") from error


def _without_tensors(thing: Any) -> Any:
    if isinstance(thing, torch.Tensor):
        return None
    if type(thing) in (list, tuple):
        return [_without_tensors(one) for one in thing]
    if type(thing) in (dict, OrderedDict):
        return {key: _without_tensors(value) for key, value in thing.items()}
    return thing


def _write_tensor_file(thing: Any, file: IO[bytes]) -> None:
    """``torch.save``; a failed write says the file system's reason, which torch leaves out."""
    watched = _Watched(file)
    try:
        torch.save(thing, watched)
    except Exception as error:
        raise (watched.failure or error) from None


class _Watched(io.RawIOBase):
    """A file that remembers why a write failed."""

    failure: OSError | None = None

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.failure = error
            raise
