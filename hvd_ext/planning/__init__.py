"""What an exchange costs, and how a step's schedule runs: the cost model of ``hvd-ext plan``."""

from hvd_ext.planning.compute_costs import ComputeCosts
from hvd_ext.planning.links import Cluster, Link
from hvd_ext.planning.messages import Traffic, collective_seconds, collective_traffic
from hvd_ext.planning.simulate import Result, simulate_steps
from hvd_ext.planning.stragglers import Stragglers
from hvd_ext.planning.workload import Workload

__all__ = [
           "Cluster",
           "ComputeCosts",
           "Link",
           "Result",
           "Stragglers",
           "Traffic",
           "Workload",
           "collective_seconds",
           "collective_traffic",
           "simulate_steps",
]
