"""What an exchange costs, and how a step's schedule runs: the cost model of ``hvd-ext plan``."""

from hvd_ext.planning.links import Cluster, Link
from hvd_ext.planning.messages import Moved, moved, seconds
from hvd_ext.planning.simulate import Result, simulate
from hvd_ext.planning.stragglers import Stragglers
from hvd_ext.planning.work import Work
from hvd_ext.planning.workload import Workload

__all__ = ["Cluster", "Link", "Moved", "Result", "Stragglers", "Work", "Workload", "moved", "seconds",
           "simulate"]
