"""The interface of a reducer: what turns each rank's gradients into the reduced gradient.

A reducer takes this rank's gradients of some variables and returns the reduced ones. Inside a
``tf.function`` its collectives start as soon as each gradient is there, while the backward pass
still runs; in eager mode they start together.
"""

from __future__ import annotations

import abc
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvd_ext.consistency.fingerprint import Fingerprint
from hvd_ext.consistency.handshake import checks_weights
from hvd_ext.consistency.scopes import Scope, open_scope
from hvd_ext.reducers.options import ReductionOptions
from hvd_ext.reducers.registry import describe_reduction
from hvd_ext.state import MEAN, SHARED, Part
from hvd_ext.tensorflow.byte_counts import ScratchVariable
from hvd_ext.tensorflow.collectives import Collectives
from hvd_ext.tensorflow.consistency.handshake import compare_settings, compare_weights
from hvd_ext.tensorflow.graph_watchdog import GraphWaitProbe
from hvd_ext.tensorflow.reducers.declared_state import StateVariable
from hvd_ext.tensorflow.trace_cache import TraceInvalidator
from hvd_ext.tensorflow.variables import NUMBERS, as_tf, create_outside_graph, name_of, refuse_complex
from hvd_ext.versions import HVD_EXT

SETTINGS, STEPPED, WEIGHTS = 1, 2, 3  # the settings are compared; a step has followed; the weights are, too

Gradient = tf.Tensor | tf.IndexedSlices
MakeVariable = Callable[..., tf.Variable]


