"""What SENG's ranks must have in common, and the errors when they do not."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_ext.consistency.fingerprint import Fingerprint, describe_settings, mismatch_message, mismatched_ranks
from hvd_ext.seng.plan import LayerPlan, LayerShape
from hvd_ext.seng.sample_axes import describe_samples
from hvd_ext.seng.settings import Settings


def layers_fingerprint(settings: Settings, layers: Sequence[tuple[str, LayerShape, LayerPlan]]
                       ) -> Fingerprint:
    """Settings and layers in a form that ranks can compare.

    Args:
        layers: of each layer a name that is the same on every rank, its shape and its plan.
    """
    lines = describe_settings(settings, leave_out=("damping", "samples"))
    lines.append(f"samples={describe_samples(settings.samples)!r}")
    lines.append(f"damping={settings.damping_at(0)!r} at step 0")
    lines += [f"{name}: {shape.kind}, {shape.groups} groups of {shape.n_g} x {shape.n_a}, "
              f"{shape.n} parameters, {plan}" for name, shape, plan in layers]
    return Fingerprint(tuple(lines))


def check_same_layers(by_rank: Sequence[Sequence[str]]) -> None:
    """Compare the ranks' fingerprint lines.

    Raises:
        RuntimeError: they differ; names the ranks and what differs.
    """
    if mismatched_ranks([list(lines) for lines in by_rank]):
        raise RuntimeError(mismatch_message(
            "SENG has different layers or settings on different ranks", by_rank,
            "Construct the same model, with the same arguments of SENG, on every rank"))


def states_differ(steps: Sequence[int]) -> RuntimeError:
    """The error for ranks whose states do not belong together; ``steps`` by rank."""
    return RuntimeError(
        f"SENG's state differs between ranks: they are at steps {list(steps)} (by rank); load "
        "every rank's own state, or call reset_state() on all of them")


def strict_refusal(layers: Sequence[str]) -> str:
    """The error of ``strict=True`` for layers whose samples cannot be told apart."""
    return (f"SENG cannot tell which rows of {', '.join(layers)} belong to which sample, so that each row "
            "would count as a sample of its own, which is another curvature; say where the samples are with "
            "samples={name: ...}, name the layers in exclude=, or pass strict=False")
