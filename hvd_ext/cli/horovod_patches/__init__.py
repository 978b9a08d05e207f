"""What is changed in Horovod's released source: each edit with its reason, for one exact file each.

Those that are marked with a pull request's number do what Horovod's developers merged after the
release and never published; the others are this project's.
"""

from hvd_ext.cli.horovod_patches.build import BUILD_EDITS
from hvd_ext.cli.horovod_patches.kinds import Diff, Edit, Patch, WholeFile
from hvd_ext.cli.horovod_patches.runtime import RUNTIME_EDITS
from hvd_ext.cli.horovod_patches.security import ADVISORIES, SECURITY_EDITS

EDITS: tuple[Edit, ...] = (*BUILD_EDITS, *RUNTIME_EDITS, *SECURITY_EDITS)

__all__ = ["ADVISORIES", "EDITS", "SECURITY_EDITS", "Diff", "Edit", "Patch", "WholeFile"]
