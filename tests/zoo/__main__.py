"""The tables of docs/seng.md: ``python -m tests.zoo [--framework tensorflow] [--docs] [NAME ...]``.

A table is printed, written to ``out/`` and, with ``--docs``, put into the page. For Keras ``--no-times``
leaves out the times of first steps, for which each model is started twice more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.zoo import lacking
from tests.zoo.table import Table


def of_torch(names: Sequence[str], table: Table) -> list[str]:
    """Tiny models of timm and transformers; those whose error exceeds its limit."""
    import torch

    from tests.zoo.measure import measure
    from tests.zoo.timm_models import TIMM
    from tests.zoo.transformers_models import TRANSFORMERS

    torch.set_num_threads(1)
    beyond = []
    for package, models in (("timm", TIMM), ("transformers", TRANSFORMERS)):
        why = lacking(package)
        if why:
            print(f"{why}: its models are left out")
            continue
        for name, model in models.items():
            if names and name not in names:
                continue
            found = measure(model)
            if found.error > model.limit:
                beyond.append(name)
            table.add(name, found)
    return beyond


def of_keras(names: Sequence[str], table: Table, *, times: bool) -> list[str]:
    """The families of ``keras.applications``; those whose error exceeds its limit."""
    from tests.zoo.keras_measure import LIMIT, first_step, measure
    from tests.zoo.keras_models import FAMILIES

    beyond = []
    for name in FAMILIES:
        if names and name not in names:
            continue
        found = measure(name)
        if found.error > LIMIT:
            beyond.append(name)
        table.add(name, found, [f"{first_step(name):.1f}"] if times else ["not measured"])
    return beyond


def main() -> int:
    """Print the table; 1 when an error exceeds its limit."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "tensorflow"), default="torch")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    if args.framework == "torch":
        table = Table("seng_zoo")
        beyond = of_torch(args.names, table)
    else:
        table = Table("seng_zoo_keras", ["first step, ratio to plain"])
        beyond = of_keras(args.names, table, times=not args.no_times)
    table.write(docs=args.docs)
    if beyond:
        print(f"MISSED: the error exceeds its limit for {', '.join(beyond)}")
    return int(bool(beyond))


if __name__ == "__main__":
    sys.exit(main())
