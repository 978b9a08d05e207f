"""How long a user waits for the first step of ``model.fit`` under SENG, beside the same without it.

    python -m benchmarks.seng_first_step --model MobileNetV2 ResNet50 DenseNet121

The time from a model that is built to the end of its first batch: SENG's construction, tracing,
TensorFlow's optimization of the graph, the step itself. Each turn starts new processes, first plain,
then with SENG, so that other load meets both; seconds are those of the slowest rank, the ratio is of
medians. Models are those of ``keras.applications`` with random weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.ranks import run_ranks

BAR = 3.0
DEFAULT = ["MobileNetV2", "ResNet50", "EfficientNetB0", "DenseNet121"]


def first_steps(name: str, side: int, batch: int, seng: bool) -> tuple[float, float]:
    """Seconds, and CPU seconds of this rank, to the end of the first batch; run on every rank."""
    import keras

    import hvd_ext.tensorflow.keras as hvd

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3), classes=10)
    rng = np.random.default_rng(hvd.rank())
    x, y = rng.standard_normal((batch, side, side, 3)).astype("float32"), np.arange(batch) % 10
    hvd.allreduce(np.zeros(1, "float32"), name="barrier")
    begin = time.perf_counter(), time.process_time()
    preconditioner = hvd.SENG(model, damping=1.0) if seng else None
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, momentum=0.9),
                                           preconditioner=preconditioner),
                  "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=batch, verbose=0)
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model's row."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(args.turns):
        for seng in (False, True):
            found = run_ranks(first_steps, args.ranks, name, args.side, args.batch, seng,
                              timeout=args.timeout, init="tensorflow")
            seconds[seng].append(max(wall for wall, _ in found))
            cpu[seng].append(max(own for _, own in found))
    plain, with_seng = median(seconds[False]), median(seconds[True])
    return {"model": name, "plain": plain, "seng": with_seng, "ratio": with_seng / plain,
            "ratio_of_cpu": median(cpu[True]) / median(cpu[False])}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seng_first_step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=DEFAULT)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--side", type=int, default=64, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=8, help="images per rank")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds until a run is given up")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [measure(name, args) for name in args.model]
    table = Table(title=f"Seconds to the end of the first batch, {args.ranks} ranks of one thread")
    for column in ("model", "plain", "SENG", "ratio", "ratio of CPU time", "at most"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        missed = "  missed" if row["ratio"] > BAR else ""
        table.add_row(row["model"], f"{row['plain']:.1f}", f"{row['seng']:.1f}", f"{row['ratio']:.2f}",
                      f"{row['ratio_of_cpu']:.2f}", f"{BAR:g}{missed}")
    Console().print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"ranks": args.ranks, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
