"""One layer's curvature in blocks over disjoint parameters, which share one coefficient per sample.

:class:`Explicit` holds U of one parameter, :class:`FactoredBlock` the factors of a weight (and of biases
that are rows of ones). Gradients are flat, one per parameter of the layer.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from hvd_ext.seng import LayerPlan
from hvd_ext.torch.seng import kernels
from hvd_ext.torch.seng.kernels import to_compute_dtype

Chooser = Callable[[str, int, int], "tuple[torch.Tensor, torch.Tensor]"]
"""``choose(label, n, q)`` gives rows (q,) int64 and weights (q,) in the working precision."""


@dataclass(eq=False)
class Block(abc.ABC):
    """Curvature of some of a layer's parameters."""

    @property
    @abc.abstractmethod
    def sample_count(self) -> int:
        """rho, this rank's samples."""

    @abc.abstractmethod
    def row_scores(self, label: str) -> torch.Tensor | None:
        """Squared row norms of what ``label`` samples; None when it samples nothing of this block."""

    @abc.abstractmethod
    def sample_rows(self, plan: LayerPlan, choose: Chooser) -> None:
        """Sample rows and form Xi (SENG eq. 12, 17)."""

    @abc.abstractmethod
    def without_sketch(self) -> Block:
        """The same with this rank's own samples and all rows in place of Xi."""

    @abc.abstractmethod
    def sketches_by_name(self) -> dict[str, torch.Tensor]:
        """Xi by name, samples along the first axis, to be gathered from all ranks."""

    @abc.abstractmethod
    def set_gathered(self, name: str, gathered: torch.Tensor) -> None:
        """Put all ranks' Xi in place of this rank's; samples along the first axis."""

    @abc.abstractmethod
    def gram_matrix(self) -> torch.Tensor:
        """``Xi^T Xi`` of all samples of the system (SENG eq. 12, 21)."""

    @abc.abstractmethod
    def project_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """``Xi^T xi`` of the layer's gradients (SENG eq. 12, 19)."""

    @abc.abstractmethod
    def message_size(self, uc: str) -> int:
        """Numbers in this block's message."""

    @abc.abstractmethod
    def local_contribution(self, b: torch.Tensor, own: torch.Tensor, ranks: int, uc: str,
                           out: torch.Tensor) -> None:
        """Write what this rank adds to ``U b`` such that the mean over ranks is subtracted.

        Args:
            b: the coefficients of the whole system, ``own`` those of this rank's samples.
            ranks: M where U is ``[U_1 ... U_M]/sqrt(M)`` (full coupling), else 1.
            uc: "factored" or "exact".
            out: (message_size,).
        """

    @abc.abstractmethod
    def apply_single_rank(self, b: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                          uc: str) -> None:
        """The same on a single rank, where nothing is sent and ``U b`` need not be formed."""

    @abc.abstractmethod
    def apply_direction(self, mean: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                        uc: str) -> None:
        """``gradients <- (gradients - U b)/lam`` in place (SENG eq. 8), with the mean message."""

    def pad_columns(self, r: int) -> None:  # noqa: B027  (only factors have columns)
        """Bring the factors to ``r`` columns per sample, as other ranks have them."""

    @property
    def r(self) -> int:
        """Columns kept per sample; 0 without factors."""
        return 0

    @property
    @abc.abstractmethod
    def itemsize(self) -> int:
        """Bytes of one number as stored."""

    def held_tensors(self) -> list[torch.Tensor]:
        """All tensors held; one that is held twice is in it twice."""
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]

    def block_state(self) -> dict[str, Any]:
        """For a checkpoint: the block's name there and every field."""
        return {"type": next(name for name, kind in BLOCKS.items() if kind is type(self)),
                **{field.name: getattr(self, field.name) for field in fields(self)}}


