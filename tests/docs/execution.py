"""Runs blocks on a rank. Those of a page and front end that follow each other share their names."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

from tests.docs.blocks import BLOCKS, Block, chain_of, front_end_of
from tests.docs.completion import complete_block, find_open_names
from tests.ranks import own_rank

ON_RANK_0 = "# on rank 0"  # what a block says that not all ranks run
# What came of the blocks of this rank so far, by page and front end: the names, and the lines that have run.
RUN: dict[tuple[str, str], tuple[dict[str, Any], list[int]]] = {}


def run_block(place: str, folder: str) -> None:
    """Run a block after those of its page that come before it and have not run yet.

    Args:
        place: ``page:line``.
        folder: of the test, on all ranks the same.
    """
    block = next(block for block in BLOCKS if block.place == place)
    key = block.page, front_end_of(block)
    if key not in RUN:
        module = types.ModuleType("page_" + re.sub(r"\W", "_", block.page))
        sys.modules[module.__name__] = module  # where dataclasses look for it
        module.__dict__["_folder_"] = folder
        RUN[key] = module.__dict__, []
    names, lines = RUN[key]
    for one in chain_of(block):
        if one.line not in lines:
            lines.append(one.line)
            if own_rank() == 0 or ON_RANK_0 not in one.source:
                _run(one, names)


def _run(block: Block, names: dict[str, Any]) -> None:
    offered = importlib.import_module(f"tests.docs.{front_end_of(block)}_names")
    tree = complete_block(block.source, offered.USUAL_ARGUMENTS, names["_folder_"])
    of_section = offered.SECTIONS.get((block.page, block.section), {})
    if "import hvd_ext" in block.source:  # a script of its own
        for name in [name for name in names if not name.startswith("_")]:
            del names[name]
    for name in (*offered.ALWAYS_NEW, *of_section):
        names.pop(name, None)
    names.update(_makers_={**offered.MAKERS, **of_section},
                 _seed_=offered.hvd.rank() if "roadcast" in block.source else 0)
    for name in find_open_names(tree):
        offered.need(names, name)
    kept = dict(names)
    where = block.page, block.section
    with _horovods_modules_kept():
        exec(compile(tree, block.place, "exec"), names)
        if where in offered.AGAIN:
            names |= {name: make(names) for name, make in offered.AGAIN[where].items()}
            exec(compile(tree, block.place, "exec"), names)
        made = {name: value for name, value in names.items() if kept.get(name) is not value}
        offered.train_with(made, names)
    if where not in offered.ALONE and ON_RANK_0 not in block.source and "model" in names:
        offered.hvd.assert_replicas_equal(names["model"])
    if where in offered.PROOFS:
        offered.PROOFS[where](names)


@contextlib.contextmanager
def _horovods_modules_kept() -> Iterator[None]:
    """A block may put our module in place of Horovod's."""
    horovod = importlib.import_module("horovod")
    front_ends = {"horovod.torch", "horovod.tensorflow"} & sys.modules.keys()
    parts = {name: sys.modules[name] for name in front_ends}
    try:
        yield
    finally:
        for name, part in parts.items():
            sys.modules[name] = part
            setattr(horovod, name.split(".")[1], part)
