"""``HorovodStrategy`` for PyTorch Lightning, whose own was dropped; needs ``pip install lightning``."""

from hvd_ext.horovod_api import aliases

__getattr__ = aliases.module_getattr(__name__, "hvd_ext.torch.lightning")
