"""PowerSGD (Vogels et al., arXiv 1905.13727): low-rank gradients, error feedback, two allreduces."""

from hvd_ext.reducers.powersgd.config import PowerSGD
from hvd_ext.reducers.powersgd.plan import Matrix, factor_sizes, first_q, plan_matrices

__all__ = ["Matrix", "PowerSGD", "factor_sizes", "first_q", "plan_matrices"]
