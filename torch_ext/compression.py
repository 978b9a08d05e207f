"""``hvd.Compression``: how gradients travel. ``reducers/__init__.py`` adds the registered methods."""

import horovod.torch as horovod
import torch
from horovod.torch.compression import Compressor, FP16Compressor, NoneCompressor

from hvd_ext.horovod_api import aliases

__all__ = ["Compression", "Compressor", "FP16Compressor", "NoneCompressor"]
__getattr__ = aliases.module_getattr(__name__, "horovod.torch.compression")


class Compression(horovod.Compression):
    """Horovod's ``none`` and ``fp16``, and one attribute for every registered compression.

    ``Compression.topk(ratio, ...)`` takes the arguments of :class:`hvd_ext.reducers.topk.TopK`, and so on
    for ``dir(Compression)``. For methods of your own see :func:`hvd_ext.torch.register_reducer`.
    """


class WideCompressor(Compressor):  # type: ignore[misc]
    """bfloat16 as float32, for Horovod's own optimizers; everything else as it is."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        """What travels, and the dtype to come back to."""
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor, tensor.dtype

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: torch.dtype) -> torch.Tensor:
        """The tensor in the dtype that it had."""
        return tensor.to(ctx)
