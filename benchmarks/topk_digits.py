"""TopK with error feedback against dense AMSGrad and TopK without: SPARS-AMS section 5, 20 workers.

    python -m benchmarks.topk_digits --json out.json --plot out.png

Handwritten digits, a perceptron with one hidden layer, 20 workers with a shard of the data each,
one process. Every worker's gradient goes through the kernels that ranks use (select, split, pack,
add_up), the sum into ``AMSGrad``; by sparse allreduce the workers are threads that run what ranks
run. With TopK replies each worker owns a slice of the weights and sends back the same ratio of what the
others lack (``server=hvd.Server("sharded", downlink=...)``); accuracy is that of the exact weights. All
methods at the same learning rate and number of steps.
With ``--split random`` (the default) all shards are random; with ``--split sorted`` they are cut from
the digits sorted by class, so that each worker knows one or two classes.
A run's accuracy is the mean of its last five evaluations.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

from benchmarks.local_ranks import LocalRanks
from examples.seeds import summarize
from hvd_ext.reducers.buckets import Bucket, BucketKey, TensorSlice
from hvd_ext.reducers.topk import Layout, TopK, keep_count
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.sharding import cut_evenly
from hvd_ext.sharding.downlink import message_layout as layout_of
from hvd_ext.sharding.downlink import part_segments
from hvd_ext.torch.amsgrad import AMSGrad
from hvd_ext.torch.reducers.kernels import topk as kernels
from hvd_ext.torch.reducers.topk_allreduce import SparseAllreduce
from hvd_ext.torch.sharding import downlink_kernels

SPARSE = "topk by sparse allreduce"
REPLIES = "topk, sharded, reply topk"
METHODS = ("dense", "topk", SPARSE, REPLIES, "topk without feedback")
WORKERS = 20
TEST = 597
LAST = 5


class Perceptron:
    """64 inputs, one hidden layer, 10 classes; all weights in one flat vector of n elements."""

    def __init__(self, hidden: int) -> None:
        self.shapes = [(hidden, 64), (hidden,), (10, hidden), (10,)]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]

    def start(self, seed: int) -> torch.Tensor:
        """Uniform weights, zero biases."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            bound = shape[-1] ** -0.5 if len(shape) == 2 else 0.0
            parts.append((2 * torch.rand(size, generator=generator) - 1) * bound)
        return torch.cat(parts)

    def logits(self, flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Of a batch of images, (batch, 64) to (batch, 10)."""
        w1, b1, w2, b2 = (piece.view(shape) for piece, shape in
                          zip(flat.split(self.sizes), self.shapes, strict=True))
        return torch.relu(x @ w1.T + b1) @ w2.T + b2

    def loss(self, flat: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy."""
        return torch.nn.functional.cross_entropy(self.logits(flat, x), y)


def train(method: str, seed: int, args: argparse.Namespace) -> list[float]:
    """Test accuracy in percent after every ``args.every`` steps."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    test, rest = order[:TEST], order[TEST:]
    if args.split == "sorted":
        rest = rest[np.argsort(labels[rest], kind="stable")]
    shards = np.array_split(rest, WORKERS)

    model = Perceptron(args.hidden)
    weights = torch.nn.Parameter(model.start(seed))
    optimizer = AMSGrad([weights], args.lr)
    gradients = torch.func.vmap(torch.func.grad(model.loss), in_dims=(None, 0, 0))
    config = TopK(args.ratio, error_feedback=method != "topk without feedback")
    ranks = LocalRanks(WORKERS)
    exchanges = [SparseAllreduce(one, config) for one in ranks.collectives]  # type: ignore[arg-type]
    bucket = Bucket(0, (TensorSlice(0, 0, weights.numel()),), BucketKey("torch.float32"))
    count = keep_count(weights.numel(), args.ratio)
    layout, pieces = Layout(count, config.values), [Segment(0, weights.numel(), count)]
    residual = torch.zeros(WORKERS, weights.numel())
    message = cut_evenly(bucket, WORKERS)
    held = weights.detach().clone() if method == REPLIES else weights.detach()  # w^, where it is not w

    curve: list[float] = []

    def evaluate(step: int) -> None:
        if (step + 1) % args.every == 0:
            with torch.no_grad():
                guess = model.logits(weights, torch.from_numpy(images[test])).argmax(1).numpy()
            curve.append(float((guess == labels[test]).mean() * 100))

    def choose(total: torch.Tensor, step: int, worker: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = kernels.select_entries(total[worker], pieces, config, (seed, step, worker))
        return positions, kernels.split_selected(total[worker], positions, torch.float32)

    def reduce_gathered(total: torch.Tensor, step: int) -> torch.Tensor:
        together = torch.cat([kernels.pack_message(*choose(total, step, worker), layout)
                              for worker in range(WORKERS)])
        counts = [header[0] for header in kernels.read_headers(together, WORKERS)]
        reduced = torch.zeros_like(weights)
        kernels.add_up(together, counts, layout, torch.float32, reduced)
        return reduced / WORKERS

    def reduce_sparse(total: torch.Tensor, step: int) -> torch.Tensor:
        def on_worker(worker: int) -> torch.Tensor:
            handle = exchanges[worker].send_to_owners(bucket, *choose(total, step, worker), "topk")
            memory = total[worker], torch.empty_like(total[worker])
            return exchanges[worker].finish_exchange([(bucket, handle.wait(), count)], "topk",
                                                     lambda _: memory, 1.0, lambda _: [])[0]

        return ranks.run(on_worker)[0]

    def reply(step: int) -> None:
        for owner, part in enumerate(message.parts):
            if not part:  # of a network that is too small to be cut for all workers
                continue
            chosen = part_segments(part, args.ratio, per_tensor=False)
            wire = layout_of(chosen, config.values)
            place = slice(part[0].offset, part[-1].offset + part[-1].numel)
            words = downlink_kernels.pack_entries(weights.detach()[place] - held[place], chosen, wire, config,
                                                  (seed, step, owner))
            for _, positions, values in downlink_kernels.entries_of_pieces(
                    words, wire, torch.float32, int(words[0]), part):
                downlink_kernels.add_entries(held, positions, values)

    for step in range(args.steps):
        batch = np.stack([shard[rng.integers(0, len(shard), args.batch)] for shard in shards])
        local = gradients(held, torch.from_numpy(images[batch]),
                          torch.from_numpy(labels[batch]))
        if method == "dense":
            weights.grad = local.mean(0)
        else:
            total = local + residual if config.error_feedback else local
            exchange = reduce_sparse if method == SPARSE else reduce_gathered
            weights.grad = exchange(total, step)
            residual = total
        optimizer.step()
        if method == REPLIES:
            reply(step)
        evaluate(step)
    ranks.close()
    return curve


def plot(path: Path, curves: dict[str, np.ndarray], every: int, ratio: float) -> None:
    """Median and range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, curve in curves.items():
        steps = np.arange(1, curve.shape[1] + 1) * every
        (line,) = axes.plot(steps, np.median(curve, 0), label=method)
        axes.fill_between(steps, curve.min(0), curve.max(0), alpha=0.15, color=line.get_color())
    axes.set(xlabel="step", ylabel="test accuracy / %", ylim=(70, 100),
             title=f"{WORKERS} workers, ratio {ratio:g}: median and range of {len(curve)} seeds")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run all methods and seeds; the figures that go into ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=8, help="images per worker and step")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--split", choices=("sorted", "random"), default="random")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    began = time.perf_counter()
    runs = [(method, seed) for method in METHODS for seed in range(args.seeds)]
    curves: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for method, seed in track(runs, description="training", console=Console(stderr=True)):
        curves[method].append(train(method, seed, args))
    arrays = {method: np.array(curve) for method, curve in curves.items()}
    final = {method: curve[:, -LAST:].mean(1) for method, curve in arrays.items()}
    table = Table("method", "test accuracy / %, median (range)", "against dense, median",
                  "sent per worker and step",
                  title=f"digits, {WORKERS} workers, {args.split} shards, {args.steps} steps, "
                        f"{args.seeds} seeds")
    elements = sum(Perceptron(args.hidden).sizes)
    message = 4 * Layout(keep_count(elements, args.ratio), "float32").words
    for method in METHODS:
        gap = np.median(final[method] - final["dense"])
        sent = 4 * elements if method == "dense" else message
        if method == REPLIES:
            sent += 4 * Layout(keep_count(elements // WORKERS, args.ratio), "float32").words
        table.add_row(method, summarize(final[method].tolist(), limit=100.0).describe(2),
                      "" if method == "dense" else f"{gap:+.2f}", f"{sent} bytes")
    Console().print(table)
    result = {
        "settings": {key: value for key, value in vars(args).items() if key not in ("json", "plot")},
        "final": {method: values.tolist() for method, values in final.items()},
        "curves": {method: curve.tolist() for method, curve in arrays.items()},
        "seconds": time.perf_counter() - began,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(args.plot, arrays, args.every, args.ratio)
    return result


if __name__ == "__main__":
    main()
