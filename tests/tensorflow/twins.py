"""The PyTorch side of comparisons of reports; imported on ranks that run PyTorch alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SHAPES = [(37, 11), (50,), (9, 9)]


def cases(hvd: Any) -> dict[str, dict[str, Any]]:
    """Arguments of ``DistributedOptimizer`` by name, for either front end."""
    return {
        "plain": {"server": "replicated"},
        "fp16": {"compression": hvd.Compression.fp16, "server": "replicated"},
        "topk": {"compression": hvd.Compression.topk(0.05, min_size=60)},  # (50,) goes whole
        "topk in float16": {"compression": hvd.Compression.topk(0.05, min_size=0, values="float16")},
        "delay": {"op": hvd.DelayCompensated()},
        "rank0": {"server": "rank0"},
        "sharded": {"server": "sharded"},
    }


def torch_reports(steps: int) -> dict[str, Any]:
    """The reports after made steps of SGD with momentum."""
    import hvd_ext.torch as hvd
    from tests.torch.problems import backward, named, worker_gradients

    found = {}
    for name, options in cases(hvd).items():
        rng = np.random.default_rng(0)
        parameters = [torch.nn.Parameter(torch.from_numpy(rng.standard_normal(s).astype("float32")))
                      for s in SHAPES]
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.1, momentum=0.9),
                                             named_parameters=named(parameters), **options)
        for step in range(steps):
            optimizer.zero_grad()
            backward(parameters, worker_gradients(SHAPES, worker=hvd.rank(), step=step))
            optimizer.step()
        found[name] = optimizer.report()
    return found
