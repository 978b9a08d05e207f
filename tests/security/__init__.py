"""Attacks on every port that Horovod opens, on the release first and on the edited source then."""
