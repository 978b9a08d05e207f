"""Which extensions go together; a combination without meaning is refused by both front ends alike."""

from __future__ import annotations

SERVERS = ("rank0", "replicated", "sharded")


def check(*, delay: bool, topk: bool, op_name: str, predivide: float, server: str | None,
          multiple_evaluations: bool) -> None:
    """Refuse what cannot be combined.

    Args:
        delay: ``op`` is a DelayCompensated.
        topk: ``compression`` is a TopK.
        op_name: the plain operation's name, "Average" with ``delay``.
        predivide: ``gradient_predivide_factor``.
        server: the ``server=`` argument.
        multiple_evaluations: the wrapped optimizer evaluates a closure several times a step.

    Raises:
        ValueError: names both arguments and the way out.
    """
    if topk and delay:
        raise ValueError(
            "compression=Compression.topk and op=DelayCompensated do not go together: compensation "
            "needs every rank's whole gradient; drop one of them"
        )
    if topk and op_name != "Average":
        raise ValueError(
            f"compression=Compression.topk and op={op_name} do not go together: TopK sums what the "
            "ranks send and divides by their number; use op=Average, or Compression.fp16"
        )
    if predivide != 1.0 and (delay or topk or op_name != "Average"):
        raise ValueError("gradient_predivide_factor not supported with op != Average or with TopK; "
                         "leave it at 1.0")
    if server is not None and server not in SERVERS:
        raise ValueError(f"server must be one of {', '.join(map(repr, SERVERS))}; got {server!r}")
    if multiple_evaluations:
        raise ValueError(
            "an optimizer that evaluates its closure several times a step (LBFGS) cannot be "
            "combined with op=DelayCompensated, TopK, a preconditioner or server=; use SGD or Adam"
        )
