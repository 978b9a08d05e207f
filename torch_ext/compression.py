"""``hvd.Compression``: how gradients travel."""

import horovod.torch as horovod
from horovod.torch.compression import Compressor, FP16Compressor, NoneCompressor

from hvd_ext.topk import TopK

__all__ = ["Compression", "Compressor", "FP16Compressor", "NoneCompressor"]


class Compression(horovod.Compression):
    """Horovod's ``none`` and ``fp16``, and TopK with error feedback.

    ``Compression.topk(ratio, ...)`` takes the arguments of :class:`hvd_ext.topk.TopK`.
    """

    topk = TopK
