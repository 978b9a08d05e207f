"""Walks over the state that a reducer declares (:mod:`hvd_ext.state`): save, check, load, bring together.

A reducer may have a reducer inside, whose state is part of its own: ``declared_state()`` gives each part with
the reducer that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hvd_ext.reducers.buckets import Bucket, slice_sizes
from hvd_ext.state import BUCKETS, GATHER, MEAN, NUMBER, OWN, PARAMETERS, SHARD, SHARED, Part
from hvd_ext.torch.collectives import Handle

if TYPE_CHECKING:
    from hvd_ext.torch.reducers.base import Reducer
    from hvd_ext.torch.reducers.buckets import BucketReducer

State = dict[str, Any]
START_NEW = "or pass reset_per_rank_state=True to begin without"


def save_state(reducer: Reducer, *, shared_only: bool = False) -> State:
    """A copy of all parts, or of the shared ones, by name."""
    return {part.name: _save_part(holder, part) for holder, part in reducer.declared_state()
            if part.scope == SHARED or not shared_only}


def check_state(reducer: Reducer, state: State, *, ranks: int | None = None, rank: int | None = None) -> None:
    """Refuse a saved state that does not fit, before anything is changed.

    Args:
        reducer: the one that is going to load it.
        state: as saved.
        ranks, rank: where it was saved; None: here.

    Raises:
        ValueError: it is of another model or other settings.
    """
    for holder, part in reducer.declared_state():
        saved = state.get(part.name)
        if saved is None or part.layout == NUMBER:
            continue
        if part.layout == OWN:
            getattr(holder, part.attribute).check_state_dict(saved)
        else:
            _check_tensors(holder, part, saved, ranks, rank)  # type: ignore[arg-type]


def load_state(reducer: Reducer, state: State) -> None:
    """Take what a saved state holds of every part; what it lacks begins new."""
    for holder, part in reducer.declared_state():
        _load_part(holder, part, state.get(part.name))


def load_shared(reducer: Reducer, state: State) -> None:
    """Take the shared parts of a saved state, and leave the others as they are."""
    for holder, part in reducer.declared_state():
        if part.scope == SHARED and part.name in state:
            _load_part(holder, part, state[part.name])


def average_state(reducer: Reducer) -> None:
    """Give every rank the mean over the ranks of what is to be averaged; a collective.

    The mean of the reduced gradients lacks the mean of the residuals: with that on each of any number of
    ranks it is what it was, whoever leaves or joins.
    """
    handles: list[Handle] = []
    for holder, part, bucket in _averaged(reducer):
        kept = _unscaled(holder, part, bucket)
        handles.append(holder.collectives.without_counting().allreduce_async_(
            kept, f"{holder.prefix}/{part.name}{bucket.index}", kind=part.label or part.name))
    for handle in handles:
        handle.wait()
    _set_unscaled(reducer)


def gather_slices(reducer: Reducer, state: State) -> State:
    """A saved state with whole buckets in place of this rank's slices of them; a collective."""
    if reducer.collectives.size == 1:
        return state
    gathering: dict[str, dict[int, Handle]] = {}
    for holder, part in reducer.declared_state():
        if part.resize == GATHER:
            gathering[part.name] = {index: holder.collectives.without_counting().allgather_async(
                own, f"{holder.prefix}/{part.name}{index}", kind=part.label or part.name)  # type: ignore[attr-defined]
                for index, own in sorted(state[part.name].items())}
    return {**state, **{name: {index: one.wait() for index, one in handles.items()}
                        for name, handles in gathering.items()}}


def cut_slices(reducer: Reducer, state: State) -> State:
    """A state with this rank's slices in place of whole buckets."""
    cut = {}
    for holder, part in reducer.declared_state():
        if part.resize == GATHER:
            ranks, rank = place_of(holder)
            cut[part.name] = {index: whole.split(slice_sizes(whole.numel(), ranks))[rank]
                              for index, whole in state.get(part.name, {}).items()}
    return {**state, **cut}


def join_states(reducer: Reducer, states: Sequence[State]) -> None:
    """Go on from the states of all ranks that saved, however many there were and are.

    Args:
        reducer: the one that takes them.
        states: by rank.
    """
    totals: dict[tuple[str, int], torch.Tensor] = {}
    for state in states:
        load_state(reducer, {**state, **{part.name: None for _, part in reducer.declared_state()
                                         if part.scope == SHARD}})
        reducer.fold_local_state()
        for holder, part, bucket in _averaged(reducer):
            share = _unscaled(holder, part, bucket) / len(states)
            key = part.name, bucket.index
            totals[key] = totals[key] + share if key in totals else share
        _set_unscaled(reducer)
    for holder, part, bucket in _averaged(reducer):
        getattr(holder, part.attribute)[bucket.index] = totals[part.name, bucket.index]
    whole = {part.name: {index: torch.cat([state[part.name][index] for state in states])
                         for index in states[0].get(part.name, {})}
             for _, part in reducer.declared_state() if part.scope == SHARD}
    slices = cut_slices(reducer, whole)
    for holder, part in reducer.declared_state():
        if part.scope == SHARD:
            _load_part(holder, part, slices[part.name])


def held_labels(reducer: Reducer) -> list[str]:
    """What this rank holds that no other has, for a message."""
    return [part.label for holder, part in reducer.declared_state()
            if part.scope != SHARED and part.label and state_tensors(holder, part)]


