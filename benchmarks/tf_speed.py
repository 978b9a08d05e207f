"""What the extensions cost under TensorFlow, each beside its baseline in the same run.

    python -m benchmarks.tf_speed --json out/tf_speed.json
    python -m benchmarks.tf_speed --hosts 4 --rate 1gbit --turns 5   # "with update" over emulated hosts

Ways take turns, on ranks of one thread; ratios are of medians of the slowest rank, bars those of
the PyTorch benchmarks.

"exchange" is one compiled function that turns this rank's gradients (all of ResNet-18, 11.2 million
float32 parameters) into the reduced ones: delay compensation beside Horovod's allreduce of every
gradient, TopK at ratio 0.01 beside the plain way, ``tf.math.top_k`` of the flat gradient plus
residual and two allgathers. "bytes" are those that a rank sends in it, counted from the messages,
beside the allreduce's. "with update" is that function followed by Adam's update of all weights, under
``server="sharded"`` beside every rank updating all. "step" is a training step of ResNet-18 on 32 x 32
images with momentum SGD, for SENG with a 3 x 3 stem and the settings of ``seng_step``.
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

RATIO = 0.01
UPDATE_FREQ = 200
REFRESH, BETWEEN = "SENG, with a refresh", "SENG, between refreshes"
AMORTISED = f"SENG, one refresh in {UPDATE_FREQ}"
PLAIN_TOPK = "top_k, allgathers"
POWERSGD = "PowerSGD, rank 4"
SHARDED = "Adam, sharded"
BARS = {
    "exchange": {"delay, adaptive": 1.60, "delay, constant": 1.60, "TopK, exact": 0.40,
                 "TopK, sampled": 0.40, POWERSGD: None},
    "bytes": {"delay, adaptive": 1.05, "delay, constant": 1.05, "TopK, exact": 0.021,
              "TopK, sampled": 0.021, POWERSGD: None, SHARDED: 1.02},
    "with update": {SHARDED: 1.15},
    "step": {"delay, adaptive": 1.10, "delay, constant": 1.10, BETWEEN: 1.04, REFRESH: 2.50,
             AMORTISED: 1.05},
}
_AFTER = ("the order of the ranks is known when all of the backward pass is done, so that the way back "
          "cannot run beside it, as an allreduce does")
WHY = {("step", "delay, adaptive"): _AFTER + "; and MeanSquare is read and written",
       ("step", "delay, constant"): _AFTER,
       ("step", BETWEEN): "U b is one more product with the curvature of every layer"}
SENG = {"explicit_threshold": 100_000, "sketch_size": 262_144, "rank": 8, "row_sketch": 128}
Run = Callable[[], Any]


def resnet18(small_stem: bool) -> Any:
    """``examples.resnet.resnet18`` with ten classes in Keras."""
    import keras

    layers = keras.layers

    def convolution(x: Any, width: int, size: int, stride: int = 1) -> Any:
        x = layers.Conv2D(width, size, stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    def block(x: Any, width: int, stride: int) -> Any:
        body = layers.ReLU()(convolution(x, width, 3, stride))
        body = convolution(body, width, 3)
        short = x if stride == 1 and x.shape[-1] == width else convolution(x, width, 1, stride)
        return layers.ReLU()(layers.Add()([body, short]))

    keras.utils.set_random_seed(0)
    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolution(inputs, 64, *((3, 1) if small_stem else (7, 2))))
    if not small_stem:
        x = layers.MaxPooling2D(3, 2, padding="same")(x)
    for stage in range(4):
        x = block(x, 64 << stage, 2 if stage else 1)
        x = block(x, 64 << stage, 1)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def exchanges(turns: int) -> dict[str, Any]:
    """Seconds of every exchange and bytes one sends, by way; run on every rank."""
    import tensorflow as tf

    import hvd_ext.tensorflow as hvd
    from hvd_ext.reducers.options import ReductionOptions
    from hvd_ext.tensorflow.collectives import Collectives
    from hvd_ext.tensorflow.reducers import make_reducer

    variables = resnet18(small_stem=False).trainable_variables
    rng = np.random.default_rng(hvd.rank())
    gradients = [tf.Variable(rng.standard_normal(v.shape).astype("float32") * (0.1 + rng.random()),
                             trainable=False) for v in variables]
    size = sum(v.numpy().size for v in gradients)
    reducers: dict[str, Any] = {}

    def make(shape: Any, dtype: Any, name: str, per_rank: bool) -> tf.Variable:
        return tf.Variable(tf.zeros(shape, dtype), trainable=False)

    def ours(way: str, **options: Any) -> Run:
        given = {"op": hvd.Average, "compression": hvd.Compression.none, **options}
        reducer = reducers[way] = make_reducer(Collectives(), ReductionOptions(prefix=way), **given)
        reducer.create_state(variables, make)
        inputs = {"lr": tf.constant(0.1)} if "op" in options else {}
        return tf.function(lambda: reducer(gradients, variables, **inputs)[0], autograph=False)

    residual = tf.Variable(tf.zeros((size,)), trainable=False)
    collectives = Collectives()

    def plain_topk() -> Any:
        total = tf.concat([tf.reshape(g, [-1]) for g in gradients], 0) + residual
        found = tf.math.top_k(tf.abs(total), round(RATIO * size))
        values = tf.gather(total, found.indices)
        residual.assign(tf.tensor_scatter_nd_update(total, found.indices[:, None],
                                                    tf.zeros_like(values)))
        everywhere = collectives.allgather(found.indices, "plain.indices")
        mean = tf.scatter_nd(everywhere[:, None], collectives.allgather(values, "plain.values"),
                             (size,))
        return mean / hvd.size()

    topk = hvd.Compression.topk
    seconds = in_turn({
        "allreduce": ours("allreduce"),
        "delay, adaptive": ours("delay, adaptive", op=hvd.DelayCompensated()),
        "delay, constant": ours("delay, constant", op=hvd.DelayCompensated(0.04, adaptive=False)),
        PLAIN_TOPK: tf.function(plain_topk, autograph=False),
        "TopK, exact": ours("TopK, exact", compression=topk(RATIO)),
        "TopK, sampled": ours("TopK, sampled", compression=topk(RATIO, selection="sampled")),
        POWERSGD: ours(POWERSGD, compression=hvd.Compression.powersgd(4)),
    }, turns)
    sent = {way: sum(reducer.collectives.traffic.last()[0].values())
            for way, reducer in reducers.items()}
    return {"seconds": seconds, "sent": sent}


def updates(turns: int) -> dict[str, Any]:
    """Seconds of every exchange with its update and bytes one sends, by server; run on every rank."""
    import keras
    import tensorflow as tf

    import hvd_ext.tensorflow as hvd

    rng = np.random.default_rng(hvd.rank())
    optimizers: dict[str, Any] = {}

    def ours(server: str) -> Run:
        variables = resnet18(small_stem=False).trainable_variables
        gradients = [tf.Variable(rng.standard_normal(v.shape).astype("float32"), trainable=False)
                     for v in variables]
        optimizer = optimizers[server] = hvd.DistributedOptimizer(
            keras.optimizers.Adam(1e-3), name=server, server=server)
        optimizer.build(variables)

        def step() -> Any:
            found = [tf.identity(gradient) for gradient in gradients]
            optimizer.apply_gradients(list(zip(found, variables, strict=True)))
            return variables[-1].value

        return tf.function(step, autograph=False)

    seconds = in_turn({server: ours(server) for server in ("replicated", "sharded")}, turns)
    return {"seconds": seconds,
            "sent": {server: sum(one.report()["sent"].values()) for server, one in optimizers.items()}}


def training(small_stem: bool, batch: int, name: str, op: Any = None,
             seng: Any = None) -> tuple[Run, Any]:
    """A training step, and its preconditioner."""
    import keras
    import tensorflow as tf

    import hvd_ext.tensorflow as hvd

    rng = np.random.default_rng(hvd.rank())
    x = tf.constant(rng.standard_normal((batch, 32, 32, 3)).astype("float32"))
    y = tf.constant(rng.integers(0, 10, batch))
    model = resnet18(small_stem)
    preconditioner = hvd.SENG(model, damping=1.0, update_freq=10**9, **seng) if seng else None
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.01, momentum=0.9), name=name, preconditioner=preconditioner,
        op=hvd.Average if op is None else op)
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        found = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(list(zip(found, model.trainable_variables, strict=True)))
        return loss

    return step, preconditioner


def delay_steps(turns: int, batch: int) -> dict[str, Any]:
    """Seconds of every training step, plain and delay-compensated; run on every rank."""
    import hvd_ext.tensorflow as hvd

    ops = {"plain": hvd.Average, "delay, adaptive": hvd.DelayCompensated(),
           "delay, constant": hvd.DelayCompensated(0.04, adaptive=False)}
    return {"seconds": in_turn(
        {way: training(False, batch, way, op)[0] for way, op in ops.items()}, turns)}


def seng_steps(turns: int, batch: int) -> dict[str, Any]:
    """Seconds of every training step, plain and with SENG; run on every rank."""
    step, seng = training(True, batch, "SENG", seng=SENG)

    def refresh() -> Any:
        seng.capture.wanted.assign(True)
        return step()

    return {"seconds": in_turn({"plain": training(True, batch, "plain")[0], REFRESH: refresh,
                                BETWEEN: step}, turns)}


def in_turn(ways: dict[str, Run], turns: int) -> dict[str, list[float]]:
    """Seconds of every call, the ways taking turns; the first two of each are left out."""
    import tensorflow as tf

    import hvd_ext.tensorflow as hvd

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):
        for name, run in ways.items():
            hvd.allreduce(tf.zeros(1), name="barrier")
            begin = time.perf_counter()
            result = tf.nest.flatten(run())
            float(tf.reduce_sum(result[-1]))
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def slowest(found: list[dict[str, Any]]) -> dict[str, float]:
    """Median over turns of the slowest rank's seconds, by way."""
    return {way: median(max(turn) for turn in zip(*(rank["seconds"][way] for rank in found),
                                                  strict=True)) for way in found[0]["seconds"]}


