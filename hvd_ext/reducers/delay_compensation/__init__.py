"""Delay compensation: plan of the synchronous methods, rules and engine of the asynchronous one."""

from hvd_ext.reducers.delay_compensation.config import DelayCompensated
from hvd_ext.reducers.delayed_update import DelayedUpdate
from hvd_ext.state import BUCKETS, SHARD, STEPS, Part

UNUSABLE_STEPS = Part("unusable_steps")
MEAN_SQUARE = Part("mean_square", SHARD, "slices of MeanSquare", BUCKETS)
STATE = (STEPS, UNUSABLE_STEPS, MEAN_SQUARE)

__all__ = ["MEAN_SQUARE", "STATE", "UNUSABLE_STEPS", "DelayCompensated", "DelayedUpdate"]
