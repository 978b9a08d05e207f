"""What a sparse allreduce sends, by number of ranks, on the gradients of a ResNet-18.

    python -m benchmarks.topk_sparse --ranks 4 8 16

The ranks are threads of one process; gradients are taken on batches of random images with labels of the
brightest quarter, so that there is something to learn. Printed are values and indices as 32-bit words,
relative to ``k (M - 1) / M``, beside those of an allgather; and how much more than the mean the fullest
owner received. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.local_ranks import LocalRanks
from examples.resnet import resnet18
from hvd_ext.reducers.buckets import Bucket, BucketKey, TensorSlice
from hvd_ext.reducers.topk import Layout, TopK, keep_count
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.torch.reducers.kernels import topk as kernels
from hvd_ext.torch.reducers.topk_allreduce import SparseAllreduce


def batch(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (size, 3, 32, 32) and the number of their brightest quarter."""
    images = torch.randn(size, 3, 32, 32, generator=generator)
    labels = torch.randint(4, (size,), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 1.0
    return images, labels


def measure(size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Words and imbalance by step for M = ``size`` ranks."""
    torch.manual_seed(0)
    model = resnet18(classes=4, stem="cifar")
    parameters = list(model.parameters())
    numel = sum(p.numel() for p in parameters)
    k = keep_count(numel, args.ratio)
    config = TopK(args.ratio, exchange="sparse_allreduce")
    bucket = Bucket(0, (TensorSlice(0, 0, numel),), BucketKey("torch.float32"))
    ranks = LocalRanks(size)
    exchanges = [SparseAllreduce(one, config) for one in ranks.collectives]  # type: ignore[arg-type]
    residuals = [torch.zeros(numel) for _ in range(size)]
    generators = [torch.Generator().manual_seed(rank) for rank in range(size)]
    words, imbalance, applied = [], [], []
    for _ in range(args.steps):
        totals = []
        for rank in range(size):
            images, labels = batch(generators[rank], args.batch)
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            totals.append(flat.add_(residuals[rank]))
        before = [dict(one.traffic.sent) for one in ranks.collectives]

        def step(rank: int, totals: list[torch.Tensor] = totals) -> torch.Tensor:
            positions = kernels.select_entries(totals[rank], [Segment(0, numel, k)], config, (0,))
            values = kernels.split_selected(totals[rank], positions, torch.float32)
            handle = exchanges[rank].send_to_owners(bucket, positions, values, "topk")
            mean = torch.empty(numel) if rank == 0 else totals[rank].new_empty(numel)
            (found,) = exchanges[rank].finish_exchange([(bucket, handle.wait(), k)], "topk",
                                                       lambda _: (totals[rank], mean), 1.0, lambda _: [])
            return found

        (update, *others) = ranks.run(step)
        if any(not torch.equal(update, other) for other in others):
            raise AssertionError("the ranks hold different updates")
        residuals = totals
        with torch.no_grad():
            for p, piece in zip(parameters, update.split([p.numel() for p in parameters]), strict=True):
                p.sub_(piece.view(p.shape), alpha=args.lr)
        sent = [sum(one.traffic.sent[kind] - was.get(kind, 0) for kind in one.traffic.sent) / 4
                for one, was in zip(ranks.collectives, before, strict=True)]
        words.append(float(np.mean(sent)) / (k * (size - 1) / size))
        imbalance.append(exchanges[0].imbalance)
        applied.append(exchanges[0].applied / k)
    ranks.close()
    gather = (size - 1) * Layout(k, "float32").words / (k * (size - 1) / size)
    return {"ranks": size, "k": k, "words": words, "imbalance": imbalance, "applied": applied,
            "allgather": gather}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = [measure(size, args) for size in args.ranks]
    table = Table("ranks", "words / (k (M-1)/M)", "allgather", "fullest owner / mean, steps 2 to last",
                  "first step", "applied / k",
                  title=f"ResNet-18, ratio {args.ratio:g}, {args.steps} steps, k = {found[0]['k']:,}")
    for one in found:
        table.add_row(str(one["ranks"]), f"{np.mean(one['words']):.2f} (most {max(one['words']):.2f})",
                      f"{one['allgather']:.1f}", f"{max(one['imbalance'][1:]):.2f}",
                      f"{one['imbalance'][0]:.2f}", f"{np.mean(one['applied']):.3f}")
    Console().print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
