"""Computation of the reducers on tensors; no collectives."""
