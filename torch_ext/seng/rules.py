"""What SENG knows of each kind of layer: which parameters it has, and its per-sample gradients.

A rule is a function ``rule(module, x, gz, pick)``. ``x`` is the module's first input and ``gz`` the
gradient of the loss with respect to its output, both with the samples along the first axis and as
the forward pass had them. ``pick(t)`` keeps the samples the curvature is taken from and casts to
the working precision; everything that is returned must have gone through it. A rule returns either

* :class:`Factors` when the gradient of the weight for sample i is ``G_i A_i^T``,
* :class:`Lookup` when it is rows of ``gz`` added to rows of a table, or
* a dict from parameter name to per-sample gradients, shape ``(samples, *parameter.shape)``.

Scaling is not a rule's business: return what ``gz`` gives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hvd_ext.torch.seng.implicit_unfold import ImplicitUnfold, shifted_input


@dataclass
class Factors:
    """``weight`` gradient of sample i in group k is ``g[i, k].T @ a[i, k]``.

    ``g`` (samples, groups, kappa, n_G) and ``a`` (samples, groups, kappa, n_A); viewed as
    ``(groups, n_G, n_A)`` the weight's gradient is that product. The bias gradient is ``g`` summed
    over kappa (a row of ones under A), unless ``bias`` (samples, bias size) gives it.
    """

    g: torch.Tensor
    a: torch.Tensor
    bias: torch.Tensor | None = None


class Convolved(Factors):
    """Those of a convolution; ``a`` is only formed where it is asked for, ``shifted`` multiplies without."""

    def __init__(self, g: torch.Tensor, shifted: ImplicitUnfold, unfold: Callable[[], torch.Tensor]) -> None:
        self.g, self.bias, self.shifted, self._unfold = g, None, shifted, unfold

    @functools.cached_property
    def a(self) -> torch.Tensor:  # type: ignore[override]
        """(samples, 1, kappa, n_A)."""
        return self._unfold()


@dataclass
class Lookup:
    """``weight`` (V, E) gradient of sample i is the sum over t of ``g[i, t]`` in row ``index[i, t]``.

    ``index`` (samples, T) int64, ``g`` (samples, T, E).
    """

    index: torch.Tensor
    g: torch.Tensor


Pick = Callable[[torch.Tensor], torch.Tensor]
PerSample = dict[str, torch.Tensor]
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor, Pick], "Factors | Lookup | PerSample"]


@dataclass(frozen=True)
class Registered:
    """A rule with what must be known of its layers before the first forward pass.

    ``groups(module)`` gives (groups, n_G, n_A) of the weight's gradient for a rule that returns
    :class:`Factors`, None for one that returns per-sample gradients. ``ones`` says whether the
    bias is a row of ones under A. ``lookup``: it returns :class:`Lookup`. ``called``: ``x`` is the whole
    call (see ``per_sample.py``). ``names`` maps the rule's names of parameters to the module's.
    """

    kind: str
    rule: Rule
    groups: Callable[[nn.Module], tuple[int, int, int]] | None = None
    ones: bool = True
    lookup: bool = False
    called: bool = False
    names: tuple[tuple[str, str], ...] = ()


_RULES: dict[type[nn.Module], Registered] = {}


def register_seng_rule(module_type: type[nn.Module], rule: Rule, *, kind: str | None = None,
                       groups: Callable[[nn.Module], tuple[int, int, int]] | None = None,
                       ones: bool = True, replace: bool = False) -> None:
    """Teach SENG a layer type of your own; call it before constructing ``SENG``.

    Example, a learned scale of each feature::

        def scale_rule(module, x, gz, pick):
            products = pick(x) * pick(gz)                   # (samples, ..., features)
            return {"weight": products.flatten(1, -2).sum(1) if products.dim() > 2 else products}

        hvd.register_seng_rule(Scale, scale_rule)

    Args:
        module_type: the layer's class. Subclasses that keep its ``forward`` use the rule too.
        rule: see the head of this module; parameters are taken by their names in the module.
        kind: name in the report, the class's name unless given.
        groups: for a rule that returns :class:`Factors`: (groups, n_G, n_A) of a module's weight.
        ones: with ``groups``: whether the bias is a row of ones under A.
        replace: allow to replace a rule that exists.

    Raises:
        TypeError: ``module_type`` is no module class, or ``rule`` is not callable.
        ValueError: the type has a rule already and ``replace`` is False.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    if not callable(rule):
        raise TypeError(f"rule must be a function (module, x, gz, pick), got {rule!r}")
    if module_type in _RULES and not replace:
        raise ValueError(f"{module_type.__name__} has a SENG rule already; pass replace=True to "
                         "replace it")
    _RULES[module_type] = Registered(kind or module_type.__name__, rule, groups, ones)


