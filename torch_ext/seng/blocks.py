"""One layer's curvature, and how it is applied to a gradient.

A layer's per-sample gradients are held in blocks over disjoint parameters, which share one
coefficient a sample: :class:`Explicit` holds U of one parameter, :class:`Product` the factors of
a weight (and of biases that are rows of ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hvd_ext.torch.seng import kernels


@dataclass
class Explicit:
    """U of parameter ``index``: ``u`` (rho, n); ``xi`` (rho or R, q) its sampled rows, weighted.

    ``rows`` and ``weights`` (q,) are None, and ``xi`` is ``u`` (of all R = M rho samples in full
    coupling), when the layer is not sketched.
    """

    index: int
    u: torch.Tensor
    xi: torch.Tensor
    rows: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def gram(self, rho: int) -> torch.Tensor:
        return kernels.gram_explicit(self.xi)

    def project(self, gradients: Sequence[torch.Tensor], rho: int) -> torch.Tensor:
        z = gradients[self.index]
        if self.rows is not None and self.weights is not None:
            z = z.index_select(0, self.rows) * self.weights
        return kernels.project_explicit(self.xi, z)


@dataclass
class Product:
    """Factors of the parameters ``indices`` (a weight, then biases).

    ``g`` (groups, n_G, r rho), ``a`` (groups, n_A, r rho), of whose rows the first ``width`` stand
    for the weight and the rest for biases; ``xg``, ``xa`` their sampled rows, weighted.
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
    split: int = field(default=-1)

    def __post_init__(self) -> None:
        if self.split < 0:
            rows = self.rows_a
            self.split = self.width if rows is None else int((rows < self.width).sum())

    def gram(self, rho: int) -> torch.Tensor:
        xg, xa = working(self.xg), working(self.xa)
        return kernels.gram_implicit(xg, xa, rho)

    def project(self, gradients: Sequence[torch.Tensor], rho: int) -> torch.Tensor:
        first = gradients[self.indices[0]]
        weight = first.view(self.g.shape[0], self.g.shape[1], self.width)
        xg, xa = self.xg.to(first.dtype), self.xa.to(first.dtype)
        weight = self._sketched(weight, slice(0, self.split), 0)
        total = kernels.project_implicit(xg, xa[:, :self.split], weight, rho)
        if self.split == xa.shape[1]:
            return total
        bias = torch.stack([gradients[k].view(self.g.shape[:2]) for k in self.indices[1:]], 2)
        bias = self._sketched(bias, slice(self.split, None), self.width)
        return total + kernels.project_implicit(xg, xa[:, self.split:], bias, rho)

    def _sketched(self, matrix: torch.Tensor, part: slice, start: int) -> torch.Tensor:
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

    def targets(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views of the gradients that ``U c`` is subtracted from, weight (groups, n_G, n_A) first."""
        groups, n_g = self.g.shape[:2]
        return [gradients[k].view(groups, n_g, -1) for k in self.indices]


Block = Explicit | Product


@dataclass
class Curvature:
    """A layer's blocks, and the small system of SENG eq. 9.

    ``rho`` are this rank's samples, ``total`` those of all ranks that the system joins (rho but in
    full coupling) with this rank's at ``offset``; ``ranks`` is M in full coupling, else 1.
    ``gram`` (total, total) is float64, ``step`` when it was taken. ``r`` is 0 without factors.
    """

    blocks: list[Block]
    rho: int
    kappa: int
    r: int
    step: int
    gram: torch.Tensor | None = None
    offset: int = 0
    total: int = 0
    ranks: int = 1
    lower: torch.Tensor | None = None
    lam: float = 0.0
    jitter: float = 0.0
    coefficients: torch.Tensor | None = None

    def system(self) -> None:
        """Put the Gram matrix together from the (sketched) blocks."""
        self.total = self.total or self.rho
        grams = [block.gram(self.total).double() for block in self.blocks]
        self.gram = torch.stack(grams).sum(0) / self.ranks

    def factor(self, lam: float) -> bool:
        """Factor ``lam I + U^T U``; a factor for this lam is kept. False when it has none."""
        if self.lower is not None and self.lam == lam:
            return True
        assert self.gram is not None
        lower, jitter = kernels.factor(self.gram, lam)
        if lower is None:
            return False
        self.lower, self.lam, self.jitter = lower, lam, jitter
        return True

    def solve(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """``b`` of SENG eq. 9 or 12 for all samples of the system: (total,)."""
        assert self.lower is not None
        rhs = self.blocks[0].project(gradients, self.total)
        for block in self.blocks[1:]:
            rhs = rhs + block.project(gradients, self.total)
        if self.ranks > 1:
            rhs = rhs / self.ranks ** 0.5
        self.coefficients = kernels.solve(self.lower, rhs)
        return self.coefficients

    def own(self, b: torch.Tensor) -> torch.Tensor:
        """This rank's part of the coefficients."""
        return b[self.offset:self.offset + self.rho]

    def nbytes(self) -> int:
        """Bytes of everything held."""
        held = {id(t): t for block in self.blocks for t in vars(block).values()
                if isinstance(t, torch.Tensor)}
        held.update({id(t): t for t in (self.gram, self.lower) if t is not None})
        return sum(t.numel() * t.element_size() for t in held.values())


