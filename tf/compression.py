"""``hvd.Compression``: how gradients travel. ``reducers/__init__.py`` adds the registered methods."""

import horovod.tensorflow as horovod

from hvd_ext.horovod_api import aliases


class Compression(horovod.Compression):
    """Horovod's ``none`` and ``fp16``, and one attribute for every registered compression.

    ``Compression.topk(ratio, ...)`` takes the arguments of :class:`hvd_ext.reducers.topk.TopK`, and so on
    for ``dir(Compression)``. For methods of your own see :func:`hvd_ext.tensorflow.register_reducer`.
    """


__getattr__ = aliases.module_getattr(__name__, "horovod.tensorflow.compression")
