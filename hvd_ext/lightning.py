"""``HorovodStrategy`` for PyTorch Lightning, whose own was dropped; needs ``pip install lightning``."""

from hvd_ext import aliases

__getattr__ = aliases.names_of(__name__, "hvd_ext.torch.lightning")
