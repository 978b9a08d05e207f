"""Asynchronous training over MPI: parameter server and workers, independent of the framework."""

from hvd_ext.async_ps.checkpoint import Checkpoint
from hvd_ext.async_ps.errors import ServerLost, ServerStopped, WorkerEvicted
from hvd_ext.async_ps.report import Delays, Report, WorkerReport

__all__ = [
           "Checkpoint",
           "Delays",
           "Report",
           "ServerLost",
           "ServerStopped",
           "WorkerEvicted",
           "WorkerReport",
]
