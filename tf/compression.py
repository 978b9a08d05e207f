"""``hvd.Compression``: how gradients travel."""

import horovod.tensorflow as horovod

from hvd_ext.sparse import TopK


class Compression(horovod.Compression):
    """Horovod's ``none`` and ``fp16``, and TopK with error feedback.

    ``Compression.topk(ratio, ...)`` takes the arguments of :class:`hvd_ext.sparse.TopK`.
    """

    topk = TopK
