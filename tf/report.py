"""``optimizer.report()``: the figures of the last step, under the names of the PyTorch front end."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import numpy as np

from hvd_ext.tensorflow.reducers.base import Reducer
from hvd_ext.tensorflow.reducers.delay import DelayReducer
from hvd_ext.tensorflow.reducers.topk import TopKReducer
from hvd_ext.topk.plan import DENSE, TOPK


def report(reducer: Reducer, preconditioner: Any = None) -> dict[str, Any]:
    """Bytes by kind, and the figures of each extension in use.

    Under Horovod elastic bytes are not counted, and "sent" and "received" are left out.
    """
    found: dict[str, Any] = {}
    if not reducer.collectives.elastic:
        found["sent"], found["received"] = reducer.collectives.traffic.last()
    found.update(figures(reducer))
    if preconditioner is not None:
        found["preconditioner"] = preconditioner.report()
    return found


@singledispatch
def figures(reducer: Reducer) -> dict[str, Any]:
    """What a reducer says of its last step; the plain one nothing."""
    return {}


@figures.register
def _(reducer: DelayReducer) -> dict[str, Any]:
    return {
        "workers": reducer.collectives.size * reducer.parts,
        "buckets": len(reducer.buckets),
        **_counters(reducer, "steps", "unusable_steps"),
        "bytes_held": _bytes(reducer.per_rank_state()),
    }


@figures.register
def _(reducer: TopKReducer) -> dict[str, Any]:
    elements = {kind: sum(bucket.numel for bucket in reducer.buckets if bucket.kind.route == kind)
                for kind in (TOPK, DENSE)}
    found: dict[str, Any] = {}
    taken = reducer.step_taken()
    if taken is not None:
        before = int(reducer.steps) + int(reducer.skipped_steps) - 1
        found = {
            "step_taken": taken,
            "ratio": reducer.config.ratio_at(before),
            "kept_fraction": int(reducer.kept) / elements[TOPK] if elements[TOPK] else 1.0,
        }
    norms = [float(np.linalg.norm(residual.numpy().astype(np.float64)))
             for residual in reducer.per_rank_state()]
    return {
        **found,
        "residual_norm": math.hypot(*norms),
        **_counters(reducer, "steps", "skipped_steps"),
        "buckets": len(reducer.buckets),
        "compressed_elements": elements[TOPK],
        "dense_elements": elements[DENSE],
        "bytes_held": _bytes(reducer.per_rank_state()),
    }


def _counters(reducer: Any, *names: str) -> dict[str, int]:
    """Counters, 0 before the first step has made them."""
    found = {name: getattr(reducer, name) for name in names}
    return {name: 0 if counter is None else int(counter) for name, counter in found.items()}


def _bytes(variables: list[Any]) -> int:
    return sum(int(v.shape.num_elements()) * v.dtype.size for v in variables)