def rule_for(module: nn.Module) -> tuple[Registered | None, bool]:
    """The rule of the module's class or of a base, and whether ``forward`` is the one it is for."""
    for base in type(module).__mro__:
        if base in _RULES:
            return _RULES[base], type(module).forward is base.forward  # type: ignore[attr-defined]
    return None, False


def _linear_rule(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> Factors:
    if x.dim() == 1:
        x, gz = x.unsqueeze(0), gz.unsqueeze(0)
    x, gz = pick(x), pick(gz)
    return Factors(*(t.reshape(t.shape[0], 1, -1, t.shape[-1]) for t in (gz, x)))


def extract_patches(x: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...],
                    dilation: tuple[int, ...], positions: tuple[int, ...]) -> torch.Tensor:
    """Sliding blocks of a padded ``x`` (rho, C, *space): (rho, C, prod kernel, prod positions)."""
    if math.prod(kernel) == 1 and all(step == 1 for step in stride):
        return x.flatten(2).unsqueeze(2)
    reach = [(p - 1) * s + d * (k - 1) + 1 for p, s, d, k in
             zip(positions, stride, dilation, kernel, strict=True)]
    if any(size < need for size, need in zip(x.shape[2:], reach, strict=True)):
        raise ValueError(f"its output has {positions} positions, its input is too small for that")
    x = x.contiguous()
    steps = x.stride()[2:]
    view = x.as_strided(
        (*x.shape[:2], *kernel, *positions),
        (*x.stride()[:2], *(s * d for s, d in zip(steps, dilation, strict=True)),
         *(s * t for s, t in zip(steps, stride, strict=True))),
    )
    return view.reshape(*x.shape[:2], math.prod(kernel), math.prod(positions))


def _convolution_rule(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> Factors:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if x.dim() == len(module.kernel_size) + 1:
        x, gz = x.unsqueeze(0), gz.unsqueeze(0)
    x, gz = pick(x), pick(gz)
    padding = module._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, padding, mode=mode)
    return _unfolded_rule(module, x, gz)


