"""Batch normalization over the batches of all ranks, on any device and over any process set.

Forward, one allgather: every rank's number of samples, mean and sum of squared deviations, per channel.
Backward, one allreduce: the sums of dy and of dy times the normalized input. Horovod's own runs on GPUs
only and over all ranks only.
"""

from __future__ import annotations

from typing import Any

import torch
from horovod.torch import Sum
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_ext.horovod_api import aliases
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.uneven_data import is_active

__getattr__ = aliases.module_getattr(__name__, "horovod.torch.sync_batch_norm")
__all__ = ["SyncBatchNorm", "convert_sync_batchnorm"]


class SyncBatchNorm(_BatchNorm):
    """``torch.nn.BatchNorm1d``, ``2d`` or ``3d`` of one process that has the joined batch of all ranks.

    Ranks may have batches of different sizes, also empty ones. In ``eval()`` nothing is exchanged.
    Gradients of weight and bias are this rank's part, which the optimizer reduces as all others.

    Args:
        num_features: C, for inputs (N, C, ...).
        eps: added to the variance under the root.
        momentum: weight of a new batch in the running statistics; None for their plain mean.
        affine: learn a weight and a bias for each channel.
        track_running_stats: keep running statistics for ``eval()``.
        process_set: the ranks whose batches belong together; all by default.
        name: of the layer in Horovod's timeline, the same on every rank.
        device: of parameters and running statistics.
        dtype: of parameters and running statistics.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
                 affine: bool = True, track_running_stats: bool = True, *, process_set: Any = None,
                 name: str = "layer", device: Any = None, dtype: Any = None) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.name = name
        self.process_set = process_set

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions (N, C, ...), got {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize ``input`` (N, C, ...).

        Raises:
            ValueError: the input is not of such a shape, or all ranks together have one value a channel.
            RuntimeError: inside ``hvd.uneven_inputs``, where ranks without batches cannot take part.
        """
        collectives = Collectives(self.process_set)
        if not self.training or not collectives.is_member or collectives.size == 1:
            return self._normalize_alone(input)
        self._check_input_dim(input)
        if is_active():
            raise RuntimeError(
                "hvd.SyncBatchNorm cannot be used inside hvd.uneven_inputs: a rank that has run out of "
                "batches "
                "has none to normalize, and the others would wait for it; drop the last uneven batches "
                "(DataLoader(drop_last=True)), or use torch.nn.BatchNorm")
        name = f"sync_batch_norm/{self.name}"
        with torch.no_grad():
            mean, variance, count = join_statistics(collectives, local_statistics(input),
                                                    f"{name}/statistics")
            if count <= 1:
                raise ValueError("expected more than 1 value per channel when training, got input size "
                                 f"{list(input.shape)} and {count:.0f} on all ranks together")
            self._update_running(mean, variance * (count / (count - 1)))
        return _Normalize.apply(  # type: ignore[no-any-return]
            input, self.weight, self.bias, mean, torch.rsqrt(variance + self.eps), count, collectives,
            f"{name}/gradients")

    def _normalize_alone(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = self.track_running_stats and self.running_mean is not None
        return nn.functional.batch_norm(
            input, self.running_mean if running else None, self.running_var if running else None,
            self.weight, self.bias, self.training or not running,
            self._momentum_factor(), self.eps)

    def _momentum_factor(self) -> float:
        """The share of this batch in the running statistics; a plain mean over batches without momentum."""
        if self.momentum is not None:
            return self.momentum
        return 1.0 / max(1.0, float(self.num_batches_tracked)) if self.track_running_stats else 0.0

    def _update_running(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(now.to(running.dtype), self._momentum_factor())


def convert_sync_batchnorm(module: nn.Module, process_set: Any = None) -> nn.Module:
    """Synchronise every batch normalization of a model, as ``nn.SyncBatchNorm.convert_sync_batchnorm``.

    Args:
        module: a model; parameters and buffers stay the same tensors, so that an optimizer that has them
            goes on. A module that is itself a batch normalization is replaced: use what is returned.
        process_set: the ranks whose batches belong together; all by default.
    """
    return _convert_module(module, process_set, "")


def _convert_module(module: nn.Module, process_set: Any, path: str) -> nn.Module:
    result = module
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        result = SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine,
                               module.track_running_stats, process_set=process_set, name=path or "layer",
                               device="meta")
        for name in ("weight", "bias"):
            result.register_parameter(name, getattr(module, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            result.register_buffer(name, getattr(module, name))
        result.train(module.training)
    for name, child in list(module.named_children()):
        result.add_module(name, _convert_module(child, process_set, f"{path}.{name}" if path else name))
    return result


# Kernels: (N, C, ...) and (C,), no collectives

def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _reduced_axes(x: torch.Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _as_channels(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def local_statistics(x: torch.Tensor) -> torch.Tensor:
    """Of one rank's (N, C, ...): values a channel, means, sums of squared deviations; (1, 2 C + 1)."""
    wide = x.to(_wide_dtype(x.dtype))
    count = x.numel() // max(1, x.shape[1])
    if count == 0:
        return wide.new_zeros(1, 2 * x.shape[1] + 1)
    mean = wide.mean(_reduced_axes(x))
    square = (wide - _as_channels(mean, x)).square().sum(_reduced_axes(x))
    return torch.cat([mean.new_tensor([float(count)]), mean, square])[None]


def join_statistics(collectives: Collectives, mine: torch.Tensor,
                    name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and biased variance (C,) of all ranks' values, and how many there are (Chan et al. 1979)."""
    rows = collectives.allgather_async(mine, name, kind="statistics").wait().double()
    counts, means, squares = rows[:, :1], *rows[:, 1:].chunk(2, dim=1)
    count = float(counts.sum())
    mean = (counts * means).sum(0) / max(1.0, count)
    square = (squares + counts * (means - mean).square()).sum(0)
    return mean.to(mine.dtype), (square / max(1.0, count)).to(mine.dtype), count


class _Normalize(torch.autograd.Function):
    """``(x - mean) * scale * weight + bias``, differentiated through the ranks' common mean and scale."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any, mean: torch.Tensor,
                scale: torch.Tensor, count: float, collectives: Collectives, name: str) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.count, ctx.collectives, ctx.name = count, collectives, name
        y = (x.to(mean.dtype) - _as_channels(mean, x)) * _as_channels(scale, x)
        if weight is not None:
            y = y * _as_channels(weight, x) + _as_channels(bias, x)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dy_wide = dy.to(mean.dtype)
        normal = (x.to(mean.dtype) - _as_channels(mean, x)) * _as_channels(scale, x)
        sums = torch.stack([dy_wide.sum(_reduced_axes(x)), (dy_wide * normal).sum(_reduced_axes(x))])
        d_weight = d_bias = None
        if weight is not None:
            d_bias, d_weight = (one.to(weight.dtype).clone() for one in sums)
        # Every rank takes part whatever it needs itself: another one may need it.
        sums = ctx.collectives.allreduce_async_(sums, ctx.name, op=Sum, kind="statistics").wait()
        d_x = None
        if ctx.needs_input_grad[0]:
            of_dy, of_both = (_as_channels(one / ctx.count, x) for one in sums)
            factor = scale if weight is None else scale * weight.to(scale.dtype)
            d_x = ((dy_wide - of_dy - normal * of_both) * _as_channels(factor, x)).to(x.dtype)
        return d_x, d_weight, d_bias, None, None, None, None, None
