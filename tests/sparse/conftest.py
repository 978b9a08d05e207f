"""Leaves out what needs PyTorch where it is not installed."""

import importlib.util

_TORCH = ["test_algorithm.py", "test_amsgrad.py", "test_benchmark.py", "test_kernels.py", "test_reducer.py",
          "test_wire.py"]
collect_ignore = [] if importlib.util.find_spec("torch") else _TORCH
