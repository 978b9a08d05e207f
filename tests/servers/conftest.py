"""Leaves out what needs PyTorch where it is not installed."""

import importlib.util

_TORCH = ["test_servers.py"]
collect_ignore = [] if importlib.util.find_spec("torch") else _TORCH
