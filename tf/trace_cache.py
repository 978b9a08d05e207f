"""Functions that were traced for other ranks than there are now: found, and traced again when next called.

A traced exchange has the number of ranks, this rank's number and the owners in it. TensorFlow has no public
way to make a ``tf.function`` forget its traces, nor to ask which one is being traced: both are seen
here in the frames of the trace itself.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from hvd_ext.tensorflow.byte_counts import ScratchVariable


class TraceInvalidator:
    """The functions that one optimizer's exchange was traced into."""

    def __init__(self) -> None:
        self._generation = 0
        self._now: ScratchVariable | None = None  # the generation, as graphs see it
        self._options: list[Any] = []  # weak references

    def note_functions(self) -> tf.Operation:
        """Called while the exchange is traced: remember for which functions.

        Returns:
            What must run before anything is sent: an error where the graph is stale.

        Raises:
            NotImplementedError: the function could not be found, or could not be traced again.
        """
        if not tf.compat.v1.executing_eagerly_outside_functions():
            return tf.no_op()  # TensorFlow 1, where only plain reduction runs, which reads M as it runs
        found = list(_being_traced())
        if not found:
            raise NotImplementedError(
                f"under Horovod elastic a traced function must be traced again when ranks change, and "
                f"TensorFlow {tf.__version__} does not show which one is traced here: call the "
                "tf.function itself rather than a tf.Graph, or run without Horovod elastic")
        self._options = [one for one in self._options if one() is not None]
        known = [one() for one in self._options]
        self._options += [weakref.ref(one) for one in found if not any(one is other for other in known)]
        if self._now is None:
            self._now = ScratchVariable(1)
            with tf.init_scope():
                self._now.assign([self._generation])
        return tf.debugging.Assert(tf.equal(self._now.read()[0], self._generation), [
            "this function was traced for other ranks than there are now: call the tf.function, not "
            "what get_concrete_function() gave before the ranks changed"])

    def retrace_functions(self) -> None:
        """Have all of them traced again at their next call."""
        self._generation += 1
        if self._now is not None:
            self._now.assign([self._generation])
        for one in self._options:
            options = one()
            if options is not None:
                options.function_cache.clear()
        self._options = []


def _being_traced() -> Iterator[Any]:
    """The options of every ``tf.function`` that is being traced, innermost first."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith("tracing_compilation.py"):
            options = frame.f_locals.get("tracing_options")
            if hasattr(getattr(options, "function_cache", None), "clear"):
                yield options
        frame = frame.f_back
