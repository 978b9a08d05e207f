"""Horovod for PyTorch with more: ``import hvd_ext.torch as hvd`` in place of ``import horovod.torch as hvd``.

Everything public in ``horovod.torch`` is here under its own name; what this package adds or
extends comes after it.
"""

from horovod.torch import *  # noqa: F403
