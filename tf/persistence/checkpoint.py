"""Checkpoints of synchronous training: the model, the optimizer and what each rank keeps.

``folder/update-000000001000/`` holds ``model.npz`` (the model, of rank 0) and ``rank0003.npz`` of each
rank: its optimizer's variables, those of the extensions, and the model's variables that no gradient changes,
which differ by rank. The user's values are in the manifest. Where a server's replies are compressed the model
is w, the exact weights, and what the ranks held of it, w^, lies beside it.
:mod:`hvd_ext.checkpoint.protocol` says when a checkpoint counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import keras
import numpy as np

from hvd_ext.checkpoint import protocol
from hvd_ext.checkpoint.protocol import CheckpointFiles, CheckpointRef, LoadedCheckpoint, rank_file
from hvd_ext.tensorflow.belonging import is_kept, whole_shape
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.keras_hooks import distributed_part, require_tensorflow_backend, wrapper_of
from hvd_ext.tensorflow.persistence import keras_checkpoint_layout
from hvd_ext.tensorflow.persistence.state_join import join_state
from hvd_ext.tensorflow.variables import as_tf, name_of

MODEL = "model.npz"
HELD = "held/"  # before the name of what the ranks held of a variable


def save_checkpoint(folder: str | os.PathLike[str], step: int, *, model: keras.Model, optimizer: Any,
                    keep: int = 3, **more: Any) -> None:
    """Save a training as it is between two steps, whole or not at all. Every rank must call it.

    When it returns, the checkpoint is on the disk. A rank that fails or dies leaves the one before.

    Args:
        folder: on a file system that all hosts share; empty, or one that this run has loaded from.
        step: of the training, above that of the last checkpoint.
        model: what is trained, built.
        optimizer: its optimizer, built, distributed or not.
        keep: how many checkpoints of this run stay, at least 1.
        more: further values that ``load_checkpoint`` gives back, of rank 0: numbers, text, and lists
            and dicts (with text as keys) of them, such as ``epoch=3``.

    Raises:
        ValueError, TypeError: on all ranks, for bad arguments, a folder with another run's checkpoints,
            or values that JSON does not give back as they were.
        CheckpointNotWrittenError: on all ranks, when one cannot write its file, with its reason.
    """
    require_tensorflow_backend("hvd.save_checkpoint")
    optimizer = _with_loss_scale(model, optimizer)
    ranks = _collectives_of(optimizer)
    ranks.refuse_outside("hvd.save_checkpoint")
    exact = {} if _downlink_of(optimizer) is None else _downlink_of(optimizer).gather_exact()

    def contents() -> CheckpointFiles:
        _refuse_unbuilt(model, optimizer)
        for name, value in more.items():
            _refuse_unlike_json(name, value)
        arrays = {rank_file(ranks.rank, "npz"): _read_values(_own_state(model, optimizer))}
        if ranks.rank == 0:
            arrays[MODEL] = _read_values(_model_state(model))
            for name, one in _model_state(model).items():
                if id(as_tf(one)) in exact:
                    arrays[MODEL][HELD + name] = arrays[MODEL][name]
                    arrays[MODEL][name] = exact[id(as_tf(one))]
        return CheckpointFiles({name: lambda file, one=one: _write_arrays(one, file)  # type: ignore[misc]
                                for name, one in arrays.items()}, {
            **_describe_run(optimizer), "state": _state_numbers(optimizer), "more": more})

    protocol.save_together(ranks, folder, step, keep=keep, contents=contents)


def load_checkpoint(folder: str | os.PathLike[str], *, model: keras.Model, optimizer: Any,
                    reset_per_rank_state: bool = False) -> LoadedCheckpoint | None:
    """Go on from the newest checkpoint in ``folder``, bit for bit. Every rank must call it.

    Call it after the model was compiled, or the optimizer built; no broadcast is needed after it. Nothing
    is loaded before all ranks have checked their files, and nothing is unpickled.

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
    require_tensorflow_backend("hvd.load_checkpoint")
    optimizer = _with_loss_scale(model, optimizer)
    ranks = _collectives_of(optimizer)
    ranks.refuse_outside("hvd.load_checkpoint")
    found = protocol.find_checkpoint(ranks, folder, {**_describe_run(optimizer), "joins": True},
                                     reset_per_rank_state=reset_per_rank_state)
    if found is None:
        return None
    same = ranks.size == found.ranks and found.manifest["server"] == _server_name(optimizer) and not \
        (reset_per_rank_state and found.manifest["extensions"] != _describe_run(optimizer)["extensions"])
    files = [rank_file(ranks.rank, "npz")] if same else \
        [rank_file(rank, "npz") for rank in range(found.ranks)]

    state_of_extensions: list[tuple[Any, Any]] = []
    counters: list[int] = []

    def parse(paths: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        _refuse_unbuilt(model, optimizer)
        read = {name: _read_arrays(path) for name, path in paths.items()}
        own = read[files[0]] if same else _join_states(optimizer, found, [read[name] for name in files])
        if not same and not reset_per_rank_state:
            everyone = [read[name] for name in files]
            state_of_extensions[:] = _join_extensions(
                optimizer, found, everyone if ranks.size != found.ranks else [everyone[ranks.rank]])
            counters[:] = _saved_counters(optimizer, everyone[0])
        saved = {k: v for k, v in read[MODEL].items() if not k.startswith(HELD)}
        if same:  # w is among the optimizer's variables
            saved.update({k.removeprefix(HELD): v for k, v in read[MODEL].items() if k.startswith(HELD)})
        state = {**saved, **{k: v for k, v in own.items() if k in saved}} if same else saved
        _check_values(_model_state(model), state)
        if same:
            _check_values(_own_state(model, optimizer), own)
        return state, own

    state, own = protocol.read_files(ranks, found, [MODEL, *files], parse)

    def load() -> None:
        if same:
            _load_own(model, optimizer, own, reset_per_rank_state)
        else:
            _load_joined(optimizer, own)
            for variable, value in state_of_extensions:
                variable.assign(value)
            if counters:
                wrapper_of(optimizer).preconditioner.load_shared_state(counters)
        _assign_values(_model_state(model), state)

    protocol.load_together(ranks, found, load)
    return LoadedCheckpoint(int(found.manifest["step"]), dict(found.manifest["more"]))


def _with_loss_scale(model: keras.Model, optimizer: Any) -> Any:
    """The ``LossScaleOptimizer`` that ``model.compile`` put around the optimizer; else the optimizer."""
    outer = getattr(model, "optimizer", None)
    if not isinstance(outer, keras.optimizers.LossScaleOptimizer) or outer.inner_optimizer is not optimizer:
        return optimizer
    if optimizer.built and not outer.built:
        outer.build(model.trainable_variables)
    return outer


def _collectives_of(optimizer: Any) -> Collectives:
    wrapper = wrapper_of(optimizer)
    return Collectives(None if wrapper is None else wrapper.collectives.process_set)


def _describe_run(optimizer: Any) -> dict[str, Any]:
    """What a run that goes on must have in common."""
    wrapper = wrapper_of(optimizer)
    extensions = "no extension" if wrapper is None else ", ".join(
        getattr(one, "saved_as", type(one).__name__) for one in (wrapper.reducer, wrapper.preconditioner)
        if one is not None)
    return {"front_end": "TensorFlow", "optimizer": type(optimizer).__name__, "extensions": extensions,
            "server": _server_name(optimizer)}


def _server_name(optimizer: Any) -> str | None:
    server = getattr(wrapper_of(optimizer), "server", None)
    return None if server is None else str(server.saved_as)


def _downlink_of(optimizer: Any) -> Any:
    return getattr(getattr(wrapper_of(optimizer), "server", None), "replies", None)


# The variables, under the names that they have in the files


def _model_state(model: keras.Model) -> dict[str, Any]:
    return {f"model/{number}": one for number, one in enumerate(model.variables)}


def _own_state(model: keras.Model, optimizer: Any) -> dict[str, Any]:
    """What may differ by rank: all of the optimizer, and of the model what no gradient changes."""
    trained = {id(as_tf(one)) for layer in model._flatten_layers() for one in layer._trainable_variables}
    return {**_optimizer_state(optimizer), **_preconditioner_state(optimizer),
            **{name: one for name, one in _model_state(model).items() if id(as_tf(one)) not in trained}}


def _optimizer_state(optimizer: Any) -> dict[str, Any]:
    distributed = distributed_part(optimizer)
    return {f"optimizer/{number}": one for number, one in enumerate(optimizer.variables)
            if distributed is None or is_kept(distributed, one)}


def _preconditioner_state(optimizer: Any) -> dict[str, Any]:
    preconditioner = getattr(wrapper_of(optimizer), "preconditioner", None)
    return {} if preconditioner is None else {
        f"preconditioner/{number}": one for number, one in enumerate(preconditioner.variables)}


def _read_values(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {name: as_tf(one).numpy() for name, one in variables.items()}


def _assign_values(variables: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for name, variable in variables.items():
        as_tf(variable).assign(_as_saved(values[name], variable))


def _as_saved(value: Any, variable: Any) -> Any:
    """The bits under the variable's dtype: a file knows bfloat16 only as two bytes."""
    dtype = as_tf(variable).dtype.as_numpy_dtype
    return value.view(dtype) if value.dtype.kind == "V" else value


def _load_own(model: keras.Model, optimizer: Any, own: dict[str, Any], reset: bool) -> None:
    """This rank's file, on as many ranks and with the same server as it was saved."""
    if not reset:
        _assign_values(_own_state(model, optimizer), own)
        return
    distributed = distributed_part(optimizer)
    _assign_values(_optimizer_state(optimizer), own)
    if distributed is not None:
        distributed.reset_per_rank_state()
        distributed._hvd_ext.stamp_rank()
    _reset_preconditioner(optimizer)


def _join_states(optimizer: Any, found: CheckpointRef, files: list[dict[str, Any]]) -> dict[str, Any]:
    """The plain optimizer's state from all ranks' files: of each variable, that of a rank that kept it.

    Raises:
        ValueError: the variables are of another optimizer or model.
    """
    distributed = distributed_part(optimizer)
    known = list(optimizer.variables) if distributed is None else [
        one for one in optimizer.variables
        if id(as_tf(one)) not in {id(as_tf(extra)) for extra in list(
            distributed.variables)[distributed._hvd_ext.plain_count:]}]
    references = {} if distributed is None else distributed._hvd_ext.references
    joined = {}
    for number, variable in enumerate(known):
        _, kind = references.get(id(as_tf(variable)), (None, ""))
        shape = tuple(variable.shape) if distributed is None else whole_shape(distributed, variable)
        saved = [file[f"optimizer/{number}"] for file in files if f"optimizer/{number}" in file]
        whole = [one for one in saved if one.shape == shape]
        if not whole and sum(one.size for one in saved) == np.prod(shape):  # pieces, by rank
            whole = [np.concatenate([one.ravel() for one in saved]).reshape(shape)]
        if not whole:
            raise ValueError(f"no file of {found.folder} has a state {number} of shape {shape} for "
                             f"{name_of(variable)}; build the model and optimizer that were saved")
        value = whole[0]
        joined[str(number)] = np.zeros_like(value) if kind == keras_checkpoint_layout.ACCUMULATOR else value
    return joined


def _state_numbers(optimizer: Any) -> dict[str, int]:
    """Under which number a file has each variable of the reducer's state."""
    wrapper = wrapper_of(optimizer)
    numbers = {id(as_tf(one)): number for number, one in enumerate(optimizer.variables)}
    return {} if wrapper is None else {
        one.name: numbers[id(as_tf(one.variable))] for one in wrapper.reducer.declared_state()}


def _join_extensions(optimizer: Any, found: CheckpointRef,
                     files: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """The reducer's state as this rank goes on with it, from the files of the ranks that saved it.

    Raises:
        ValueError: an earlier version saved it, without names.
    """
    wrapper = wrapper_of(optimizer)
    if wrapper is None or not wrapper.reducer.declared_state():
        return []
    if "state" not in found.manifest:
        raise ValueError(f"{found.folder} was saved by {found.ranks} ranks and an earlier version, whose "
                         "files do not name the state that extensions keep; load it on as many ranks, or "
                         "pass reset_per_rank_state=True to start that state anew")
    names = {f"optimizer/{number}": name for name, number in found.manifest["state"].items()}
    return join_state(wrapper.reducer, [{names[key]: value for key, value in file.items() if key in names}
                                        for file in files])


def _saved_counters(optimizer: Any, file: dict[str, Any]) -> list[int]:
    """SENG's counters in a file; none where there is no SENG here or there."""
    preconditioner = getattr(wrapper_of(optimizer), "preconditioner", None)
    if preconditioner is None or "preconditioner/0" not in file:
        return []
    numbers = {id(as_tf(one)): number for number, one in enumerate(preconditioner.variables)}
    return [int(file[f"preconditioner/{numbers[id(as_tf(one))]}"])
            for one in (preconditioner.steps, preconditioner.skipped)]


def _load_joined(optimizer: Any, joined: dict[str, Any]) -> None:
    """Of the plain optimizer's state, what this rank is to keep; the extensions start anew."""
    distributed = distributed_part(optimizer)
    if distributed is None:
        for number, variable in enumerate(optimizer.variables):
            as_tf(variable).assign(_as_saved(joined[str(number)], variable))
        return
    outer = len(optimizer.variables) - len(distributed.variables)  # of a LossScaleOptimizer, which come first
    for number, variable in enumerate(list(optimizer.variables)[:outer]):
        as_tf(variable).assign(_as_saved(joined[str(number)], variable))
    keras_checkpoint_layout.load_plain(distributed,
                                       {str(int(number) - outer): value for number, value in joined.items()
                                        if int(number) >= outer})
    _reset_preconditioner(optimizer)


def _reset_preconditioner(optimizer: Any) -> None:
    preconditioner = getattr(wrapper_of(optimizer), "preconditioner", None)
    if preconditioner is not None:
        preconditioner.reset_state()


def _refuse_unbuilt(model: keras.Model, optimizer: Any) -> None:
    if not model.built or not optimizer.built:
        raise ValueError(f"the {'optimizer' if model.built else 'model'} is not built yet: call the model on "
                         "a batch, and optimizer.build(model.trainable_variables), first")


def _check_values(variables: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse another model's state before any of it is loaded."""
    for name, variable in variables.items():
        if name not in values:
            raise ValueError(f"{name_of(variable)} is not in the checkpoint; build the model that was saved")
        saved, here = _as_saved(values[name], variable), as_tf(variable)
        expected = here.dtype.as_numpy_dtype
        if not here.shape.is_compatible_with(saved.shape) or saved.dtype != expected:
            raise ValueError(f"{name_of(variable)} is {saved.shape} {saved.dtype} in the checkpoint and "
                             f"{tuple(here.shape)} {np.dtype(expected)} here; build the model that was saved")
    odd = [name for name in values if name not in variables]
    if odd:
        raise ValueError(f"the checkpoint has {len(values)} variables, of which {odd[0]} is not here; build "
                         "the model that was saved")


def _refuse_unlike_json(name: str, value: Any) -> None:
    """Refuse what JSON would not give back as it was."""
    if isinstance(value, dict) and all(type(key) is str for key in value):
        parts: Iterable[Any] = value.values()
    elif type(value) is list:
        parts = value
    elif value is None or isinstance(value, bool | int | float | str):
        return
    else:
        raise TypeError(f"{name} would hold {value!r}, which JSON does not give back as it is; save numbers, "
                        "text, and lists and dicts (with text as keys) of them")
    for part in parts:
        _refuse_unlike_json(name, part)


def _write_arrays(arrays: dict[str, Any], file: IO[bytes]) -> None:
    np.savez(file, allow_pickle=False, **arrays)


def _read_arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
