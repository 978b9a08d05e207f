"""``memory=``: which layers hold U itself, which rank and how many samples fit into a number of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hvd_ext import checks
from hvd_ext.seng.plan import LayerPlan, LayerShape, elements_held, plan_layer
from hvd_ext.seng.settings import Settings

SAMPLES = 64  # what room is made for first, unless ``subsample`` says otherwise
LEAST_RANK = 4  # below it, samples go first
ROW = 16  # bytes of a sampled row's number and weight


def bytes_held(shapes: Sequence[LayerShape], settings: Settings, samples: int, itemsize: int) -> int:
    """Most bytes of curvature of these layers: SENG Table 2, and the small systems with their factors.

    The rows that samples use of an embedding's table hang on the data and are not in it.
    """
    total = 0
    for shape in shapes:
        plan = plan_layer(shape, settings)
        if not shape.lookup or shape.product:
            r = min(settings.most_columns, shape.n_g, shape.n_a)
            numbers = elements_held(shape, plan, rho=samples, r=r)
            if plan.implicit:  # biases that no row of ones stands for
                numbers += samples * max(shape.n - shape.groups * shape.n_g * shape.n_a, 0)
            total += numbers * itemsize
            total += ROW * ((plan.sketch or 0) + (plan.rows_g or 0) + (plan.rows_a or 0))
        total += 2 * samples**2 * 8  # float64
    return total


def stored_itemsize(settings: Settings, itemsize: int) -> int:
    """Bytes of a number of U; ``itemsize`` are those of one that is computed with."""
    return {"bfloat16": 2, "float32": 4, "float64": 8}.get(settings.curvature_dtype, itemsize)


def within_memory(shapes: Sequence[LayerShape], settings: Settings, itemsize: int) -> Settings:
    """The settings with ``explicit_threshold``, ``rank`` and ``subsample`` brought down to what fits.

    Room is made for ``subsample`` samples (64 where it is None) by holding fewer layers' U itself, the
    largest first; then by a lower rank, down to 4; then by fewer samples. Where there is room for more
    samples than 64, as many are taken as fit.

    Args:
        itemsize: bytes of a number that is computed with; ``curvature_dtype`` goes before it.

    Raises:
        ValueError: not even one sample fits.
    """
    if settings.memory is None:
        return settings
    budget = checks.check_bytes("memory", settings.memory)
    itemsize = stored_itemsize(settings, itemsize)
    wanted = settings.subsample or SAMPLES
    tried = list(_effective_thresholds(shapes, settings))
    for rank in _successive_halves(settings.most_columns, min(LEAST_RANK, settings.most_columns)):
        for threshold in tried:
            chosen = replace(settings, rank=rank, explicit_threshold=threshold)
            if bytes_held(shapes, chosen, wanted, itemsize) <= budget:
                most = settings.subsample or _max_samples(shapes, chosen, budget, itemsize)
                return replace(chosen, subsample=most)
    for samples in _successive_halves(wanted, 1):
        for rank in _successive_halves(min(LEAST_RANK, settings.most_columns), 1):
            for threshold in tried:
                chosen = replace(settings, rank=rank, explicit_threshold=threshold, subsample=samples)
                if bytes_held(shapes, chosen, samples, itemsize) <= budget:
                    most = _max_samples(shapes, chosen, budget, itemsize)
                    return replace(chosen, subsample=min(most, wanted))
    least = min(bytes_held(shapes, replace(settings, rank=1, explicit_threshold=threshold), 1, itemsize)
                for threshold in tried)
    raise ValueError(f"memory must be at least {least:,} bytes, one sample's curvature of this model, got "
                     f"{settings.memory!r}; pass more, or name layers in exclude=")


def memory_text(settings: Settings, plans: Sequence[LayerPlan]) -> str:
    """What was chosen, in a sentence."""
    implicit = sum(plan.implicit for plan in plans)
    return (f"SENG: memory={settings.memory!r} is kept with U itself for {len(plans) - implicit} layers "
            f"(explicit_threshold={settings.explicit_threshold:,}), factors of rank {settings.rank} for "
            f"{implicit}, and at most {settings.subsample:,} samples of a rank's batch")


def _effective_thresholds(shapes: Sequence[LayerShape], settings: Settings) -> Iterator[int]:
    """Values of ``explicit_threshold`` that differ in effect, the largest first."""
    yield settings.explicit_threshold
    sizes = {shape.n for shape in shapes if shape.product and shape.n < settings.explicit_threshold}
    yield from sorted(sizes, reverse=True)


def _successive_halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        yield value
        value //= 2
    yield max(value, least)


def _max_samples(shapes: Sequence[LayerShape], settings: Settings, budget: int, itemsize: int) -> int:
    """The most samples that fit; one does."""
    low, high = 1, 2
    while bytes_held(shapes, settings, high, itemsize) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = bytes_held(shapes, settings, middle, itemsize) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low
