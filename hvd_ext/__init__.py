"""Decisions of hvd-ext: plans, rules and settings in plain Python and NumPy, shared by both front ends.

The front ends are ``hvd_ext.torch``, ``hvd_ext.tensorflow`` and ``hvd_ext.tensorflow.keras``. Horovod's other
packages, and ``horovod.run``, are here under the same names.
"""

from hvd_ext.horovod_api import aliases
from hvd_ext.versions import HVD_EXT as __version__

__getattr__ = aliases.offer_packages(__name__, "horovod", names=["run"],
                                     packages=["common", "data", "mxnet", "ray", "runner", "spark"])

__all__ = ["__version__"]
