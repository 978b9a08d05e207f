"""Delay compensation: plan of the synchronous method, rules and engine of the asynchronous one."""

from hvd_ext.delay.config import DelayCompensated

__all__ = ["DelayCompensated"]
