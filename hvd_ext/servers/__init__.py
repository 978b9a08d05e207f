"""Where the update runs: which rank owns which parameter, and which checkpoints fit where."""

from hvd_ext.servers.checkpoint import OwnedState, check_loadable
from hvd_ext.servers.ownership import assign, owners, shares

__all__ = ["OwnedState", "assign", "check_loadable", "owners", "shares"]