def served(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of what ``updates`` found on every rank."""
    update = slowest(found)
    total = {server: sum(rank["sent"][server] for rank in found) for server in update}
    return [{"what": "with update", "way": SHARDED, "ms": update["sharded"] * 1e3, "baseline": "Adam",
             "baseline_ms": update["replicated"] * 1e3, "ratio": update["sharded"] / update["replicated"]},
            {"what": "bytes", "way": SHARDED, "baseline": "allreduce",
             "ratio": total["sharded"] / total["replicated"]}]


def over_hosts(hosts: int, rate: str, turns: int) -> list[dict[str, Any]]:
    """``updates`` with one rank a host."""
    from tests.cluster.hosts import Cluster

    with Cluster(hosts, rate=rate) as cluster, cluster.ranks(
            init="tensorflow", env={"HOROVOD_CYCLE_TIME": "1"}) as ranks:
        return served(ranks.run(updates, turns, timeout=900))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all; the rows of the table."""
    def run(task: Callable[..., Any], *given: int) -> list[dict[str, Any]]:
        return run_ranks(task, args.ranks, *given, timeout=1200, init="tensorflow",
                         env={"HOROVOD_CYCLE_TIME": "1"})  # Horovod's default

    found = run(exchanges, args.turns)
    exchange, sent = slowest(found), found[0]["sent"]
    rows = [{"what": "exchange", "way": way, "ms": exchange[way] * 1e3, "baseline": base,
             "baseline_ms": exchange[base] * 1e3, "ratio": exchange[way] / exchange[base]}
            for way in BARS["exchange"]
            for base in [PLAIN_TOPK if way.startswith("TopK") else "allreduce"]]
    rows += [{"what": "bytes", "way": way, "baseline": "allreduce",
              "ratio": sent[way] / sent["allreduce"]} for way in BARS["bytes"] if way in sent]
    rows += served(run(updates, args.turns))
    for task in (delay_steps, seng_steps):
        times = slowest(run(task, args.steps, args.batch))
        if REFRESH in times:
            times[AMORTISED] = times[BETWEEN] + (times[REFRESH] - times[BETWEEN]) / UPDATE_FREQ
        rows += [{"what": "step", "way": way, "ms": times[way] * 1e3, "baseline": "plain",
                  "baseline_ms": times["plain"] * 1e3, "ratio": times[way] / times["plain"]}
                 for way in BARS["step"] if way in times]
    return rows


def missed(row: dict[str, Any]) -> bool:
    """Whether a row has a target and did not reach it."""
    return row["bar"] is not None and row["ratio"] > row["bar"]


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tf_speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15, help="exchanges measured of each way")
    parser.add_argument("--steps", type=int, default=7, help="training steps measured of each way")
    parser.add_argument("--batch", type=int, default=32, help="images per rank")
    parser.add_argument("--hosts", type=int, help="only \"with update\", on so many emulated hosts")
    parser.add_argument("--rate", default="1gbit", help="of the hosts' links")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = over_hosts(args.hosts, args.rate, args.turns) if args.hosts else measure(args)
    rows = [{**row, "bar": BARS[row["what"]][row["way"]]} for row in rows]
    where = f"{args.hosts} hosts at {args.rate}" if args.hosts else f"{args.ranks} ranks of one thread"
    table = Table(title=f"TensorFlow, {where}")
    for column in ("what", "way", "ms", "baseline", "its ms", "ratio", "at most"):
        table.add_column(column, justify="right" if column in ("ms", "its ms", "ratio") else "left")
    for row in rows:
        times = [f"{row[key]:.1f}" if key in row else "" for key in ("ms", "baseline_ms")]
        bar = "" if row["bar"] is None else f"{row['bar']:g}" + ("  missed" if missed(row) else "")
        table.add_row(row["what"], row["way"], times[0], row["baseline"], times[1],
                      f"{row['ratio']:.3f}", bar)
    console = Console()
    console.print(table)
    for row in rows:
        if missed(row):
            why = WHY.get((row["what"], row["way"]), "no reason known: measure again")
            console.print(f"{row['what']} of {row['way']}: missed; {why}.")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"ranks": args.hosts or args.ranks, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
