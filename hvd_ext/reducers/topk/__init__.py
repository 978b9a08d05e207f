"""TopK with error feedback (SPARS-AMS): settings, plan, wire format, and when it pays off."""

from hvd_ext.reducers.error_feedback import STATE as FEEDBACK_STATE
from hvd_ext.reducers.topk.config import TopK, keep_count, warm_up
from hvd_ext.reducers.topk.wire import Layout, MessageError
from hvd_ext.state import BUCKETS, DROP, OWN, RANK, Part

OWNED = Part("owned", RANK, "owners' residuals", OWN, DROP, attribute="sparse")
OWNER_BOUNDS, OWNER_CLOCK = Part("owner_bounds", RANK, resize=DROP), Part("owner_clock", RANK, resize=DROP)
OWNER_RESIDUAL = Part("owner_residual", RANK, "owners' residuals", BUCKETS, DROP)  # as TensorFlow keeps it
STATE = (*FEEDBACK_STATE, OWNED)

__all__ = ["OWNED", "OWNER_BOUNDS", "OWNER_CLOCK", "OWNER_RESIDUAL", "STATE",
           "Layout", "MessageError", "TopK", "keep_count", "warm_up"]
