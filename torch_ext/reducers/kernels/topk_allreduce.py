"""What the sparse allreduce computes on tensors: sort entries by owner, add up, choose, scatter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from hvd_ext.reducers.topk import Layout, TopK, allreduce
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.torch.reducers.kernels import topk as kernels


def for_owners(bounds: allreduce.Bounds, positions: torch.Tensor, values: torch.Tensor,
               name: str) -> tuple[torch.Tensor, list[Layout]]:
    """One message for each owner, one after another, and their layouts.

    Args:
        bounds: (M + 1,), who owns what.
        positions: (k,) int64, rising.
        values: (k,) of the wire's dtype.
        name: of that dtype.
    """
    inner = torch.from_numpy(bounds[1:-1]).to(positions.device)
    cuts = [0, *torch.searchsorted(positions, inner).tolist(), positions.numel()]
    layouts = [Layout(stop - start, name) for start, stop in itertools.pairwise(cuts)]
    return torch.cat([
        kernels.pack_message(positions[start : start + layout.k], values[start : start + layout.k], layout)
        for start, layout in zip(cuts, layouts, strict=False)]), layouts


def unpack_messages(words: torch.Tensor, config: TopK, ranks: int,
                    what: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Places and values of each rank's message, in the order of the ranks."""
    readable = words.numpy() if words.device.type == "cpu" else words
    for at, layout in allreduce.message_layouts(readable, config.values, ranks, what):
        yield kernels.unpack_message(words[at : at + layout.words], layout, kernels.wire_dtype(config))


def sum_up(messages: torch.Tensor, residual: torch.Tensor | None, rescale: float, low: int,
           mean: torch.Tensor, edges: allreduce.Bounds, ranks: int, k_out: int, config: TopK,
           what: str) -> tuple[torch.Tensor, allreduce.Numbers]:
    """The mean over the ranks in an owner's range, plus its residual, into ``mean`` (zeros).

    Args:
        residual: of the range, times ``rescale``; None for none.
        low: the first place of the range.
        edges: of the stretches in which received entries are counted.
        k_out: entries that all owners together are to send back.

    Returns:
        Places of the largest among them (int64, rising, from 0), and what the owner tells:
        ``sparse.row_of``.
    """
    counts = np.zeros(allreduce.COUNT_BINS, np.int64)
    for places, values in unpack_messages(messages, config, ranks, what):
        mean.index_add_(0, places - low, values.to(mean.dtype))
        counts += np.diff(np.searchsorted(places.cpu().numpy(), edges))
    mean.div_(ranks)
    if residual is not None:
        mean.add_(residual, alpha=rescale)
    most = allreduce.max_reply(k_out, ranks, mean.numel())
    places = kernels.select_entries(mean, [Segment(0, mean.numel(), most)], config, (config.seed,))
    falling = mean[places].abs().sort(descending=True).values.cpu().numpy()
    told = falling[allreduce.reported_ranks(len(falling)) - 1] if len(falling) else falling
    return places, allreduce.encode_report(len(falling), told, counts.tolist())


def build_reply(mean: torch.Tensor, places: torch.Tensor, low: int, table: allreduce.Numbers, k_out: int,
                config: TopK) -> tuple[torch.Tensor, Layout]:
    """The message with what an owner sends to all; what is left stays in ``mean``."""
    least = allreduce.shared_threshold(table, k_out)
    chosen = places if least == 0 else places[mean[places].abs() >= least]
    values = kernels.split_selected(mean, chosen, kernels.wire_dtype(config))
    layout = Layout(chosen.numel(), config.values)
    return kernels.pack_message(chosen + low, values, layout), layout


def scatter_entries(words: torch.Tensor, config: TopK, ranks: int, out: torch.Tensor, what: str) -> int:
    """All owners' entries into ``out`` (numel,), zeros elsewhere; how many there are."""
    out.zero_()
    entries = 0
    for places, values in unpack_messages(words, config, ranks, what):
        out.index_add_(0, places, values.to(out.dtype))
        entries += places.numel()
    return entries
