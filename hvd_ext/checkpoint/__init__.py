"""Checkpoints: files that are there whole or not at all, and the steps that ranks take together."""
