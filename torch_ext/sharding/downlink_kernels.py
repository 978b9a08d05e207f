"""What compressed replies compute on tensors: pack, read, add to the weights. No collectives, no state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvd_ext.reducers.topk import Layout, TopK
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.reducers.topk.wire import HEADER_WORDS
from hvd_ext.sharding import Shard
from hvd_ext.sharding.downlink import FAILED
from hvd_ext.torch.reducers.kernels import topk

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_entries(difference: torch.Tensor, segments: Sequence[Segment], layout: Layout, config: TopK,
                 seed: tuple[int, ...]) -> torch.Tensor:
    """The largest entries of ``difference`` as one message, (layout.words,) int32.

    Args:
        difference: w - w^ of what the owner has of a bucket, 1-D, float32 or float64, finite; changed.
        segments: what is chosen from.
        seed: of a sampled selection.
    """
    positions = topk.select_entries(difference, segments, config, seed)
    values = topk.split_selected(difference, positions, topk.wire_dtype(config))
    return topk.pack_message(positions, values, layout)


def failed_entries(layout: Layout, device: torch.device) -> torch.Tensor:
    """A message as long as another one, which says that the owner's update failed."""
    words = torch.zeros(layout.words, dtype=torch.int32, device=device)
    words[0], words[1] = FAILED, layout.k
    return words


def read_headers(received: torch.Tensor, starts: Sequence[int]) -> list[list[int]]:
    """(count, k) of the messages that begin at ``starts``."""
    places = torch.tensor([[start, start + 1] for start in starts], device=received.device)
    return received[places].tolist()  # type: ignore[no-any-return]


def entries_of_pieces(words: torch.Tensor, layout: Layout, dtype: torch.dtype, count: int,
                      part: Sequence[Shard]) -> list[tuple[Shard, torch.Tensor, torch.Tensor]]:
    """The entries of a message by the piece that they belong to.

    Returns:
        For each piece that has any: it, positions in its flattened tensor (int64), values.
    """
    assert words.numel() >= HEADER_WORDS
    positions, values = topk.unpack_message(words, layout, dtype, count)
    begin = part[0].offset if part else 0
    ends = torch.tensor([piece.offset - begin + piece.numel for piece in part], dtype=torch.int32,
                        device=positions.device)
    found, first = [], 0
    for piece, last in zip(part, torch.searchsorted(positions, ends).tolist(), strict=True):
        if last > first:
            inside = positions[first:last].long() + (begin - piece.offset + piece.start)
            found.append((piece, inside, values[first:last]))
        first = last
    return found


def add_entries(flat: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> None:
    """Add values at positions, each of which is there once, to the weights; the same bits on every rank."""
    wide = wide_dtype(flat.dtype)
    flat[positions] = flat[positions].to(wide).add_(values.to(wide)).to(flat.dtype)


def pack_half(difference: torch.Tensor, failed: bool) -> torch.Tensor:
    """``difference`` in float16, and behind it whether the owner's update failed, (numel + 1,).

    What is beyond float16's range is cut off, and goes with what is sent later.
    """
    message = torch.zeros(difference.numel() + 1, dtype=torch.float16, device=difference.device)
    if failed:
        message[-1] = 1.0
        return message
    limit = torch.finfo(torch.float16).max
    message[:-1] = difference.clamp(-limit, limit)
    return message


def add_half(flat: torch.Tensor, values: torch.Tensor) -> None:
    """Add a float16 reply to the weights of a piece, in place."""
    flat.copy_(flat.to(wide_dtype(flat.dtype)).add_(values))


def weight_difference(exact: torch.Tensor, held: torch.Tensor, out: torch.Tensor) -> None:
    """Write w - w^ into ``out``; all are 1-D."""
    torch.sub(exact.to(out.dtype), held.to(out.dtype), out=out)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights are subtracted and added up in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def bit_sum(flat: torch.Tensor) -> torch.Tensor:
    """A sum of the bits of a 1-D tensor, 8 bytes at a time, 0-D int64: where it is another one, bits are."""
    if flat.storage_offset() * flat.element_size() % 8:  # 8 bytes at a time are quick, and aligned
        flat = flat.clone()
    paired = flat.numel() - flat.numel() % (8 // flat.element_size())
    rest = flat[paired:].view(WORDS[flat.element_size()]).sum(dtype=torch.int64)
    return flat[:paired].view(torch.int64).sum() + rest
