"""The table of docs/seng.md: ``python -m tests.zoo [--docs] [NAME ...]``.

It is printed, written to ``out/seng_zoo.md`` and, with ``--docs``, put into the page.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.zoo import lacking
from tests.zoo.measure import Measured, measure
from tests.zoo.timm_models import TIMM
from tests.zoo.transformers_models import TRANSFORMERS

BEGIN, END = "<!-- out/seng_zoo.md -->", "<!-- end -->"
HEAD = ("| model | parameters | with a rule | samples on | error | why the rest has none |",
        "|---|--:|--:|---|--:|---|")


def row(name: str, found: Measured) -> str:
    """A model's line."""
    causes = "; ".join(f"{100 * count / found.parameters:.1f} % {cause}" for cause, count in found.gaps)
    share = f"{100 * found.coverage:.1f} %" if found.gaps else "100 %"
    return (f"| {name} | {found.parameters:,} | {share} | {', '.join(found.placements)} | {found.error:.0e} "
            f"| {causes} |")


def put_into_docs(lines: list[str]) -> None:
    """Replace what is between the page's two comments."""
    page = Path("docs/seng.md")
    head, rest = page.read_text().split(BEGIN)
    page.write_text("\n".join([f"{head}{BEGIN}", *lines, END]) + rest.split(END)[1])


def main(names: list[str]) -> int:
    """Print the table; 1 when an error exceeds its limit."""
    torch.set_num_threads(1)
    docs = "--docs" in names
    names = [name for name in names if name != "--docs"]
    lines, beyond = list(HEAD), []
    print("\n".join(HEAD))
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
            lines.append(row(name, found))
            print(lines[-1], flush=True)
    out = Path("out")
    out.mkdir(exist_ok=True)
    (out / "seng_zoo.md").write_text("\n".join(lines) + "\n")
    if docs:
        put_into_docs(lines)
    if beyond:
        print(f"MISSED: the error exceeds its limit for {', '.join(beyond)}")
    return int(bool(beyond))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
