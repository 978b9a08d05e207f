"""``import hvd_ext.keras as hvd`` in place of ``import horovod.keras as hvd``.

It is :mod:`hvd_ext.tensorflow.keras`, module by module, and what ``horovod.keras`` has beyond that.
``DistributedOptimizer`` takes its arguments in the order of ``horovod.keras``.
"""

from hvd_ext.horovod_api import aliases
from hvd_ext.tensorflow.keras import *  # noqa: F403
from hvd_ext.tensorflow.keras import callbacks, elastic  # noqa: F401
from hvd_ext.tensorflow.optimizer import (
    StandaloneKerasDistributedOptimizer as DistributedOptimizer,  # noqa: F401
)

aliases.alias_package(__name__, "hvd_ext.tensorflow.keras")
__getattr__ = aliases.module_getattr(__name__, "horovod.keras")