class Reducer(abc.ABC):
    """Turns each rank's local gradients into the reduced gradient, the same bits on every rank.

    Args:
        collectives: the ranks to reduce over.
        settings: of this way to reduce, as the user gave them.
        options: what every way to reduce is given.
    """

    extensions: tuple[str, ...] = ()  # lines about what comes after the reduction, to be compared
    stamp: Any = None  # a variable (rank, ranks) beside state that belongs to one rank
    lost_ranks = 0  # under Horovod elastic: how many left with what they kept alone
    staleness = 0  # by how many steps what is handed out is late
    owner_only = False  # whether a rank has the reduced gradients of what it owns only
    transaction: Any = None  # of a tape: what takes back a reduction that is not applied
    presence: Any = None  # where the ranks agree on which gradients are missing: how

    def __init__(self, collectives: Collectives, settings: Any, options: ReductionOptions) -> None:
        self.collectives = collectives
        self.settings = settings
        self.options = options
        self._scope: Scope | None = None
        self.prefix: str = options.prefix  # of the names of collectives, different for each live optimizer
        self.variables: list[Any] = []
        self._number: dict[int, int] = {}
        self.left_out: set[int] = set()  # the variables, by number, that this call was not given
        self._places: dict[int, int] = {}  # in this call, where no variables were planned for
        self._checked: Any = None  # how far the ranks have been compared
        self._broadcast_expected = False
        self._waiting = GraphWaitProbe(f"the exchange of gradients of {options.prefix}")
        self._functions: dict[tuple[str, ...], Any] = {}
        self._traces = TraceInvalidator()
        self._taken: ScratchVariable | None = None
        self._state: list[StateVariable] = []

    def create_state(self, variables: Sequence[Any], make_variable: MakeVariable) -> None:
        """Take the variables whose gradients are to be reduced, and make the state they need.

        ``make_variable(shape, dtype, name, per_rank)`` returns a tf.Variable of zeros that the
        owner of this reducer saves and restores.

        Raises:
            ValueError: a variable is complex.
        """
        del make_variable
        refuse_complex(variables)
        self._state = []
        self.variables = list(variables)
        self._number = {id(as_tf(variable)): index for index, variable in enumerate(variables)}
        if self._scope is None:
            # A model from a file has no "sequential/" in its paths.
            lines = [(NUMBERS.sub("", name_of(one)).removeprefix("sequential/"), tuple(one.shape),
                      as_tf(one).dtype.name) for one in variables]
            process_set = self.collectives.process_set.process_set_id
            self._scope = open_scope(process_set, lines, map(as_tf, variables))
            self.prefix = self._scope.keep_whole(self.options.prefix)
        self._make_own()

    def _make_own(self) -> None:
        """Make the variables that are not saved, once."""
        if self._checked is None:
            self._checked = create_outside_graph(lambda: tf.Variable(0, trainable=False, dtype=tf.int32))
            self._waiting.create_variables()

    def collective_label(self, variable: Any) -> str:
        """The variable's part of its collective's name.

        It is a number where it can be: Keras counts names per process, and one more layer on one rank
        would shift them.
        """
        number = self._number.get(id(as_tf(variable)))
        name = name_of(variable)
        if number is not None:
            return f"{number}.{name.rpartition('/')[2]}"
        place = self._places.get(id(as_tf(variable)))
        return name if place is None else f"{place}.{NUMBERS.sub('', name)}"

    def fill_missing(self, gradients: Sequence[Gradient | None], variables: Sequence[Any]
                     ) -> list[Gradient | None]:
        """The gradients, with zeros for missing ones where a reducer must have all of them."""
        del variables
        return list(gradients)

    def is_missing(self, variable: Any) -> bool:
        """Whether zeros stand for the variable's gradient where the ranks have to agree on that."""
        return self.presence is not None and id(as_tf(variable)) in self.presence.missing

    def check_variables(self, variables: Sequence[Any], what: str) -> None:
        """Refuse variables that the exchange was not planned for, if it was. Some of those it was may be
        left out, as frozen layers are.

        Raises:
            ValueError: ``what`` was given others.
        """
        given = {id(as_tf(one)): one for one in variables}
        others = [name_of(one) for key, one in given.items() if key not in self._number]
        if self.variables and others:
            raise ValueError(
                f"{what} was given the gradient of {others[0]}, and was built for {len(self.variables)} "
                "other variables; build the optimizer for all variables that are to be trained")
        self.left_out = set(range(len(self.variables))) - {self._number.get(key) for key in given}

    def left_out_number(self) -> int:
        """A number that differs between ranks which leave out different variables; 0 for none."""
        return zlib.crc32(repr(sorted(self.left_out)).encode()) if self.left_out else 0

    def zero_gradient(self, variable: Any) -> tf.Tensor:
        """A gradient of zeros, for one that is missing."""
        self._make_own()
        # No constant, on which TensorFlow would run a collective while it prepares the graph.
        zero = tf.minimum(tf.cast(self._checked, as_tf(variable).dtype), 0)
        return tf.fill((*self.parts_shape(), *variable.shape), zero)

    def build_fingerprint(self) -> Fingerprint:
        """What must be the same on every rank."""
        return Fingerprint((
            *describe_reduction(self.settings), f"half precision: {self.options.half}",
            f"{self.options.passes} backward passes per step",
            *(f"{number}. {list(one.shape)} {as_tf(one).dtype.name}"
              for number, one in enumerate(self.variables))))

    def check_consistency(self) -> tf.Tensor:
        """0-D True; before the first exchange all ranks see here that they were given the same.

        Before the second step they see also that their weights are. Otherwise running it is an error on every
        rank.
        """
        self._make_own()

        def settings() -> tf.Tensor:
            lines = (f"hvd_ext {HVD_EXT} for TensorFlow", *self.extensions,
                     f"names of collectives: {self.prefix}", *self.build_fingerprint().lines)
            with tf.control_dependencies([compare_settings(self.collectives, Fingerprint(lines),
                                                          prefix=self.prefix)]):
                return self._checked.assign(SETTINGS) >= SETTINGS

        def again() -> tf.Tensor:
            return tf.cond(tf.equal(self._checked, STEPPED),
                           lambda: self._compare_weights(self.variables), lambda: tf.constant(True))

        return tf.cond(self._checked >= SETTINGS, again, settings)

    def check_given_weights(self, variables: Sequence[Any]) -> tf.Tensor:
        """0-D True; at the second call the ranks see that these weights are the same on all.

        For a tape, which is not planned for variables. Otherwise running it is an error on every rank.
        """
        self._make_own()
        given = [one for one in variables if isinstance(as_tf(one), tf.Variable)]
        return tf.cond(tf.equal(self._checked, STEPPED), lambda: self._compare_weights(given),
                       lambda: self._checked.assign(tf.maximum(self._checked, STEPPED)) >= SETTINGS)

    def _compare_weights(self, variables: Sequence[Any]) -> tf.Tensor:
        values = [as_tf(one).read_value() for one in variables]
        names = [name_of(one) for one in variables]
        with tf.control_dependencies([compare_weights(self.collectives, self.prefix, names, values)]):
            return self._checked.assign(WEIGHTS) >= SETTINGS

    def expect_broadcast(self, expected: bool) -> None:
        """Weights will be broadcast after some steps, before which they may differ; or have just been."""
        self._broadcast_expected = expected
        if not expected and self._checked is not None and int(self._checked) == SETTINGS:
            self._checked.assign(STEPPED)

    def _note_step(self) -> None:
        """In a graph being traced, after the exchange: the next step may compare weights."""
        if self._checked is not None and self.variables and checks_weights() \
                and not (self._broadcast_expected or self.collectives.is_elastic):
            self._checked.assign(tf.where(tf.equal(self._checked, SETTINGS), STEPPED, self._checked))

    def meet_at_once(self) -> None:
        """As :meth:`check_consistency`, outside of the graph being traced, before another exchange there."""
        if self.variables and self.collectives.size > 1 and not self.collectives.is_elastic:
            self._make_own()
            create_outside_graph(lambda: int(self._checked) > 0
                                 or tf.function(self.check_consistency, autograph=False)())

    def parts_shape(self) -> tuple[int, ...]:
        """Leading shape of the gradients taken: (micro-batches,) or ()."""
        return ()

    # State: variables, each under the part that declares it

    def declared_state(self) -> list[StateVariable]:
        """All that is kept between steps."""
        return self._state

    def make_part(self, make_variable: MakeVariable, part: Part, shape: Sequence[int] = (),
                  dtype: Any = tf.int64, number: int | None = None, whole: int = 0) -> tf.Variable:
        """Make a variable of a declared part, and let checkpoints and elastic changes see to it.

        Args:
            make_variable: as ``create_state`` was given.
            part: the declaration; its name is the variable's.
            shape, dtype: of the variable.
            number: of the bucket or variable whose state it is; None for the only one.
            whole: elements that all ranks have of it together, where it is a slice.
        """
        name = part.name if number is None else f"{part.name}_{number}"
        variable = make_variable(tuple(shape), dtype, name, part.scope != SHARED)
        self._state.append(StateVariable(part, number, variable, whole))
        return variable

    def per_rank_state(self) -> list[tf.Variable]:
        """The variables that belong to this rank alone."""
        return [one.variable for one in self.declared_state() if one.part.scope != SHARED]

    def reset_per_rank_state(self) -> None:
        """Start what this rank keeps between steps anew."""
        for variable in self.per_rank_state():
            variable.assign(tf.zeros_like(variable))
        if self.stamp is not None:
            self.stamp.assign([self.collectives.rank, self.collectives.size])

    def bytes_held(self) -> int:
        """Bytes of this rank's state between steps."""
        return sum(int(one.shape.num_elements()) * one.dtype.size for one in self.per_rank_state())

    # Under Horovod elastic

    def local_state(self) -> list[tf.Variable]:
        """What each rank keeps for itself, whoever the others are; the mean over ranks has its meaning."""
        return [one.variable for one in self.declared_state() if one.part.resize == MEAN]

    def gather_state(self, collectives: Collectives) -> None:  # noqa: B027
        """Give every rank the pieces that others keep of one whole; a collective."""

    def abort_step(self) -> None:
        """After an error: nothing is under way any more."""
        self._waiting.reset_waits()

    def rebuild_for_world_size(self) -> None:
        """The ranks are others: they meet anew, and what was traced for the old ones is traced again."""
        self.abort_step()
        self._traces.retrace_functions()
        self._functions.clear()
        if self._checked is not None:
            self._checked.assign(0)

    def step_inputs(self, optimizer: Any) -> dict[str, tf.Tensor]:
        """What ``reduce`` needs to know about an optimizer at this step, as tensors."""
        del optimizer
        return {}

    def __call__(self, gradients: Sequence[Gradient | None], variables: Sequence[Any],
                 **inputs: Any) -> tuple[list[Gradient | None], Any]:
        """The reduced gradients, None where there was none, and whether the step may be taken.

        ``inputs`` are tensors. The second result is None when it always may.
        """
        if not self.variables:
            self._places = {id(as_tf(variable)): place for place, variable in enumerate(variables)}
        present = [index for index, gradient in enumerate(gradients) if gradient is not None]
        self.collectives.traffic.begin_step()
        if not present:
            return list(gradients), None
        sent = [gradients[index] for index in present]
        given = [variables[index] for index in present]
        if tf.executing_eagerly():
            key = tuple(f"{self._number.get(id(as_tf(one)), index)}.{name_of(one)}"
                        f"{'?' * self.is_missing(one)}" for index, one in enumerate(given))
            if key not in self._functions:
                self._functions[key] = tf.function(
                    lambda sent, inputs: self._reduce_counted(sent, given, inputs),
                    reduce_retracing=True, autograph=False,
                )
            reduced, good = self._functions[key](sent, inputs)
        else:
            reduced, good = self._reduce_counted(sent, given, inputs)
        result = list(gradients)
        for index, gradient in zip(present, reduced, strict=True):
            result[index] = gradient
        return result, good

    def sent_now(self, gradients: list[Gradient]) -> list[Gradient]:
        """Those of this step's gradients that its exchange waits for."""
        return gradients

    def _reduce_counted(self, gradients: list[Gradient], variables: Sequence[Any],
                        inputs: dict[str, tf.Tensor]) -> tuple[list[Gradient], Any]:
        fresh = [self._traces.note_functions()] if self.collectives.is_elastic else []
        begun = self._waiting.start_wait(self.sent_now(gradients))
        with tf.control_dependencies(fresh), self.collectives.traffic.count_section():
            reduced, good = self.reduce(gradients, variables, **inputs)
        self._waiting.end_wait(begun, reduced)
        self._note_step()
        if good is not None:
            if self._taken is None:
                self._taken = ScratchVariable(1)
            self._taken.assign(tf.reshape(good, (1,)))
        return reduced, good

    def step_taken(self) -> bool | None:
        """Whether the last step was taken; None before it, and where it always is."""
        return None if self._taken is None else bool(self._taken.read_numbers()[0])

    @abc.abstractmethod
    def reduce(self, gradients: list[Gradient], variables: Sequence[Any],
               **inputs: Any) -> tuple[list[Gradient], Any]:
        """What ``__call__`` returns, for variables that have a gradient; in a graph being traced."""

    def report(self) -> dict[str, Any]:
        """Figures of the last step, for people and programs to read."""
        return {}


