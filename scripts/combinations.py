"""Which extensions and options work together: every pair is constructed and trained for a step.

    horovodrun --gloo -np 2 python -m scripts.combinations --framework torch --json out/torch.json
    horovodrun --gloo -np 2 python -m scripts.combinations --framework tensorflow --json out/tensorflow.json
    python -m scripts.combinations --write docs/combinations.md out/torch.json out/tensorflow.json

A pair that raises does not work; the message is kept in the JSON file. A pair of two
values of one argument is left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

FRONT_ENDS = {"torch": "PT", "tensorflow": "TF"}
BEGIN, END = "<!-- combinations -->", "<!-- /combinations -->"
SHORT = {
    "DelayCompensated": "delay", "fp16": "fp16", "TopK": "topk", "TopK, sparse allreduce": "sparse",
    "PowerSGD": "powersgd", "SENG": "seng", "rank0": "rank0", "sharded": "sharded",
    "compressed reply": "reply",
    "DelayedUpdate": "overlap", "op=Sum": "sum", "accumulation": "passes",
    "groups": "groups", "uneven_inputs": "uneven", "sparse gradients": "embed",
}


def settings_of(hvd: Any, model: Any) -> dict[str, dict[str, Any]]:
    """The arguments of ``DistributedOptimizer`` that each row stands for; uneven and sparse are marks."""
    small = {"min_size": 1}
    return {
        "DelayCompensated": {"op": hvd.DelayCompensated()},
        "fp16": {"compression": hvd.Compression.fp16},
        "TopK": {"compression": hvd.Compression.topk(**small)},
        "TopK, sparse allreduce": {"compression": hvd.Compression.topk(exchange="sparse_allreduce", **small)},
        "PowerSGD": {"compression": hvd.Compression.powersgd(rank=1, min_compression=1.0)},
        "SENG": {"preconditioner": lambda: hvd.SENG(model, damping=0.2)},
        "rank0": {"server": "rank0"},
        "sharded": {"server": "sharded"},
        "compressed reply": {"server": hvd.Server("sharded", downlink=hvd.Compression.fp16)},
        "DelayedUpdate": {"overlap": hvd.DelayedUpdate()},
        "op=Sum": {"op": hvd.Sum},
        "accumulation": {"backward_passes_per_step": 2},
        "groups": {"groups": 2},
        "uneven_inputs": {"uneven": True},
        "sparse gradients": {"sparse": True},
    }


def try_torch(chosen: Callable[[Any, Any], dict[str, Any]], name: str) -> None:
    """Train two steps with the arguments; what does not work raises.

    Args:
        chosen: the arguments, from the module and the model.
        name: of the parameters, so that collectives of a failed trial are no other's.
    """
    import torch

    import hvd_ext.torch as hvd

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(8, 6), torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    model[0].sparse = "sparse gradients" in name  # before SENG is made, which looks at it
    arguments = chosen(hvd, model)
    arguments.pop("sparse", None)
    uneven = arguments.pop("uneven", False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                         [(f"{name}.{one}", p) for one, p in model.named_parameters()],
                                         **arguments)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(arguments.get("backward_passes_per_step", 1)):
            rows = torch.randint(8, (5, 2))
            torch.nn.functional.cross_entropy(model(rows), torch.arange(5) % 3).backward()
        optimizer.step()

    if uneven:
        with hvd.uneven_inputs(optimizer):
            step()
            step()
    else:
        step()
        step()
    optimizer.flush()


def try_tensorflow(chosen: Callable[[Any, Any], dict[str, Any]], name: str) -> None:
    """The same with Keras."""
    import keras
    import tensorflow as tf

    import hvd_ext.tensorflow.keras as hvd

    keras.utils.set_random_seed(0)
    def make(first: Any) -> Any:
        return keras.Sequential([keras.Input((2,), dtype="int32"), first, keras.layers.Flatten(),
                                 keras.layers.Dense(4), keras.layers.Dense(3)])

    sparse = chosen(hvd, make(keras.layers.Rescaling(0.1))).pop("sparse", False)
    model = make(keras.layers.Embedding(8, 6) if sparse else keras.layers.Rescaling(0.1))
    arguments = chosen(hvd, model)
    uneven = arguments.pop("uneven", False)
    arguments.pop("sparse", None)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), re.sub(r"\W", "_", name), **arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(x: Any, y: Any) -> None:
        for _ in range(arguments.get("backward_passes_per_step", 1)):
            with tf.GradientTape() as tape:
                value = loss(y, model(x, training=True))
            optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)

    batch = tf.random.uniform((5, 2), maxval=8, dtype=tf.int32), tf.range(5) % 3
    if uneven:
        with hvd.uneven_inputs(optimizer) as data:
            for x, y in data.batches([batch, batch]):
                step(x, y)
    else:
        step(*batch)
        step(*batch)


TRY = {"torch": ("hvd_ext.torch", try_torch), "tensorflow": ("hvd_ext.tensorflow.keras", try_tensorflow)}


def refusal_of(framework: str, first: str, second: str | None) -> str | None:
    """The message of the error with which a pair, or one row alone, ends; None where it trains.

    Args:
        framework: "torch" or "tensorflow".
        first: a row.
        second: another one.
    """
    def chosen(hvd: Any, model: Any) -> dict[str, Any]:
        settings = settings_of(hvd, model)
        found = {**settings[first], **(settings[second] if second else {})}
        return {name: value() if name == "preconditioner" else value for name, value in found.items()}

    try:
        TRY[framework][1](chosen, f"{first}+{second}")
    except Exception as error:  # what an extension refuses is the result
        return f"{type(error).__name__}: {error}"
    return None


def try_all(framework: str) -> dict[str, str | None]:
    """The refusal of each pair, by ``first + second``, and of each row alone."""
    hvd = importlib.import_module(TRY[framework][0])
    hvd.init()
    rows = settings_of(hvd, None)
    found = {row: refusal_of(framework, row, None) for row in rows}
    for first, second in combinations(rows, 2):
        if not rows[first].keys() & rows[second].keys():
            found[f"{first} + {second}"] = refusal_of(framework, first, second)
    return found


def is_first_rank(framework: str) -> bool:
    """Whether this process is rank 0."""
    return bool(importlib.import_module(TRY[framework][0]).rank() == 0)


def cell_of(found: dict[str, dict[str, str | None]], key: str) -> str:
    """A cell of the matrix: in which front ends it works."""
    if any(key not in one for one in found.values()):
        return ""
    works = {framework for framework, one in found.items() if one[key] is None}
    return {0: "-", len(found): "yes"}.get(len(works), "".join(FRONT_ENDS[one] for one in works))


def matrix_of(found: dict[str, dict[str, str | None]]) -> str:
    """The matrix as a table; its diagonal says whether a row works alone.

    Args:
        found: by front end, what ``try_all`` gave.
    """
    rows = list(SHORT)
    lines = ["| | " + " | ".join(SHORT.values()) + " |", "|---" * (len(rows) + 1) + "|"]
    for number, row in enumerate(rows):
        cells = [f"**{cell_of(found, row)}**" if row == column
                 else cell_of(found, f"{row} + {column}" if number < place else f"{column} + {row}")
                 for place, column in enumerate(rows)]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Try all pairs, or write the page's table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.combinations", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=list(TRY))
    parser.add_argument("--json", type=Path, help="write what was found")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page")
    parser.add_argument("files", type=Path, nargs="*", help="files of --json, for --write")
    args = parser.parse_args()
    if args.framework:
        found = try_all(args.framework)
        if args.json and is_first_rank(args.framework):
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({args.framework: found}, indent=1))
        for pair, refusal in found.items():
            if refusal is not None and is_first_rank(args.framework):
                print(f"{pair}: {refusal[:160]}")
    if args.write:
        both: dict[str, dict[str, str | None]] = {}
        for file in args.files:
            both |= json.loads(file.read_text())
        text = args.write.read_text()
        table = f"{BEGIN}\n{matrix_of(both)}\n{END}"
        args.write.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.S))


if __name__ == "__main__":
    main()
