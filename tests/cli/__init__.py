"""Tests of the ``hvd-ext`` command."""
