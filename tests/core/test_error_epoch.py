"""Errors that all ranks raise together change the names of later collectives."""

from __future__ import annotations

from hvd_ext.consistency.error_epoch import ErrorEpoch


def test_names_change_with_each_error():
    epoch = ErrorEpoch()
    suffixes = [epoch.suffix]
    for message in ("one", "two"):
        error = epoch.raise_together(message)
        assert isinstance(error, ValueError)
        assert str(error) == message
        suffixes.append(epoch.suffix)
    assert suffixes[0] == ""
    assert len(set(suffixes)) == 3
