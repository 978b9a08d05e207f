"""Ways to reduce gradients: what their settings must say, and which extensions go together.

The settings of a way to reduce are a frozen dataclass with two class attributes, ``slot``: the
argument of ``DistributedOptimizer`` that takes them ("op" or "compression"), and ``label``: its
name in messages, in Horovod's timeline and, in the compression slot, ``hvd.Compression.<label>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from hvd_ext.consistency.fingerprint import describe_settings
from hvd_ext.reducers.options import DenseReduction

SERVERS = ("rank0", "replicated", "sharded")
SLOTS = ("op", "compression")
HOROVOD_OPS = ("Average", "Sum", "Adasum", "Min", "Max", "Product")  # by Horovod's number, in all front ends


def public_name(settings: Any) -> str:
    """What a user wrote: ``DelayCompensated``, ``Compression.topk``."""
    kind: Any = settings if isinstance(settings, type) else type(settings)
    return f"Compression.{kind.label}" if kind.slot == "compression" else kind.__name__


def describe_reduction(settings: Any) -> list[str]:
    """The settings of a way to reduce as lines of text, the same on ranks that were given the same."""
    if isinstance(settings, DenseReduction):
        compressor = settings.compression
        name = getattr(compressor, "__name__", type(compressor).__name__)
        return [f"reduction: {public_op(settings.op)}", f"predivide={settings.predivide!r}",
                f"compression: {name}"]
    name = public_name(settings)
    return [f"reduction: {name}", *(f"{name} {line}" for line in describe_settings(settings))]


def public_op(op: Any) -> str:
    """One of Horovod's operations as a user wrote it: ``op=Average``."""
    return f"op={op_name(op)}"


def public_server(server: str | None) -> str:
    """A ``server=`` argument as a user wrote it."""
    return "no server=" if server in (None, "", "None") else f"server={server!r}"


def op_name(op: Any) -> str:
    """The name of one of Horovod's operations, which are numbers."""
    return HOROVOD_OPS[op] if isinstance(op, int) and 0 <= op < len(HOROVOD_OPS) else str(op)


def check_registration(settings: Any, table: Mapping[Any, Any], *, replace: bool = False) -> None:
    """Refuse settings that cannot be entered in a table of reducers.

    Raises:
        TypeError: not a dataclass type with ``slot`` and ``label``.
        ValueError: an unknown slot, or a label or type that is taken and ``replace`` is False.
    """
    if not (isinstance(settings, type) and is_dataclass(settings)):
        raise TypeError(f"settings must be a dataclass type, got {settings!r}")
    slot, label = getattr(settings, "slot", None), getattr(settings, "label", None)
    if slot not in SLOTS:
        raise ValueError(f"{settings.__name__}.slot must be 'op' or 'compression', the argument that "
                         f"takes it; got {slot!r}")
    if not (isinstance(label, str) and label.isidentifier()):
        raise TypeError(f"{settings.__name__}.label must be a name such as 'topk', got {label!r}")
    taken = next((one for one in table if one is settings or one.label == label), None)
    if taken is not None and not replace:
        raise ValueError(f"{label!r} is registered already, for {taken.__name__}; choose another "
                         "label, or pass replace=True to replace it")


def register_settings(settings: Any, reducer: Any, table: dict[Any, Any], compressions: Any, *,
                      replace: bool = False) -> None:
    """Enter a way to reduce in a front end's table.

    Args:
        settings: as the head of this module says.
        reducer: the class that serves them.
        table: from type of settings to reducer.
        compressions: the class that gets ``<label>`` as an attribute, in the compression slot.
        replace: allow to replace settings or a label that exist.

    Raises:
        As :func:`check_registration`.
    """
    check_registration(settings, table, replace=replace)
    for taken in [one for one in table if one.label == settings.label]:
        del table[taken]
    table[settings] = reducer
    if settings.slot == "compression":
        setattr(compressions, settings.label, settings)


def check_combination(*, op: Any, compression: Any, op_name: str, predivide: float, server: str | None,
                      multiple_evaluations: bool = False) -> None:
    """Refuse what cannot be combined.

    Args:
        op: settings of a registered way to reduce given as ``op=``, else None.
        compression: settings given as ``compression=``, else None.
        op_name: the plain operation's name; "Average" where ``op`` is not None.
        predivide: ``gradient_predivide_factor``.
        server: the ``server=`` argument.
        multiple_evaluations: the wrapped optimizer evaluates a closure several times per step.

    Raises:
        ValueError: names both arguments and what to do instead.
    """
    if op is not None and compression is not None:
        raise ValueError(
            f"compression={public_name(compression)} and op={public_name(op)} cannot be combined: "
            "each needs every rank's whole gradient to itself; drop one of them"
        )
    if compression is not None and op_name != "Average":
        raise ValueError(
            f"compression={public_name(compression)} and op={op_name} cannot be combined: it "
            "averages what the ranks send; use op=Average, or Compression.fp16"
        )
    if predivide != 1.0 and (op is not None or compression is not None or op_name != "Average"):
        raise ValueError("gradient_predivide_factor not supported with op != Average or with "
                         "compression other than none and fp16; leave it at 1.0")
    if server is not None and server not in SERVERS:
        raise ValueError(f"server must be one of {', '.join(map(repr, SERVERS))}; got {server!r}")
    if multiple_evaluations:
        raise ValueError(
            "an optimizer that evaluates its closure several times per step (LBFGS) cannot be "
            "combined with op=DelayCompensated, a compression with error feedback, a preconditioner "
            "or any server=; leave these out, or use SGD or Adam"
        )


def method_of(table: Mapping[Any, Any], op: Any, compression: Any) -> Any:
    """The settings of a registered way to reduce among the two arguments; None for Horovod's own."""
    return next((one for one in (op, compression) if type(one) in table), None)


def choose_settings(table: Mapping[Any, Any], *, op: Any, compression: Any, op_name: str,
                    casts: Sequence[Any], predivide: float, server: str | None = None,
                    multiple_evaluations: bool = False) -> Any:
    """The settings that decide the reducer, after :func:`check_combination`; None for Horovod's own
    reduction.

    Args:
        table: of registered ways to reduce.
        op_name: the plain operation's name; ignored where ``op`` is registered.
        casts: the compressions that only cast, which go with every ``op``.

    Raises:
        ValueError: what cannot be combined.
    """
    by_op = op if type(op) in table else None
    check_combination(op=by_op, compression=compression if type(compression) in table else None,
                      op_name="Average" if by_op is not None else op_name, predivide=predivide, server=server,
                      multiple_evaluations=multiple_evaluations)
    if by_op is not None and compression not in casts:
        raise ValueError(f"compression={compression!r} and op={public_name(op)} cannot be combined; "
                         "use Compression.none or Compression.fp16")
    return method_of(table, op, compression)
