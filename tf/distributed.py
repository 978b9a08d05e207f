"""``hvd_ext.tensorflow.DistributedOptimizer``, in the argument order of ``horovod.tensorflow``."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as horovod
import tensorflow as tf

from hvd_ext.tensorflow.optimizer import distribute


def DistributedOptimizer(optimizer: Any, name: str | None = None, use_locking: bool = False,
                         device_dense: str = "", device_sparse: str = "",
                         compression: Any = horovod.Compression.none,
                         sparse_as_dense: bool = False, backward_passes_per_step: int = 1,
                         op: Any = horovod.Average, gradient_predivide_factor: float = 1.0,
                         average_aggregated_gradients: bool = False, num_groups: int = 0,
                         groups: Any = None, process_set: Any = horovod.global_process_set,
                         scale_local_gradients: bool = True, **extensions: Any) -> Any:
    """Make an optimizer reduce gradients over all ranks before it applies them.

    A Keras optimizer is changed as :func:`hvd_ext.tensorflow.keras.DistributedOptimizer` says; a
    ``tf.compat.v1.train.Optimizer`` is given to Horovod's own.
    """
    shared = {
        "name": name, "device_dense": device_dense, "device_sparse": device_sparse,
        "compression": compression, "sparse_as_dense": sparse_as_dense,
        "backward_passes_per_step": backward_passes_per_step, "op": op,
        "gradient_predivide_factor": gradient_predivide_factor,
        "average_aggregated_gradients": average_aggregated_gradients, "num_groups": num_groups,
        "groups": groups, "process_set": process_set,
        "scale_local_gradients": scale_local_gradients,
    }
    if not isinstance(optimizer, tf.compat.v1.train.Optimizer):
        return distribute(optimizer, **shared, **extensions)
    if any(value is not None for value in extensions.values()):
        raise NotImplementedError(
            f"{', '.join(extensions)}: not for a tf.compat.v1 optimizer; use a Keras optimizer")
    return horovod.DistributedOptimizer(optimizer, use_locking=use_locking, **shared)
