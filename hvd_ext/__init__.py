"""Decisions of hvd-ext: plans, rules and settings in plain Python and NumPy, shared by both front ends.

The front ends are ``hvd_ext.torch``, ``hvd_ext.tensorflow`` and ``hvd_ext.tensorflow.keras``.
"""

from hvd_ext.versions import HVD_EXT as __version__

__all__ = ["__version__"]
