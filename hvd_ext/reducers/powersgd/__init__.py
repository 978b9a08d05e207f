"""PowerSGD (Vogels et al., arXiv 1905.13727): low-rank gradients, error feedback, two allreduces."""

from hvd_ext.reducers.error_feedback import STATE as FEEDBACK_STATE
from hvd_ext.reducers.powersgd.config import PowerSGD
from hvd_ext.reducers.powersgd.plan import Matrix, factor_sizes, first_q, plan_matrices
from hvd_ext.state import BUCKETS, Part

FACTORS = Part("q", label="PowerSGD factors", layout=BUCKETS)
STATE = (*FEEDBACK_STATE, FACTORS)

__all__ = ["FACTORS", "STATE", "Matrix", "PowerSGD", "factor_sizes", "first_q", "plan_matrices"]
