"""``hvd.Compression``: how gradients travel. ``reducers/__init__.py`` adds the registered methods."""

import horovod.torch as horovod
from horovod.torch.compression import Compressor, FP16Compressor, NoneCompressor

from hvd_ext import aliases

__all__ = ["Compression", "Compressor", "FP16Compressor", "NoneCompressor"]
__getattr__ = aliases.names_of(__name__, "horovod.torch.compression")


class Compression(horovod.Compression):
    """Horovod's ``none`` and ``fp16``, and one attribute for every registered compression.

    ``Compression.topk(ratio, ...)`` takes the arguments of :class:`hvd_ext.topk.TopK`, and so on
    for ``dir(Compression)``. For methods of your own see :func:`hvd_ext.torch.register_reducer`.
    """
