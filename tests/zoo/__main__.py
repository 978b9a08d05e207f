"""The tables of docs/seng_models.md: ``python -m tests.zoo [--framework tensorflow] [--docs] [NAME ...]``.

A table is printed, written to ``out/`` and, with ``--docs``, put into the page. ``--no-times`` leaves out the
times, for which a Keras model is started twice more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.ranks import run_ranks
from tests.zoo import lacking
from tests.zoo.table import EmbeddingBlock

YES_NO = {True: "yes", False: "**no**"}


def of_torch(names: Sequence[str], table: EmbeddingBlock, *, times: bool) -> list[str]:
    """Tiny models of timm and transformers; those whose error exceeds its limit, or whose replicas differ."""
    import torch

    from tests.zoo.measure import Model, measure
    from tests.zoo.steps import slowed, trained
    from tests.zoo.timm_models import TIMM
    from tests.zoo.transformers_models import TRANSFORMERS

    torch.set_num_threads(1)
    beyond = []
    models: dict[str, Model] = {}
    for package, group in (("timm", TIMM), ("transformers", TRANSFORMERS)):
        if why := lacking(package):
            print(f"{why}: its models are left out")
        else:
            models |= group
    for name, model in models.items():
        if names and name not in names:
            continue
        found = measure(model)
        one, other = run_ranks(trained, 2, name, timeout=180.0)
        if found.error > model.limit or one != other:
            beyond.append(name)
        ratios = [f"{ratio:.2f}" for ratio in slowed(name)] if times else ["not measured"] * 2
        table.add_contribution(name, found, [YES_NO[one == other], *ratios])
    return beyond


def of_keras(names: Sequence[str], table: EmbeddingBlock, *, times: bool) -> list[str]:
    """The families of ``keras.applications``; those with too large an error, or whose replicas differ."""
    from tests.zoo.keras_measure import LIMIT, first_step, measure
    from tests.zoo.keras_models import FAMILIES
    from tests.zoo.on_ranks import one_batch

    beyond = []
    for name, side in FAMILIES.items():
        if names and name not in names:
            continue
        found = measure(name)
        results = run_ranks(one_batch, 2, name, side, timeout=550.0, init="tensorflow")
        one, other = (result["digest"] for result in results)
        same = bool((one == other).all())
        if found.error > LIMIT or not same:
            beyond.append(name)
        table.add_contribution(name, found,
                               [YES_NO[same], f"{first_step(name):.1f}" if times else "not measured"])
    return beyond


def main() -> int:
    """Print the table; 1 when an error exceeds its limit or replicas differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "tensorflow"), default="torch")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    if args.framework == "torch":
        table = EmbeddingBlock("seng_zoo", ["replicas equal", "between", "refresh"])
        beyond = of_torch(args.names, table, times=not args.no_times)
    else:
        table = EmbeddingBlock("seng_zoo_keras", ["replicas equal", "first step, ratio to plain"])
        beyond = of_keras(args.names, table, times=not args.no_times)
    if args.docs:
        table.into_docs()
    if beyond:
        print(f"MISSED: the error exceeds its limit, or replicas differ, for {', '.join(beyond)}")
    return int(bool(beyond))


if __name__ == "__main__":
    sys.exit(main())