def report(reducer: Reducer, preconditioner: Any, optimizer: Any) -> dict[str, Any]:
    """Updates taken, bytes by kind, and the figures of each extension in use.

    Under Horovod elastic bytes are not counted, and "sent" and "received" are left out.
    """
    found: dict[str, Any] = {"steps": int(optimizer.iterations) // reducer.options.passes}
    if not reducer.collectives.is_elastic:
        found["sent"], found["received"] = reducer.collectives.traffic.last_step()
    found.update(reducer.report())
    if preconditioner is not None:
        found["preconditioner"] = preconditioner.report()
    return found


def before_reduce(preconditioner: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Show a preconditioner, if there is one, this rank's gradients of the pass that has ended."""
    if preconditioner is not None:
        preconditioner.before_reduce(gradients, variables)


def precondition_gradients(preconditioner: Any, gradients: list[Any], variables: Sequence[Any],
                           reducer: Reducer, good: Any = None) -> list[Any]:
    """Reduced gradients turned into directions; as they are without a preconditioner.

    Where ``good``, a 0-D bool, says that the step is skipped, the preconditioner does not go on.
    """
    if preconditioner is None:
        return gradients
    collectives = reducer.collectives.counted_as("curvature")

    reducer.meet_at_once()  # SENG compares its layers while it is traced, with ranks that have SENG too

    def run() -> list[Any]:
        with collectives.traffic.count_section():
            return list(preconditioner.precondition(gradients, variables, collectives))

    if good is None:
        return run()
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]

    def directions() -> list[Any]:
        found = run()
        return [tf.convert_to_tensor(found[index]) for index in present]

    result = list(gradients)
    given = [tf.convert_to_tensor(gradients[index]) for index in present]
    for index, direction in zip(present, tf.cond(good, directions, lambda: given), strict=True):
        result[index] = direction
    return result
