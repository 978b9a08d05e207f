"""Nested state (dicts, lists, plain values and tensors) exchanged between ranks.

The structure travels as one pickled object, the tensors in flat buckets of one dtype and kind of device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch

from hvd_ext.reducers.buckets import DEFAULT_BUCKET_BYTES
from hvd_ext.torch.collectives import Collectives

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class TensorSpot:
    """Stands for a tensor in a structure: the ``number``-th one.

    Attributes:
        number: its place among the structure's tensors.
        shape: its shape.
        dtype: the name of its dtype, such as "float32".
        device: the kind of device it is on, such as "cpu".
    """

    number: int
    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()


def split_tensors(tree: Any) -> tuple[Any, list[torch.Tensor]]:
    """A structure with :class:`TensorSpot` in place of its tensors, and these, detached.

    Tensors that cannot lie in a flat bucket (sparse, complex, of other classes) stay in the structure.
    """
    tensors: list[torch.Tensor] = []

    def visit(thing: Any) -> Any:
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided \
                and thing.dtype in DTYPES:
            tensors.append(thing.detach())
            return TensorSpot(len(tensors) - 1, tuple(thing.shape), str(thing.dtype).removeprefix("torch."),
                              thing.device.type)
        if isinstance(thing, dict):
            return {key: visit(value) for key, value in thing.items()}
        if type(thing) in (list, tuple):
            return type(thing)(visit(value) for value in thing)
        return thing

    return visit(tree), tensors


def join_tensors(structure: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The structure that :func:`split_tensors` took apart."""
    if isinstance(structure, TensorSpot):
        return tensors[structure.number]
    if isinstance(structure, dict):
        return {key: join_tensors(value, tensors) for key, value in structure.items()}
    if type(structure) in (list, tuple):
        return type(structure)(join_tensors(value, tensors) for value in structure)
    return structure


def broadcast_state(collectives: Collectives, tree: Any, root: int, name: str) -> Any:
    """The tree of member ``root`` of the process set, on every rank; a collective.

    Args:
        tree: of the root; what other ranks pass is not looked at.
        name: of the messages in Horovod's timeline.
    """
    mine = collectives.rank == root
    structure, tensors = split_tensors(tree) if mine else (None, [])
    told = collectives.broadcast_object(cloudpickle.dumps(structure) if mine else b"", root, name)
    if not mine:
        structure = cloudpickle.loads(told)
    found: dict[int, torch.Tensor] = dict(enumerate(tensors))
    for number, bucket in enumerate(_plan_buckets(_find_spots(structure))):
        flat = _flatten(bucket, tensors) if mine else _empty_buffer(bucket)
        collectives.broadcast_async_(flat, root, f"{name}/bucket{number}", kind="objects").wait()
        if not mine:
            found.update(_cut_buffer(flat, bucket))
    return tree if mine else join_tensors(structure, [found[number] for number in range(len(found))])


def gather_states(collectives: Collectives, tree: Any, name: str) -> list[Any]:
    """Every rank's tree, by rank; a collective."""
    if collectives.size == 1:
        return [tree]
    structure, tensors = split_tensors(tree)
    structures = collectives.allgather_object(structure, name)
    by_rank = [_by_kind(_find_spots(one)) for one in structures]
    found: list[dict[int, torch.Tensor]] = [{} for _ in structures]
    for kind in dict.fromkeys(kind for one in by_rank for kind in one):
        buckets = [one.get(kind, []) for one in by_rank]
        for number in range(max(map(len, buckets))):
            here = [one[number] if number < len(one) else [] for one in buckets]
            own = here[collectives.rank]
            flat = _flatten(own, tensors) if own else _empty_of(kind, 0)
            gathered = collectives.allgather_async(flat, f"{name}/{'.'.join(kind)}{number}",
                                                   kind="objects").wait()
            sizes = [sum(spot.numel for spot in bucket) for bucket in here]
            for rank, (part, bucket) in enumerate(zip(gathered.split(sizes), here, strict=True)):
                found[rank].update(_cut_buffer(part, bucket))
    return [join_tensors(one, [tensors[number] for number in range(len(tensors))])
            for one, tensors in zip(structures, found, strict=True)]


def _find_spots(structure: Any) -> list[TensorSpot]:
    if isinstance(structure, TensorSpot):
        return [structure]
    if isinstance(structure, dict):
        return [spot for value in structure.values() for spot in _find_spots(value)]
    if type(structure) in (list, tuple):
        return [spot for value in structure for spot in _find_spots(value)]
    return []


Kind = tuple[str, str]  # dtype and kind of device


def _by_kind(spots: Sequence[TensorSpot]) -> dict[Kind, list[list[TensorSpot]]]:
    """Buckets of at most ``DEFAULT_BUCKET_BYTES``, or of one tensor, by kind."""
    found: dict[Kind, list[list[TensorSpot]]] = {}
    room: dict[Kind, int] = {}
    for spot in spots:
        kind = (spot.dtype, spot.device)
        size = spot.numel * getattr(torch, spot.dtype).itemsize
        if size > room.get(kind, 0):
            found.setdefault(kind, []).append([])
            room[kind] = DEFAULT_BUCKET_BYTES
        room[kind] = room.get(kind, 0) - size
        found.setdefault(kind, [[]])[-1].append(spot)
    return found


def _plan_buckets(spots: Sequence[TensorSpot]) -> list[list[TensorSpot]]:
    return [bucket for buckets in _by_kind(spots).values() for bucket in buckets]


def _empty_of(kind: Kind, numel: int) -> torch.Tensor:
    return torch.empty(numel, dtype=getattr(torch, kind[0]), device=kind[1])


def _empty_buffer(bucket: Sequence[TensorSpot]) -> torch.Tensor:
    return _empty_of((bucket[0].dtype, bucket[0].device), sum(spot.numel for spot in bucket))


def _flatten(bucket: Sequence[TensorSpot], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    flat, at = _empty_buffer(bucket), 0
    for spot in bucket:
        flat[at : at + spot.numel].view(spot.shape).copy_(tensors[spot.number])
        at += spot.numel
    return flat


def _cut_buffer(flat: torch.Tensor, bucket: Sequence[TensorSpot]) -> dict[int, torch.Tensor]:
    """The bucket's tensors, each in memory of its own."""
    sizes = [spot.numel for spot in bucket]
    return {spot.number: part.clone().view(spot.shape)
            for spot, part in zip(bucket, flat.split(sizes), strict=True)} if bucket else {}
