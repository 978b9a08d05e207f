"""TopK with error feedback (SPARS-AMS): settings, plan, wire format, and when it pays off."""

from hvd_ext.reducers.topk.config import TopK, keep_count, warm_up
from hvd_ext.reducers.topk.wire import Layout, MessageError

__all__ = ["Layout", "MessageError", "TopK", "keep_count", "warm_up"]
