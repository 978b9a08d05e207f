"""What the extensions cost under TensorFlow, each beside its baseline in the same run.

    python -m benchmarks.tf_speed --json out/tf_speed.json

"exchange" is the time of one compiled function that turns this rank's gradients (11.2 million
float32 parameters, the shapes of ResNet-18) into the reduced ones: delay compensation beside
Horovod's allreduce of every gradient, TopK at ratio 0.01 beside the exact ``tf.math.top_k`` of the
flat gradient plus residual with two allgathers. "fit" is a training step of a convolutional network
with batch normalization through ``DistributedOptimizer``, plain and with SENG. All take turns;
ratios are of medians of the slowest rank. Bars are those of the PyTorch benchmarks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.ranks import run_ranks

BARS = {"delay, adaptive": 1.60, "delay, constant": 1.60, "topk, exact": 0.40,
        "topk, sampled": 0.40, "fit, SENG between refreshes": 1.04, "fit, SENG refresh": 2.50}
BASELINE = {"delay": "allreduce", "topk": "tf.math.top_k + allgather", "fit": "fit, plain"}
RATIO = 0.01
WHY = {
    "fit, SENG refresh": "convolutions take their per-sample gradients one sample after another",
    "fit, SENG between refreshes": "each layer asks in the backward pass whether it is to capture",
}


def resnet18_shapes() -> list[tuple[int, ...]]:
    """Weights of a ResNet-18 for 32 x 32 images and 10 classes, in TensorFlow's layout."""
    shapes: list[tuple[int, ...]] = [(3, 3, 3, 64), (64,), (64,)]
    last = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            first = last if block == 0 else width
            shapes += [(3, 3, first, width), (width,), (width,), (3, 3, width, width), (width,),
                       (width,)]
            if first != width:
                shapes += [(1, 1, first, width), (width,), (width,)]
        last = width
    return [*shapes, (512, 10), (10,)]


def exchanges(turns: int) -> dict[str, list[float]]:
    """Seconds of every exchange by way; run on every rank."""
    import tensorflow as tf

    import hvd_ext.tensorflow as hvd
    from hvd_ext.tensorflow.collectives import Collectives
    from hvd_ext.tensorflow.reducers import REDUCTIONS, make_reducer

    rng = np.random.default_rng(hvd.rank())
    gradients = [tf.constant(rng.standard_normal(shape).astype("float32") * (0.1 + rng.random()))
                 for shape in resnet18_shapes()]
    variables = [tf.Variable(tf.zeros(g.shape), name=f"v{k}") for k, g in enumerate(gradients)]

    def make(shape: Any, dtype: Any, name: str, per_rank: bool) -> tf.Variable:
        return tf.Variable(tf.zeros(shape, dtype), trainable=False)

    def ours(label: str, **options: Any) -> Callable[[], Any]:
        given = {"op": hvd.Average, "compression": hvd.Compression.none, **options}
        reducer = make_reducer(Collectives(), label, sparse_as_dense=False, groups=None,
                               gradient_predivide_factor=1.0, allowed=REDUCTIONS, **given)
        reducer.build(variables, make)
        inputs = {"lr": tf.constant(0.1)} if "op" in options else {}
        return tf.function(lambda: reducer(gradients_in, variables, **inputs)[0])

    gradients_in = [tf.Variable(g, trainable=False) for g in gradients]
    size = sum(int(g.shape.num_elements()) for g in gradients)
    residual = tf.Variable(tf.zeros((size,)), trainable=False)
    collectives = Collectives()

    def naive() -> Any:
        total = tf.concat([tf.reshape(g, [-1]) for g in gradients_in], 0) + residual
        found = tf.math.top_k(tf.abs(total), round(RATIO * size))
        values = tf.gather(total, found.indices)
        residual.assign(tf.tensor_scatter_nd_update(total, found.indices[:, None],
                                                    tf.zeros_like(values)))
        everywhere = collectives.allgather(found.indices, "naive.indices")
        mean = tf.scatter_nd(everywhere[:, None], collectives.allgather(values, "naive.values"),
                             (size,))
        return mean / hvd.size()

    topk = hvd.Compression.topk
    ways = {
        "allreduce": ours("plain"),
        "delay, adaptive": ours("adaptive", op=hvd.DelayCompensated()),
        "delay, constant": ours("constant", op=hvd.DelayCompensated(0.04, adaptive=False)),
        BASELINE["topk"]: tf.function(naive),
        "topk, exact": ours("exact", compression=topk(RATIO)),
        "topk, sampled": ours("sampled", compression=topk(RATIO, selection="sampled")),
    }
    return in_turn(ways, turns)


