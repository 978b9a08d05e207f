"""How a model's layers see its samples: two passes, the second with the samples in another order.

The passes leave no trace: no gradients, evaluation mode, the random state, the buffers and the
attributes of all modules as before. Hooks of others that see outputs do not run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hvd_ext.seng.sample_axes import Signature, shuffled_order

Record = Callable[[nn.Module, torch.Tensor], None]


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> int | None:
    """The size of ``axis`` in the first tensor among a model's arguments that has it."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > axis:
            return leaf.shape[axis]
    return None


def axis_signature(x: torch.Tensor, batch: int) -> Signature:
    """``x`` with every row of axis 0, and of each axis as long as the batch, as one number."""
    values = x.detach()
    exact = not values.is_floating_point() or values.dtype == torch.float64
    rounding = 1e-12 if exact else min(1e3 * torch.finfo(values.dtype).eps, 0.05)
    values = values.double() if exact else values.float()
    axes = {}
    for axis in range(values.dim()):
        if axis == 0 or values.shape[axis] == batch:
            rows = values.movedim(axis, 0).reshape(values.shape[axis], -1)
            made = torch.Generator().manual_seed(0)
            weights = torch.randn(rows.shape[1], generator=made).to(rows)
            axes[axis] = (rows @ weights).double().cpu().numpy()
    return Signature(axes, rounding * float(values.norm()))


def two_passes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, batch: int,
               axis: int, keep: Collection[int], begin: Callable[[], None]) -> None:
    """Call ``model`` on its arguments and on the same with the samples :func:`shuffled_order`.

    Args:
        keep: ids of the forward hooks that run.
        begin: called before each pass.
    """
    order = torch.from_numpy(shuffled_order(batch))

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() > axis and leaf.shape[axis] == batch:
            return leaf.index_select(axis, order.to(leaf.device))
        return leaf

    shuffled_args, shuffled_kwargs = pytree.tree_map(moved, (args, kwargs))
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    for these, those in ((args, kwargs), (shuffled_args, shuffled_kwargs)):
        begin()
        with torch.no_grad(), torch.random.fork_rng(devices=devices), _left_unchanged(model, keep):
            model(*these, **those)


@contextmanager
def _left_unchanged(model: nn.Module, keep: Collection[int]) -> Iterator[None]:
    """Evaluation mode; everything that modules hold is as before afterwards."""
    modules = list(model.modules())
    attributes = [(module, dict(vars(module))) for module in modules]
    buffers = [(module._buffers, dict(module._buffers)) for module in modules]
    hooks = [(module, module._forward_hooks) for module in modules]
    fast = torch.backends.mha.get_fastpath_enabled()
    cached = torch.is_autocast_cache_enabled()
    with ExitStack() as after:
        after.callback(torch.backends.mha.set_fastpath_enabled, fast)
        after.callback(torch.set_autocast_cache_enabled, cached)
        after.callback(_restore_module, attributes, buffers)
        # The fast path of attention calls no module inside it; weights cast without gradients must not
        # stay in autocast's cache.
        torch.backends.mha.set_fastpath_enabled(False)
        torch.set_autocast_cache_enabled(False)
        for held, tensors in buffers:
            # Copies take the writes, so that nothing the backward pass has saved changes its version.
            held.update({name: None if t is None else t.clone() for name, t in tensors.items()})
        for module, before in hooks:
            vars(module)["_forward_hooks"] = OrderedDict(
                (number, hook) for number, hook in before.items() if number in keep)
        model.eval()
        yield


def _restore_module(attributes: list[tuple[nn.Module, dict[str, Any]]],
                    buffers: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for module, before in attributes:
        vars(module).clear()
        vars(module).update(before)
    for held, tensors in buffers:
        held.clear()
        held.update(tensors)
