"""Checks that ranks have the same settings, parameters and weights."""
