"""Horovod's modules, signatures and barriers under this package's names."""
