"""Whose an optimizer's variables are under ``server=``, where Keras was not told.

Most are made with ``add_variable_from_reference``, which names the weight that they belong to. Adafactor's
factors are not, nor is what a whole optimizer has once, such as Nadam's product of momenta.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from hvd_ext.tensorflow.variables import as_tf, mark_per_rank

BESIDE = "beside"  # of one variable of the model, in a shape of its own
ONCE = "once"  # of no variable: the ranks that update something keep it up to date


def find_belonging(optimizer: Any, variables: Sequence[Any]) -> None:
    """Note in the optimizer's ``references`` whose its other variables are, and that they differ by rank.

    What stands in a list as long as ``variables`` is of the variable at its place: optimizers look state up
    by the variable's number.
    """
    references = optimizer._hvd_ext.references
    own = {id(as_tf(one)) for one in optimizer.variables} - set(references)
    own -= {id(as_tf(one)) for one in (optimizer._iterations, optimizer._learning_rate)}
    for values in list(vars(optimizer).values()):
        if not isinstance(values, list) or len(values) != len(variables):
            continue
        for state, variable in zip(values, variables, strict=True):
            if isinstance(state, keras.Variable) and id(as_tf(state)) in own:
                references.setdefault(id(as_tf(state)), (variable, BESIDE))
    for one in optimizer.variables:
        if id(as_tf(one)) in own:
            references.setdefault(id(as_tf(one)), (None, ONCE))
            mark_per_rank(one)


def is_kept(optimizer: Any, variable: Any) -> bool:
    """Whether this rank keeps a distributed optimizer's variable up to date, if it has room for it."""
    server = optimizer._hvd_ext.server
    reference, kind = optimizer._hvd_ext.references.get(id(as_tf(variable)), (None, ""))
    if server is None or kind not in (BESIDE, ONCE):
        return True
    return server.collectives.rank in server.busy if kind == ONCE else bool(server.owns_variable(reference))


def whole_shape(optimizer: Any, variable: Any) -> tuple[int, ...]:
    """A variable's shape where one rank keeps all of it."""
    reference, kind = optimizer._hvd_ext.references.get(id(as_tf(variable)), (None, ""))
    return tuple((variable if reference is None or kind == BESIDE else reference).shape)
