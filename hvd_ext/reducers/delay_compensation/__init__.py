"""Delay compensation: plan of the synchronous methods, rules and engine of the asynchronous one."""

from hvd_ext.reducers.delay_compensation.config import DelayCompensated
from hvd_ext.reducers.delayed_update import DelayedUpdate
from hvd_ext.state import BUCKETS, SHARD, Part

STATE = (Part("steps"), Part("unusable_steps"), Part("mean_square", SHARD, "slices of MeanSquare", BUCKETS))

__all__ = ["STATE", "DelayCompensated", "DelayedUpdate"]