def contribution(curvature: Curvature, b: torch.Tensor, uc: str) -> torch.Tensor:
    """What this rank adds to ``U b``, flat, such that the mean over ranks is what is subtracted.

    Explicit blocks and the exact form give ``U_i b_i`` (SENG eq. 25, 26), the factored form the
    two means of eq. 28. In full coupling U is ``[U_1 ... U_M]/sqrt(M)`` and eq. 28's sum of
    ``sqrt|c_j|`` runs over all ranks' samples, which every rank knows.
    """
    own, ranks = curvature.own(b), curvature.ranks
    linear = own * ranks ** 0.5 if ranks > 1 else own
    out = b.new_empty(sum(_message_size(block, uc, curvature.rho) for block in curvature.blocks))
    start = 0
    for block in curvature.blocks:
        part = out[start:start + _message_size(block, uc, curvature.rho)]
        start += part.numel()
        if isinstance(block, Explicit):
            kernels.expand_explicit(block.u, linear, part)
            continue
        g, a = block.g.to(b.dtype), block.a.to(b.dtype)
        if uc == "factored":
            means = kernels.factored_means(g, a, own * ranks, b.abs().sqrt().sum())
            torch.cat([mean.flatten() for mean in means], out=part)
        else:
            torch.matmul(*_weighted(g, a, linear), out=part.view(g.shape[0], g.shape[1], -1))
    return out


def subtract(curvature: Curvature, message: torch.Tensor, gradients: Sequence[torch.Tensor],
             lam: float, uc: str) -> None:
    """``gradients <- (gradients - U b)/lam`` in place with the mean of the ranks' contributions."""
    start = 0
    for block in curvature.blocks:
        part = message[start:start + _message_size(block, uc, curvature.rho)]
        start += part.numel()
        if isinstance(block, Explicit):
            gradients[block.index].sub_(part).mul_(1.0 / lam)
        elif uc == "factored":
            groups, n_g = block.g.shape[:2]
            cut = part.numel() * n_g // (n_g + block.a.shape[1])
            _subtract_factored(block, part[:cut].view(groups, n_g, -1),
                               part[cut:].view(groups, block.a.shape[1], -1), gradients, lam)
        else:
            matrix = part.view(block.g.shape[0], block.g.shape[1], -1)
            for k, target in enumerate(block.targets(gradients)):
                target.sub_(_columns(block, matrix, 2, k)).mul_(1.0 / lam)


def subtract_at_once(curvature: Curvature, b: torch.Tensor, gradients: Sequence[torch.Tensor],
                     lam: float, uc: str) -> None:
    """The same on a single rank, where nothing is sent, without forming ``U b``."""
    for block in curvature.blocks:
        if isinstance(block, Explicit):
            kernels.subtract_explicit(gradients[block.index], block.u, b, lam)
            continue
        g, a = block.g.to(b.dtype), block.a.to(b.dtype)
        if uc == "factored":
            g, a = kernels.factored_means(g, a, b, b.abs().sqrt().sum())
            _subtract_factored(block, g, a, gradients, lam)
        else:
            left, right = _weighted(g, a, b)
            for k, target in enumerate(block.targets(gradients)):
                target.baddbmm_(left, _columns(block, right, 2, k), beta=1.0 / lam,
                                alpha=-1.0 / lam)


def _subtract_factored(block: Product, g_mean: torch.Tensor, a_mean: torch.Tensor,
                       gradients: Sequence[torch.Tensor], lam: float) -> None:
    for k, target in enumerate(block.targets(gradients)):
        rows = _columns(block, a_mean, 1, k)
        target.baddbmm_(g_mean, rows.mT, beta=1.0 / lam, alpha=-1.0 / lam)


def _columns(block: Product, tensor: torch.Tensor, axis: int, k: int) -> torch.Tensor:
    """The part along ``axis`` (n_A) that belongs to the block's k-th parameter."""
    if k == 0:
        return tensor.narrow(axis, 0, block.width)
    return tensor.narrow(axis, block.width + k - 1, 1)


def _weighted(g: torch.Tensor, a: torch.Tensor, c: torch.Tensor
              ) -> tuple[torch.Tensor, torch.Tensor]:
    return (g.view(*g.shape[:2], -1, c.numel()) * c).flatten(2), a.mT


def _message_size(block: Block, uc: str, rho: int) -> int:
    if isinstance(block, Explicit):
        return block.u.shape[1]
    groups, n_g, columns = block.g.shape
    n_a = block.a.shape[1]
    return groups * (n_g + n_a) * (columns // rho) if uc == "factored" else groups * n_g * n_a


def working(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 when it is stored in half precision."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if half else tensor
