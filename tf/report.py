"""``optimizer.report()``: the figures of the last step, under the names of the PyTorch front end."""

from __future__ import annotations

from typing import Any

from hvd_ext.tensorflow.reducers.base import Reducer


def report(reducer: Reducer, preconditioner: Any = None) -> dict[str, Any]:
    """Bytes by kind, and the figures of each extension in use.

    Under Horovod elastic bytes are not counted, and "sent" and "received" are left out.
    """
    found: dict[str, Any] = {}
    if not reducer.collectives.elastic:
        found["sent"], found["received"] = reducer.collectives.traffic.last()
    found.update(reducer.report())
    if preconditioner is not None:
        found["preconditioner"] = preconditioner.report()
    return found