def state_tensors(holder: Reducer, part: Part) -> list[torch.Tensor]:
    """The tensors of a part."""
    if part.layout == NUMBER:
        return []
    value = getattr(holder, part.attribute)
    return list(value.state_tensors() if part.layout == OWN else value.values())


def place_of(holder: Reducer) -> tuple[int, int]:
    """How many ranks share a whole, and this one's number; outside of the process set it is alone."""
    collectives = holder.collectives
    return (collectives.size, collectives.rank) if collectives.is_member and collectives.size else (1, 0)


def _save_part(holder: Reducer, part: Part) -> Any:
    value = getattr(holder, part.attribute)
    if part.layout == NUMBER:
        return value
    if part.layout == OWN:
        return value.state_dict()
    if part.layout == BUCKETS:
        return {index: tensor.clone() for index, tensor in sorted(value.items())}
    by_name = _by_parameter(holder, _with_zeros(holder, part))  # type: ignore[arg-type]
    return {name: piece.clone() for name, piece in by_name}


def _with_zeros(holder: BucketReducer, part: Part) -> dict[int, torch.Tensor]:
    """A part's tensors, with zeros for buckets that have joined since the last step."""
    kept: dict[int, torch.Tensor] = getattr(holder, part.attribute)
    return {bucket.index: kept[bucket.index] if bucket.index in kept
            else torch.zeros(bucket.numel, **holder.state_options(bucket))
            for bucket in holder.buckets if holder.keeps_part(part, bucket)} if kept else {}


def _load_part(holder: Reducer, part: Part, saved: Any) -> None:
    if part.layout == NUMBER:
        setattr(holder, part.attribute, part.start if saved is None else saved)
    elif part.layout == OWN:
        getattr(holder, part.attribute).load_state_dict(saved)
    else:
        setattr(holder, part.attribute,
                _load_tensors(holder, part, saved) if saved else {})  # type: ignore[arg-type]


def _load_tensors(holder: BucketReducer, part: Part,
                  saved: dict[Any, torch.Tensor]) -> dict[int, torch.Tensor]:
    buckets = [bucket for bucket in holder.buckets if holder.keeps_part(part, bucket)]
    if part.layout == BUCKETS:
        return {bucket.index: saved[bucket.index].to(**holder.state_options(bucket), copy=True)
                for bucket in buckets if bucket.index in saved}
    flats = {bucket.index: torch.zeros(bucket.numel, **holder.state_options(bucket)) for bucket in buckets}
    for name, piece in _by_parameter(holder, flats):
        piece.copy_(saved[name])
    return flats


def _check_tensors(holder: BucketReducer, part: Part, saved: dict[Any, torch.Tensor],
                   ranks: int | None, rank: int | None) -> None:
    if not saved:
        return
    buckets = [bucket for bucket in holder.buckets if holder.keeps_part(part, bucket)]
    if part.layout == PARAMETERS:
        expected = {holder.entries[slot.index].name: slot.numel
                    for bucket in buckets for slot in bucket.slots}
    else:
        expected = {bucket.index: holder.state_numel(part, bucket) for bucket in buckets}
        if part.scope == SHARD:
            here = place_of(holder)
            ranks, rank = here if ranks is None or rank is None else (ranks, rank)
            expected = {index: slice_sizes(numel, ranks)[rank] for index, numel in expected.items()}
        expected = {index: numel for index, numel in expected.items() if index in saved}
    found = {key: tensor.numel() for key, tensor in saved.items()}
    if found != expected:
        odd = sorted((key for key in {*found, *expected} if found.get(key) != expected.get(key)), key=str)
        first = f"bucket {odd[0]}" if part.layout == BUCKETS else odd[0]
        sizes = f"{first} has {found.get(odd[0], 'no')} elements in it and {expected.get(odd[0], 'no')} here"
        raise ValueError(
            f"the checkpoint's {part.label or part.name} do not fit this model: {sizes} ({len(odd)} differ). "
            f"Use the model and the {type(holder.settings).__name__} settings that it was saved with "
            f"(exclude=, rank=, bucket_bytes= and groups= among them), {START_NEW}")


def _by_parameter(holder: BucketReducer, flats: dict[int, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(holder.entries[slot.index].name, slot.slice_of(flats[bucket.index])) for bucket in holder.buckets
            if bucket.index in flats for slot in bucket.slots]


def _averaged(reducer: Reducer) -> Iterator[tuple[BucketReducer, Part, Bucket]]:
    for holder, part in reducer.declared_state():
        if part.resize == MEAN:
            for bucket in holder.buckets:  # type: ignore[attr-defined]
                if holder.keeps_part(part, bucket):  # type: ignore[attr-defined]
                    yield holder, part, bucket  # type: ignore[misc]


def _unscaled(holder: BucketReducer, part: Part, bucket: Bucket) -> torch.Tensor:
    """This rank's tensor without the loss scale, in the same memory; zeros where there is none."""
    tensors = getattr(holder, part.attribute)
    if bucket.index not in tensors:
        tensors[bucket.index] = torch.zeros(holder.state_numel(part, bucket), **holder.state_options(bucket))
    elif part.scaled and holder.state_scale != 1.0:
        tensors[bucket.index].div_(holder.state_scale)
    return tensors[bucket.index]


def _set_unscaled(reducer: Reducer) -> None:
    for holder, part in reducer.declared_state():
        if part.scaled:
            holder.state_scale = 1.0

