"""Which way to exchange gradients, and why, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvd_ext.planning.exchange import Exchange
from hvd_ext.planning.simulate import Result

MIN_SPEEDUP = 1.10  # a way that changes training more must be faster by this factor

# What changes training least comes first. Ways that are chosen for what they compute, and not for speed,
# are not among them: delay compensation, SENG, servers.
BY_CHANGE = ("dense", "fp16", "powersgd", "topk sparse_allreduce", "topk", "overlap", "overlap, fp16",
             "overlap, topk sparse_allreduce", "overlap, topk")
WHAT = {
    "dense": "plain Horovod",
    "fp16": "compression=hvd.Compression.fp16",
    "powersgd": "compression=hvd.Compression.powersgd()",
    "topk": "compression=hvd.Compression.topk()",
    "topk sparse_allreduce": 'compression=hvd.Compression.topk(exchange="sparse_allreduce")',
}


@dataclass(frozen=True)
class Row:
    """A way, what it takes, and what it moves."""

    exchange: Exchange
    result: Result
    rank_bytes: float
    link_bytes: float


@dataclass(frozen=True)
class Recommendation:
    """A method of the table and the reason for it."""

    method: str
    argument: str
    reason: str


def _short_name(name: str) -> str:
    """The name without PowerSGD's rank."""
    return name.partition(" rank ")[0]


def _argument_of(name: str) -> str:
    short = _short_name(name)
    if not short.startswith("overlap"):
        return WHAT[short]
    inner = short.removeprefix("overlap").removeprefix(", ")
    return "overlap=hvd.DelayedUpdate()" + (f", {WHAT[inner]}" if inner else "")


def candidates(rows: Sequence[Row], compute: float) -> list[Row]:
    """The rows that may be recommended; late ones need a compute to hide behind."""
    return [row for row in rows if _short_name(row.exchange.name) in BY_CHANGE
            and (compute > 0 or not row.exchange.delayed)]


def fastest(rows: Sequence[Row], compute: float) -> Row:
    """The row with the shortest step, of those that may be recommended; of all where none may be."""
    return min(candidates(rows, compute) or rows, key=lambda row: row.result.step)


def recommend_method(rows: Sequence[Row], compute: float) -> Recommendation | None:
    """The way that changes training least among those within 10 % of the quickest.

    None where no row may be recommended.

    Args:
        rows: of the table.
        compute: seconds of forward and backward pass.
    """
    allowed = candidates(rows, compute)
    if not allowed:
        return None
    best = fastest(allowed, compute)
    chosen = min((row for row in allowed if row.result.step <= MIN_SPEEDUP * best.result.step),
                 key=lambda row: BY_CHANGE.index(_short_name(row.exchange.name)))
    dense = next((row for row in rows if row.exchange.name == "dense"), chosen)
    name = chosen.exchange.name
    return Recommendation(name, _argument_of(name), _explain_choice(chosen, best, dense, compute))


def _explain_choice(chosen: Row, best: Row, dense: Row, compute: float) -> str:
    took = "a step" if compute else "an exchange"
    mine, plain = chosen.result.step, dense.result.step
    if chosen is dense:
        if compute and plain <= MIN_SPEEDUP * compute:
            return (f"its exchange ({_format_ms(dense.result.exchange)}) is hidden behind the backward pass: "
                    f"{took} takes {_format_ms(plain)}, the compute alone {_format_ms(compute)}")
        said = (f"no way that sends less is faster by more than {MIN_SPEEDUP - 1:.0%}: {took} takes "
                f"{_format_ms(plain)}")
        return said if best is dense else f"{said}, with {best.exchange.name} {_format_ms(best.result.step)}"
    said = (f"{took} takes {_format_ms(mine)}, {mine / plain:.2f} of dense, for "
            f"{chosen.rank_bytes / 1e6:.3g} MB in and out of a rank in place of {dense.rank_bytes / 1e6:.3g}")
    if chosen is not best:
        said += (f"; {best.exchange.name} would take {_format_ms(best.result.step)}, too little less "
                 "for what it "
                 "changes in training")
    return said


def _format_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:,.0f} ms"