def fits(turns: int, batch: int) -> dict[str, list[float]]:
    """Seconds of every training step by way; run on every rank."""
    import keras
    import tensorflow as tf

    import hvd_ext.tensorflow as hvd

    rng = np.random.default_rng(hvd.rank())
    x = tf.constant(rng.standard_normal((batch, 32, 32, 3)).astype("float32"))
    y = tf.constant(rng.integers(0, 10, batch))

    def make(damping: float | None) -> tuple[Callable[[], Any], Any]:
        keras.utils.set_random_seed(0)
        layers = keras.layers
        model = keras.Sequential([keras.Input((32, 32, 3))])
        for width in (32, 64, 128):
            model.add(layers.Conv2D(width, 3, strides=2, padding="same"))
            model.add(layers.BatchNormalization())
            model.add(layers.ReLU())
        model.add(layers.GlobalAveragePooling2D())
        model.add(layers.Dense(10))
        seng = None if damping is None else hvd.SENG(model, damping=damping, update_freq=10**6)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, momentum=0.9),
                                             preconditioner=seng, name=f"fit{damping}")
        optimizer.build(model.trainable_variables)
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        @tf.function
        def step() -> Any:
            with tf.GradientTape() as tape:
                loss = loss_of(y, model(x, training=True))
            found = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(list(zip(found, model.trainable_variables, strict=True)))
            return loss

        return step, seng

    plain, _ = make(None)
    between, _ = make(0.5)
    refreshing, seng = make(0.25)

    def refresh() -> Any:
        seng.capture.wanted.assign(True)
        return refreshing()

    return in_turn({"fit, plain": plain, "fit, SENG between refreshes": between,
                    "fit, SENG refresh": refresh}, turns)


def in_turn(ways: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of every call, the ways taking turns; the first two of each are left out."""
    import tensorflow as tf

    import hvd_ext.tensorflow as hvd

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):
        for name, run in ways.items():
            hvd.allreduce(tf.zeros(1), name="barrier")
            begin = time.perf_counter()
            result = run()
            _ = [float(tf.reduce_sum(one)) for one in tf.nest.flatten(result)[-1:]]
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tf_speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9, help="calls measured of each way")
    parser.add_argument("--batch", type=int, default=32, help="images a rank")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    times: dict[str, float] = {}
    for task, given in ((exchanges, (args.turns,)), (fits, (args.turns, args.batch))):
        found = run_ranks(task, args.ranks, *given, timeout=900, init="tensorflow")
        for name in found[0]:
            times[name] = median(max(turn) for turn in zip(*(rank[name] for rank in found),
                                                           strict=True))
    table = Table(title=f"TensorFlow, {args.ranks} ranks of one thread")
    for column in ("way", "ms", "baseline", "baseline ms", "ratio", "at most", ""):
        table.add_column(column, justify="right" if "ms" in column else "left")
    rows = []
    for name, bar in BARS.items():
        baseline = BASELINE[name.split(",")[0]]
        ratio = times[name] / times[baseline]
        why = "" if ratio <= bar else "missed" + (f": {WHY[name]}" if name in WHY else "")
        rows.append({"way": name, "ms": times[name] * 1e3, "baseline": baseline, "ratio": ratio,
                     "bar": bar})
        table.add_row(name, f"{times[name] * 1e3:.1f}", baseline, f"{times[baseline] * 1e3:.1f}",
                      f"{ratio:.2f}", f"{bar:.2f}", why)
    Console().print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"ranks": args.ranks, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
