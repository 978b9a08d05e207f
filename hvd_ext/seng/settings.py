"""What a user may choose about SENG, checked once on construction."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from hvd_ext import checks
from hvd_ext.horovod_api.signatures import check_old_names
from hvd_ext.seng.sample_axes import check_samples

Damping = float | Callable[[int], float]

# Arguments of earlier versions.
RENAMED = {"stale": 'stale_curvature="keep"|"rescale"', "other": "fallback=", "redraw": "resample="}
DEFAULT_SKETCH_SIZE = 262_144
MOST_COLUMNS = 64  # with rank="auto"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the sketchy empirical natural gradient (Yang et al., "SENG").

    Attributes:
        damping: lam > 0 of SENG eq. 6, or a function from the step (0, 1, ...) to it.
        update_freq: the curvature is taken anew every so many steps (T of SENG Algorithm 1).
        coupling: how ranks share curvature: ``"block"`` (SENG eq. 26), ``"lagged"`` (eq. 27) or
            ``"full"`` (one joint system of all ranks' samples, no block-diagonal approximation).
        uc: form of ``U c`` for implicit layers: ``"factored"`` (SENG eq. 23, 28) or ``"exact"``
            (eq. 22).
        explicit_threshold: a layer with fewer parameters stores U itself, any other its factors.
        sketch: how rows are sampled, ``"uniform"``, ``"leverage"`` or None for no sketch (eq. 14).
        sketch_size: q, rows kept of an explicit layer's least squares problem (eq. 11). A layer
            with no more rows than this is not sketched.
        replacement: whether rows are drawn with replacement.
        resample: when rows are drawn: ``"refresh"``, with the curvature, or ``"step"``, anew at every step
            (SENG Algorithm 1), for a Gram matrix and a factorization of every sketched layer.
        rank: r, columns kept of an implicit layer's factors of one sample (eq. 15). ``"auto"``: of each
            layer, at every refresh, the fewest (at most 64) that the damping leaves meaningful, see
            :func:`hvd_ext.seng.plan.negligible`.
        row_sketch: rows kept of an implicit layer's factors (eq. 17).
        subsample: samples of a rank's batch that the curvature is taken from; None for all.
        memory: most bytes of curvature on a rank, a number or a text such as ``"500MB"``; None for no
            limit. ``explicit_threshold``, ``rank`` and ``subsample`` are upper limits then, and brought
            down to what fits; what was chosen is printed. Rows of embeddings are not counted.
        loss_reduction: whether the loss is the ``"mean"`` or the ``"sum"`` over a rank's batch.
        loss_scale: a constant the loss is multiplied with, such as 1/4 for a loss divided by four
            micro-batches. Mixed precision's scale is not part of it: the gradient scaler knows it.
        curvature_dtype: ``"float32"``, ``"bfloat16"``, ``"float64"`` or the framework's dtype of that
            name; None for the working precision (the parameters', float32 for half-precision ones).
        exclude: names of modules (with all inside them) that get no curvature.
        fallback: what a parameter without curvature gets: ``"identity"`` g/(1+lam), ``"matched"`` g/lam, as
            directions outside of U do in layers with curvature, ``"none"`` g as it is.
        stale_curvature: what a step makes of curvature that is older than it. ``"keep"`` takes it as it is
            (SENG
            Algorithm 1). ``"rescale"`` counts the step's own gradient as one more column of U: p becomes
            ``p / (1 + g^T p)``, layer by layer, so that ``g^T p < 1`` as with curvature of this step.
        samples: where the samples are. None: the first axis of the model's input, and what its layers
            make of it is found out. An axis of the model's input; or a dict from the name of a module
            (it stands for all inside it too) to the axis in the inputs of its layers, to ``"contiguous"``
            or ``"strided"`` (axis 0 holds several rows of each sample, those of one sample side by side
            or a batch apart), to ``"rows"`` (each row counts as a sample) or to a function from the number
            of rows to an array of each row's sample.
        strict: refuse a layer whose rows cannot be told apart by sample, in place of counting each row as
            a sample.
        check_gradients: compare what a layer captures with its own gradient, at the first refresh and
            whenever the layers change; those that differ get no curvature.
        seed: of all row and sample choices; the same on every rank.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: a value outside its limits; the message says what to pass instead.
    """

    damping: Damping
    update_freq: int = 200
    coupling: str = "block"
    uc: str = "factored"
    explicit_threshold: int = 700_000
    sketch: str | None = "uniform"
    sketch_size: int = DEFAULT_SKETCH_SIZE
    replacement: bool = False
    resample: str = "refresh"
    rank: int | str = 16
    row_sketch: int = 512
    subsample: int | None = None
    memory: int | str | None = None
    loss_reduction: str = "mean"
    loss_scale: float = 1.0
    curvature_dtype: Any = None
    exclude: Iterable[str] | None = None
    fallback: str = "identity"
    stale_curvature: str = "keep"
    samples: Any = None
    strict: bool = False
    check_gradients: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        checks.number_or_schedule(
            "damping", self.damping, low=0.0, open_low=True,
            hint="it is added to the curvature's diagonal; 0.1 to 2 are usual for convolutional "
                 "networks with a mean loss",
        )
        checks.check_int("update_freq", self.update_freq, low=1,
                         hint="1 refreshes the curvature at every step, 200 to 1000 are usual")
        checks.check_choice("coupling", self.coupling, ("block", "lagged", "full"))
        checks.check_choice("uc", self.uc, ("factored", "exact"))
        checks.check_int("explicit_threshold", self.explicit_threshold, low=0,
                         hint="0 makes every linear and convolution layer implicit")
        checks.check_choice("sketch", self.sketch, ("uniform", "leverage", None))
        checks.check_int("sketch_size", self.sketch_size, low=1,
                         hint="pass sketch=None for no sketch at all")
        checks.check_bool("replacement", self.replacement)
        checks.check_choice("resample", self.resample, ("refresh", "step"))
        if self.resample == "step" and self.sketch is None:
            raise ValueError('resample must be "refresh" with sketch=None, which draws no rows, got "step"; '
                             "choose a sketch, or leave resample= out")
        if self.rank != "auto":
            checks.check_int("rank", self.rank, low=1,
                             hint='16 is usual, more costs more memory; "auto" takes '
                                                            "what the damping leaves meaningful")
        checks.check_int("row_sketch", self.row_sketch, low=1,
                         hint="pass sketch=None for no sketch at all")
        if self.subsample is not None:
            checks.check_int("subsample", self.subsample, low=1, hint="pass None to use all samples")
        if self.memory is not None:
            checks.check_bytes("memory", self.memory)
            if self.rank == "auto":
                raise ValueError("rank must be a number with memory=, which brings it down to what fits, got "
                                 '"auto"; pass the most that you want, or leave rank= out')
            if self.coupling == "full":
                raise ValueError(
                    f"memory must be None with coupling=\"full\", which holds the sketches of all ranks, got "
                    f'{self.memory!r}; choose coupling="block", or rank= and subsample= yourself')
        checks.check_choice(
            "loss_reduction", self.loss_reduction, ("mean", "sum"),
            hint="SENG reads per-sample gradients off a loss that is the mean or the sum over the "
                 "rank's batch; reduce the loss so and say which",
        )
        checks.check_float("loss_scale", self.loss_scale, low=0.0, open_low=True,
                           hint="1 for a loss that is not multiplied by anything")
        if self.curvature_dtype is not None:  # torch.bfloat16 and tf.bfloat16 are "bfloat16" too
            named = getattr(self.curvature_dtype, "name", self.curvature_dtype)
            object.__setattr__(self, "curvature_dtype", str(named).removeprefix("torch."))
        checks.check_choice("curvature_dtype", self.curvature_dtype,
                            ("float32", "bfloat16", "float64", None))
        checks.check_choice("fallback", self.fallback, ("identity", "matched", "none"),
                            hint="what parameters without curvature get: g/(1+lam), g/lam or g")
        checks.check_choice("stale_curvature", self.stale_curvature, ("keep", "rescale"))
        if self.stale_curvature == "rescale" and self.loss_reduction != "mean":
            raise ValueError(
                'stale_curvature="rescale" compares the step\'s gradient with single samples\' and needs '
                'their mean, got '
                f"loss_reduction={self.loss_reduction!r}; take the mean as loss, or leave stale_curvature= "
                "out")
        check_samples(self.samples)
        checks.check_bool("strict", self.strict)
        checks.check_bool("check_gradients", self.check_gradients)
        checks.check_int("seed", self.seed, low=0)
        if isinstance(self.exclude, str):
            raise TypeError(f"exclude must be a list of names, got {self.exclude!r}; pass "
                            f"[{self.exclude!r}]")
        if self.exclude is not None and not isinstance(self.exclude, Iterable):
            raise TypeError(f"exclude must be a list of names, got {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude or ()))
        for name in self.excluded:
            if not isinstance(name, str):
                raise TypeError(f"exclude must hold names of modules, got {name!r}")

    @property
    def most_columns(self) -> int:
        """The most columns that are kept of a sample's factors."""
        return MOST_COLUMNS if isinstance(self.rank, str) else self.rank

    @property
    def excluded(self) -> tuple[str, ...]:
        """The names in ``exclude``."""
        return tuple(self.exclude or ())

    def fallback_divisor(self, lam: float) -> float:
        """What the gradient of a parameter without curvature is divided by."""
        return {"identity": 1.0 + lam, "matched": lam, "none": 1.0}[self.fallback]

    @property
    def fallback_text(self) -> str:
        """What such a parameter gets, in words."""
        return {"identity": "g/(1 + damping)", "matched": "g/damping", "none": "g as it is"}[self.fallback]

    def damping_at(self, step: int) -> float:
        """lam at this step.

        Raises:
            TypeError: the damping function returned no number.
            ValueError: it returned something not positive and finite.
        """
        value = self.damping(step) if callable(self.damping) else self.damping
        return checks.check_float(f"damping at step {step}", value, low=0.0, open_low=True,
                                  hint="let the schedule stay above zero")

    def check_sketch(self, rows: Iterable[int]) -> None:
        """Refuse a chosen sketch that no explicit layer is large enough for.

        Args:
            rows: n of each explicit layer.

        Raises:
            ValueError: ``sketch_size`` was chosen and exceeds every explicit layer's n.
        """
        largest = max(rows, default=0)
        chosen = self.sketch is not None and self.sketch_size != DEFAULT_SKETCH_SIZE
        if chosen and 0 < largest < self.sketch_size:
            raise ValueError(
                f"sketch_size must be at most {largest}, the rows (parameters) of the largest "
                f"explicit layer, got {self.sketch_size}; pass fewer rows, or sketch=None to solve "
                "with all of them"
            )


def takes_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show the fields of :class:`Settings` in the signature in place of ``**settings``."""
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    shown = [inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, annotation=one.type,
                               default=inspect.Parameter.empty if one.default is MISSING
                               else one.default)
             for one in fields(Settings)]
    whole = signature.replace(parameters=sorted([*own, *shown], key=lambda one: one.kind))

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_old_names("SENG", kwargs, RENAMED)
        try:
            whole.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"SENG: {error}") from None
        return function(*args, **kwargs)

    checked.__signature__ = whole  # type: ignore[attr-defined]
    return checked
