"""Delay compensation: plan of the synchronous methods, rules and engine of the asynchronous one."""

from hvd_ext.delay.config import DelayCompensated
from hvd_ext.delay.late import Late

__all__ = ["DelayCompensated", "Late"]