@dataclass(eq=False)
class Explicit(Block):
    """U of parameter ``index``: ``u`` (rho, n); ``xi`` (rho or all ranks' samples, q) its sampled rows.

    Its rows are those from ``start`` on of the layer's ``height`` explicit ones. ``rows`` and
    ``weights`` (q,) are None, and ``xi`` is ``u``, when the layer is not sketched.
    """

    index: int
    u: torch.Tensor
    xi: torch.Tensor
    rows: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    start: int = 0
    height: int = 0

    @property
    def sample_count(self) -> int:
        return self.u.shape[0]

    @property
    def itemsize(self) -> int:
        return self.u.element_size()

    def row_scores(self, label: str) -> torch.Tensor | None:
        return to_compute_dtype(self.u).square().sum(0) if label == "rows" else None

    def sample_rows(self, plan: LayerPlan, choose: Chooser) -> None:
        if plan.sketch is None:
            return
        rows, weights = choose("rows", self.height, plan.sketch)
        inside = (rows >= self.start) & (rows < self.start + self.u.shape[1])
        self.rows, self.weights = rows[inside] - self.start, weights[inside]
        self.xi = _weighed(self.u, 1, self.rows, self.weights)

    def without_sketch(self) -> Explicit:
        return replace(self, xi=self.u, rows=None, weights=None)

    def sketches_by_name(self) -> dict[str, torch.Tensor]:
        return {"xi": self.xi.contiguous()}

    def set_gathered(self, name: str, gathered: torch.Tensor) -> None:
        self.xi = gathered

    def gram_matrix(self) -> torch.Tensor:
        return kernels.gram_explicit(self.xi)

    def project_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        z = gradients[self.index]
        if self.rows is not None and self.weights is not None:
            z = z.index_select(0, self.rows) * self.weights
        return kernels.project_explicit(self.xi, z)

    def message_size(self, uc: str) -> int:
        return self.u.shape[1]

    def local_contribution(self, b: torch.Tensor, own: torch.Tensor, ranks: int, uc: str,
                           out: torch.Tensor) -> None:
        kernels.expand_explicit(self.u, own * ranks ** 0.5 if ranks > 1 else own, out)

    def apply_direction(self, mean: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                        uc: str) -> None:
        gradients[self.index].sub_(mean).mul_(1.0 / lam)

    def apply_single_rank(self, b: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                          uc: str) -> None:
        kernels.subtract_explicit(gradients[self.index], self.u, b, lam)


