"""Which of PyTorch's tensors the compiled kernels take, and how: the one place where that is decided.

Each function does its work and returns True, or returns False and leaves it to PyTorch's operations: without
Numba, under ``HVD_EXT_KERNELS=plain``, and for what the kernels do not take. CUDA tensors are left to PyTorch
unless ``HVD_EXT_KERNELS=triton``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hvd_ext import kernels

if TYPE_CHECKING:
    from hvd_ext.torch.reducers.kernels.delay_compensation import Recursion

DTYPES = (torch.float32, torch.float64)


def _fit_kernels(tensors: Sequence[torch.Tensor], device: str) -> bool:
    first = tensors[0]
    if torch.compiler.is_compiling() or first.device.type != device or first.dtype not in DTYPES:
        return False
    return all(
        type(one) in (torch.Tensor, torch.nn.Parameter) and one.dtype == first.dtype
        and one.device == first.device and one.is_contiguous() for one in tensors)


def on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether the loops of ``hvd_ext.kernels`` take these: contiguous, on the CPU, of one of their dtypes."""
    return _fit_kernels(tensors, "cpu") and kernels.kernels_usable()


def on_cuda(*tensors: torch.Tensor) -> bool:
    """Whether ``kernels_triton`` takes these; the CUDA build of PyTorch brings Triton."""
    return _fit_kernels(tensors, "cuda") and kernels.kernel_choice() == "triton"


def _as_in_memory(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Views that are contiguous, where all tensors are channels last."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensors[0].dim())
    if layout is None or all(one.is_contiguous() for one in tensors):
        return tensors
    if not all(one.is_contiguous(memory_format=layout) for one in tensors):
        return tensors
    return [one.detach().movedim(1, -1) for one in tensors]


def kernel_implementation() -> str:
    """What ranks must have in common: one that rounds otherwise would let replicas drift apart."""
    triton = " and Triton's" if kernels.kernel_choice() == "triton" else ""
    return ("compiled" if kernels.kernels_usable() else "PyTorch's") + triton


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The memory of a contiguous tensor, flat.

    Not by ``tensor.numpy()``: after that PyTorch resizes the tensor's memory no more, as Horovod does.
    """
    if not tensor.numel():
        return np.empty(0, f"f{tensor.element_size()}")
    return np.asarray(SimpleNamespace(tensor=tensor, __array_interface__={
        "version": 3, "shape": (tensor.numel(),), "typestr": f"=f{tensor.element_size()}",
        "data": (tensor.data_ptr(), False)}))


def compensated_sum(rows: Sequence[torch.Tensor], rule: Recursion, mean_square: torch.Tensor | None,
                    out: torch.Tensor) -> bool:
    """``delay_kernels.compensated_sum``; ``out`` may then be one of the rows."""
    tensors = [out, *rows, *(() if mean_square is None else (mean_square,))]
    if on_cuda(*tensors):
        from hvd_ext.torch import kernels_triton

        kernels_triton.compensated_sum(rows, rule, mean_square, out)
        return True
    if not on_cpu(*tensors):
        return False
    from hvd_ext.kernels import compiler, recursion
    from hvd_ext.kernels.threads import run_in_parts

    target = as_array(out)
    scalar = target.dtype.type
    arrays = [as_array(row) for row in rows]
    settings = {
        "adaptive": mean_square is not None, "cumulative": rule.cumulative, "decay": scalar(rule.decay),
        "fresh": scalar(rule.fresh), "eps": scalar(rule.eps), "strength": scalar(-rule.strength),
        "divisor": scalar(rule.divisor)}
    where, square = compiler.row_addresses(arrays), target if mean_square is None else as_array(mean_square)
    run_in_parts(lambda start,
                 stop: recursion.compensated_sum(where, square, target, start, stop, **settings),
                 target.size, torch.get_num_threads())
    return True


def find_above(flat: torch.Tensor, threshold: float,
               expected: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``topk_kernels``' search for candidates and their magnitudes; None to leave it to PyTorch."""
    if on_cuda(flat):
        from hvd_ext.torch import kernels_triton

        found = kernels_triton.find_above(flat, threshold)
        return found, flat[found].abs()
    if not on_cpu(flat):
        return None
    from hvd_ext.kernels import topk

    found, magnitudes = topk.find_above(as_array(flat), threshold, expected)
    return torch.from_numpy(found), torch.from_numpy(magnitudes)


def split_selected(flat: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """``topk_kernels.split`` on a GPU; None to leave it to PyTorch, which on a CPU is as fast.

    bfloat16 is PyTorch's: Triton's interpreter does not round to it, so that the kernel could not be tested.
    """
    if dtype == torch.bfloat16 or not on_cuda(flat):
        return None
    from hvd_ext.torch import kernels_triton

    return kernels_triton.split_selected(flat, positions, dtype)


def update_amsgrad(parameter: torch.Tensor, gradient: torch.Tensor, state: Sequence[torch.Tensor],
                   group: dict[str, Any]) -> bool:
    """One update of :class:`hvd_ext.torch.AMSGrad`; ``state`` is m, v and vhat of the parameter."""
    tensors = _as_in_memory([parameter, gradient, *state])
    cuda = on_cuda(*tensors)
    if not cuda and not on_cpu(*tensors):
        return False
    lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
    decoupled = group["decoupled_weight_decay"]
    settings = {"lr": -lr, "beta1": beta1, "fresh1": 1.0 - beta1, "beta2": beta2, "fresh2": 1.0 - beta2,
                "eps": group["eps"], "shrink": 1.0 - lr * decay if decoupled else 1.0,
                "decay": 0.0 if decoupled else decay, "sign": -1.0 if group["maximize"] else 1.0}
    if cuda:
        from hvd_ext.torch import kernels_triton

        kernels_triton.update_amsgrad(*tensors, **settings)
        return True
    from hvd_ext.kernels import amsgrad as loops
    from hvd_ext.kernels.threads import run_in_parts

    arrays = [as_array(tensor) for tensor in tensors]
    scalar = arrays[0].dtype.type
    scalars = {name: scalar(value) for name, value in settings.items()}
    run_in_parts(lambda start, stop: loops.update_amsgrad(*arrays, start, stop, **scalars), arrays[0].size,
                 torch.get_num_threads())
    return True
