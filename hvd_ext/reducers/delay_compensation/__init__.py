"""Delay compensation: plan of the synchronous methods, rules and engine of the asynchronous one."""

from hvd_ext.reducers.delay_compensation.config import DelayCompensated
from hvd_ext.reducers.delayed_update import DelayedUpdate

__all__ = ["DelayCompensated", "DelayedUpdate"]