@dataclass(eq=False)
class FactoredBlock(Block):
    """Factors of the parameters ``indices`` (a weight, then biases).

    ``g`` (groups, n_G, r, rho), ``a`` (groups, n_A, r, rho), of whose rows the first ``width`` stand
    for the weight and the rest for biases; ``xg``, ``xa`` their sampled rows, weighted. The first
    ``split`` of A's sampled rows are the weight's.
    """

    indices: tuple[int, ...]
    width: int
    g: torch.Tensor
    a: torch.Tensor
    xg: torch.Tensor
    xa: torch.Tensor
    rows_g: torch.Tensor | None = None
    weights_g: torch.Tensor | None = None
    rows_a: torch.Tensor | None = None
    weights_a: torch.Tensor | None = None
    split: int = -1

    def __post_init__(self) -> None:
        if self.split < 0:
            self.split = self.width

    @property
    def sample_count(self) -> int:
        return self.g.shape[-1]

    @property
    def r(self) -> int:
        return self.g.shape[2]

    @property
    def itemsize(self) -> int:
        return self.g.element_size()

    def row_scores(self, label: str) -> torch.Tensor | None:
        factor = {"rows_g": self.g, "rows_a": self.a}.get(label)
        return None if factor is None else to_compute_dtype(factor).square().sum((0, 2, 3))

    def sample_rows(self, plan: LayerPlan, choose: Chooser) -> None:
        if plan.rows_g is not None:
            self.rows_g, self.weights_g = choose("rows_g", self.g.shape[1], plan.rows_g)
            self.xg = _weighed(self.g, 1, self.rows_g, self.weights_g[:, None, None])
        if plan.rows_a is not None:
            self.rows_a, self.weights_a = choose("rows_a", self.a.shape[1], plan.rows_a)
            self.xa = _weighed(self.a, 1, self.rows_a, self.weights_a[:, None, None])
            self.split = int((self.rows_a < self.width).sum())

    def without_sketch(self) -> FactoredBlock:
        return replace(self, xg=self.g, xa=self.a, rows_g=None, weights_g=None, rows_a=None, weights_a=None,
                       split=-1)

    def sketches_by_name(self) -> dict[str, torch.Tensor]:
        return {"xg": kernels.samples_first(self.xg), "xa": kernels.samples_first(self.xa)}

    def set_gathered(self, name: str, gathered: torch.Tensor) -> None:
        if name == "xg":
            self.xg = kernels.samples_last(gathered)
        else:
            self.xa = kernels.samples_last(gathered)

    def pad_columns(self, r: int) -> None:
        apart = self.xg is not self.g, self.xa is not self.a
        self.g, self.a = kernels.pad_columns(self.g, r), kernels.pad_columns(self.a, r)
        self.xg = kernels.pad_columns(self.xg, r) if apart[0] else self.g
        self.xa = kernels.pad_columns(self.xa, r) if apart[1] else self.a

    def gram_matrix(self) -> torch.Tensor:
        return kernels.gram_implicit(to_compute_dtype(self.xg), to_compute_dtype(self.xa))

    def project_gradient(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        groups, n_g = self.g.shape[:2]
        first = gradients[self.indices[0]]
        xg, xa = self.xg.to(first.dtype), self.xa.to(first.dtype)
        weight = self._sketch_matrix(first.view(groups, n_g, self.width), slice(0, self.split), 0)
        total = kernels.project_implicit(xg, xa[:, :self.split], weight)
        if self.split == xa.shape[1]:
            return total
        bias = torch.stack([gradients[k].view(groups, n_g) for k in self.indices[1:]], 2)
        bias = self._sketch_matrix(bias, slice(self.split, None), self.width)
        return total + kernels.project_implicit(xg, xa[:, self.split:], bias)

    def _sketch_matrix(self, matrix: torch.Tensor, part: slice, start: int) -> torch.Tensor:
        """``Omega_G matrix Omega_A^T``, where ``matrix`` holds n_A's rows from ``start`` on."""
        if self.rows_g is not None and self.rows_a is not None:
            matrix = matrix[:, self.rows_g.unsqueeze(1), self.rows_a[part] - start]
        elif self.rows_g is not None:
            matrix = matrix.index_select(1, self.rows_g)
        elif self.rows_a is not None:
            matrix = matrix.index_select(2, self.rows_a[part] - start)
        if self.weights_g is not None:
            matrix = matrix * self.weights_g.unsqueeze(1)
        return matrix if self.weights_a is None else matrix * self.weights_a[part]

    def message_size(self, uc: str) -> int:
        groups, n_g, r = self.g.shape[:3]
        n_a = self.a.shape[1]
        return groups * (n_g + n_a) * r if uc == "factored" else groups * n_g * n_a

    def local_contribution(self, b: torch.Tensor, own: torch.Tensor, ranks: int, uc: str,
                           out: torch.Tensor) -> None:
        left, right = self._contribution_factors(b, own, ranks, uc)
        if uc == "factored":
            torch.cat([left.flatten(), right.flatten()], out=out)
        else:
            torch.matmul(left, right.mT, out=out.view(left.shape[0], left.shape[1], -1))

    def _contribution_factors(self, b: torch.Tensor, own: torch.Tensor, ranks: int, uc: str
                              ) -> tuple[torch.Tensor, torch.Tensor]:
        """L (groups, n_G, columns) and R (groups, n_A, columns) with ``U b = L R^T``, this rank's part."""
        g, a = self.g.to(b.dtype), self.a.to(b.dtype)
        if uc == "factored":
            # Eq. 28's sum of sqrt|c_j| runs over all samples of the system, which every rank knows.
            return kernels.factored_means(g, a, own * ranks, b.abs().sqrt().sum())
        return kernels.exact_terms(g, a, own * ranks ** 0.5 if ranks > 1 else own)

    def apply_direction(self, mean: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                        uc: str) -> None:
        groups, n_g = self.g.shape[:2]
        n_a = self.a.shape[1]
        if uc == "factored":
            cut = mean.numel() * n_g // (n_g + n_a)
            self._subtract_product(mean[:cut].view(groups, n_g, -1), mean[cut:].view(groups, n_a, -1),
                                   gradients, lam)
            return
        matrix = mean.view(groups, n_g, n_a)
        for target, part in self._gradient_matrices(gradients):
            target.sub_(matrix[..., part]).mul_(1.0 / lam)

    def apply_single_rank(self, b: torch.Tensor, gradients: Sequence[torch.Tensor], lam: float,
                          uc: str) -> None:
        self._subtract_product(*self._contribution_factors(b, b, 1, uc), gradients, lam)

    def _subtract_product(self, left: torch.Tensor, right: torch.Tensor,
                          gradients: Sequence[torch.Tensor], lam: float) -> None:
        """``gradients <- (gradients - L R^T)/lam`` in place."""
        for target, part in self._gradient_matrices(gradients):
            target.baddbmm_(left, right[:, part].mT, beta=1.0 / lam, alpha=-1.0 / lam)

    def _gradient_matrices(self, gradients: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, slice]]:
        """Each parameter's gradient as (groups, n_G, rows of A), and which rows of A it stands for."""
        groups, n_g = self.g.shape[:2]
        rows = [slice(0, self.width), *(slice(k, k + 1) for k in range(self.width, self.a.shape[1]))]
        return [(gradients[k].view(groups, n_g, -1), part)
                for k, part in zip(self.indices, rows, strict=True)]


# By their names in checkpoints.
BLOCKS: dict[str, type[Block]] = {"Explicit": Explicit, "Product": FactoredBlock}


def block_from(state: dict[str, Any], device: torch.device) -> Block:
    """The block that ``block_state()`` was called on, on a device."""
    values: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            values[key] = block_from(value, device)
        elif key != "type":
            values[key] = value.to(device) if isinstance(value, torch.Tensor) else value
    return BLOCKS[state["type"]](**values)


def _weighed(tensor: torch.Tensor, axis: int, rows: torch.Tensor, weights: torch.Tensor
             ) -> torch.Tensor:
    return (to_compute_dtype(tensor.index_select(axis, rows)) * weights).to(tensor.dtype)