def same_convolution(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> Factors:
    """A convolution that pads with zeros as its output's size asks for, less before than behind."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    x, gz = pick(x), pick(gz)
    padding: list[int] = []
    for size, p, s, d, k in zip(x.shape[2:], gz.shape[2:], module.stride, module.dilation,
                                module.kernel_size, strict=True):
        need = max((p - 1) * s + d * (k - 1) + 1 - size, 0)
        padding = [need // 2, need - need // 2, *padding]
    return _unfolded_rule(module, F.pad(x, padding), gz)


def _unfolded_rule(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: torch.Tensor, gz: torch.Tensor) -> Factors:
    rho, groups, kappa = x.shape[0], module.groups, math.prod(gz.shape[2:])
    g = gz.reshape(rho, groups, -1, kappa).mT

    def unfold() -> torch.Tensor:
        a = extract_patches(x, module.kernel_size, module.stride, module.dilation, tuple(gz.shape[2:]))
        return a.reshape(rho, groups, -1, kappa).mT

    shifted = shifted_input(module, x, tuple(gz.shape[2:]))
    return Factors(g, unfold()) if shifted is None else Convolved(g, shifted, unfold)


def _transposed_rule(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> Factors:
    # z is the adjoint of a convolution, so x and the patches of gz change places: the weight
    # (in, out/groups, k, k) has the gradient sum over positions of x · patch(gz).
    assert isinstance(module, nn.ConvTranspose2d)
    if x.dim() == 3:
        x, gz = x.unsqueeze(0), gz.unsqueeze(0)
    x, gz = pick(x), pick(gz)
    bias = gz.sum((2, 3)) if module.bias is not None else None
    rows, columns = (int(p) for p in module.padding)
    need = [(size - 1) * s + d * (k - 1) + 1 for size, s, d, k in
            zip(x.shape[2:], module.stride, module.dilation, module.kernel_size, strict=True)]
    # Positive on the right where the last patch ends beyond gz, negative where output_padding
    # added rows that no patch reads.
    after = [need[0] - rows - gz.shape[2], need[1] - columns - gz.shape[3]]
    padded = F.pad(gz, (columns, after[1], rows, after[0]))
    a = extract_patches(padded, module.kernel_size, module.stride, module.dilation, tuple(x.shape[2:]))
    rho, groups = x.shape[0], module.groups
    kappa = a.shape[-1]
    return Factors(x.reshape(rho, groups, -1, kappa).mT, a.reshape(rho, groups, -1, kappa).mT, bias)


def _batch_norm(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> PerSample:
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    batch_statistics = module.training or module.running_mean is None
    # Statistics of the whole batch, not only of the samples that are kept.
    x_hat = F.batch_norm(
        x if x.dtype == torch.float64 else x.float(),
        None if batch_statistics else module.running_mean,
        None if batch_statistics else module.running_var,
        training=batch_statistics, eps=module.eps,
    )
    return _affine_rule(pick(x_hat), pick(gz))


def _affine_rule(x_hat: torch.Tensor, gz: torch.Tensor) -> PerSample:
    """Sums over everything but samples (axis 0) and channels (axis 1)."""
    if gz.dim() == 2:
        return {"weight": x_hat * gz, "bias": gz}
    x_hat, gz = x_hat.flatten(2), gz.flatten(2)
    return {"weight": (x_hat * gz).sum(2), "bias": gz.sum(2)}


def _layer_norm(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> PerSample:
    assert isinstance(module, nn.LayerNorm)
    shape = tuple(module.normalized_shape)
    if x.dim() == len(shape):
        x, gz = x.unsqueeze(0), gz.unsqueeze(0)
    x, gz = pick(x), pick(gz)
    x_hat = F.layer_norm(x, shape, eps=module.eps)
    return {"weight": (x_hat * gz).reshape(x.shape[0], -1, *shape).sum(1),
            "bias": gz.reshape(x.shape[0], -1, *shape).sum(1)}


def _rms_norm(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> PerSample:
    assert isinstance(module, nn.RMSNorm)
    shape = tuple(module.normalized_shape)
    if x.dim() == len(shape):
        x, gz = x.unsqueeze(0), gz.unsqueeze(0)
    x, gz = pick(x), pick(gz)
    x_hat = F.rms_norm(x, shape, eps=module.eps)
    return {"weight": (x_hat * gz).reshape(x.shape[0], -1, *shape).sum(1)}


def look_up(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> Lookup:
    """The rule of ``Embedding``: ``x`` are the numbers of the rows, ``gz`` is of what was found there."""
    assert isinstance(module, nn.Embedding)
    index, g = pick(x), pick(gz)
    index = index.reshape(index.shape[0], -1)
    return Lookup(index, _mask_padding(module, index, g.reshape(*index.shape, gz.shape[-1])))


def _embedding_bag(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> Lookup:
    assert isinstance(module, nn.EmbeddingBag)
    if x.dim() != 2 or module.mode == "max":
        raise ValueError("its rule is for bags of one length, in two dimensions, summed or averaged")
    index, g = pick(x), pick(gz)
    if module.mode == "mean":
        kept = index != module.padding_idx if module.padding_idx is not None else torch.ones_like(index)
        g = g / kept.sum(1, keepdim=True).clamp_min(1)
    return Lookup(index, _mask_padding(module, index, g.unsqueeze(1).expand(*index.shape, -1)))


def _mask_padding(module: nn.Module, index: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    padding = module.padding_idx
    return g if padding is None else g * (index != padding).unsqueeze(-1)


def _group_norm(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> PerSample:
    assert isinstance(module, nn.GroupNorm)
    x, gz = pick(x), pick(gz)
    x_hat = F.group_norm(x, module.num_groups, eps=module.eps)
    return _affine_rule(x_hat, gz)


def _matrix_shape(module: nn.Module) -> tuple[int, int, int]:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    groups = int(getattr(module, "groups", 1))
    n_g = weight.shape[0] // groups
    return groups, n_g, weight.numel() // (groups * n_g)


register_seng_rule(nn.Linear, _linear_rule, groups=_matrix_shape)
for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_seng_rule(_type, _convolution_rule, groups=_matrix_shape)
register_seng_rule(nn.ConvTranspose2d, _transposed_rule, groups=_matrix_shape, ones=False)
for _type in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    register_seng_rule(_type, _batch_norm)
register_seng_rule(nn.LayerNorm, _layer_norm)
register_seng_rule(nn.RMSNorm, _rms_norm)
for _table, _rule in ((nn.Embedding, look_up), (nn.EmbeddingBag, _embedding_bag)):
    _RULES[_table] = Registered(_table.__name__, _rule, lookup=True)
register_seng_rule(nn.GroupNorm, _group_norm)
