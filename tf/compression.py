"""``hvd.Compression``: how gradients travel."""

import horovod.tensorflow as horovod

from hvd_ext.topk import TopK


class Compression(horovod.Compression):
    """Horovod's ``none`` and ``fp16``, and TopK with error feedback.

    ``Compression.topk(ratio, ...)`` takes the arguments of :class:`hvd_ext.topk.TopK`.
    """

    topk = TopK
