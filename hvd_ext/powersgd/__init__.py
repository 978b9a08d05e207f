"""PowerSGD (Vogels et al., arXiv 1905.13727): low-rank gradients, error feedback, two allreduces."""

from hvd_ext.powersgd.config import PowerSGD
from hvd_ext.powersgd.plan import Matrix, first_q, matrices, sizes

__all__ = ["Matrix", "PowerSGD", "first_q", "matrices", "sizes"]
