"""Checks that ranks have the same settings, variables and weights."""
