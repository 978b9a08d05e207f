"""Keras front end of hvd-ext."""
