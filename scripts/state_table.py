"""The table of docs/checkpoints.md: the state that each extension declares.

    python -m scripts.state_table
"""

from __future__ import annotations

from hvd_ext import seng
from hvd_ext.reducers import delay_compensation, delayed_update, powersgd, topk
from hvd_ext.state import DROP, GATHER, KEEP, MEAN, RANK, SHARD, SHARED

METHODS = {
    "`hvd.DelayCompensated`": delay_compensation.STATE,
    "`hvd.Compression.topk`": topk.STATE,
    "`hvd.Compression.powersgd`": powersgd.STATE,
    "`overlap=`": delayed_update.STATE,
    "`hvd.SENG`": seng.STATE,
}
WHOSE = {SHARED: "the same on every rank", RANK: "each rank's own", SHARD: "a slice on each rank"}
FATE = {KEEP: "stays", MEAN: "every rank takes the mean over the ranks", DROP: "begins new",
        GATHER: "is put together and cut anew"}
OWNED = "goes into the residuals, then their mean"  # of a sparse allreduce


def rows() -> list[tuple[str, str, str, str]]:
    """Method, state, scope and fate of each part that has a label."""
    return [(method, part.label, WHOSE[part.scope], OWNED if part is topk.OWNED else FATE[part.resize])
            for method, parts in METHODS.items() for part in parts if part.label]


def table() -> str:
    """The table in Markdown, without its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows())


if __name__ == "__main__":
    print(table())
