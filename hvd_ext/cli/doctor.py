"""``hvd-ext doctor`` placeholder."""
from typing import Any


def register(subcommands: Any) -> None: ...
