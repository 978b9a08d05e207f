"""Horovod for TensorFlow with more: ``import hvd_ext.tensorflow as hvd``."""
