"""Which parameters' gradients are sparse: a rank learns it from the others before it has had one."""

from __future__ import annotations

import horovod.torch as horovod
import torch

from hvd_ext.torch.reducers.base import Entry, Reducer


class Layouts:
    """What the ranks know together of the layouts of gradients.

    A rank may have no gradient of an embedding in its first steps, while others have a sparse one: what it
    sends for it then, and what its optimizer is given, has to be as theirs.
    """

    def __init__(self) -> None:
        self._unseen: list[Entry] = []  # matrices that have had no gradient on any rank

    def begin(self, reducer: Reducer) -> None:
        """The ranks have met, or met again: what each knew alone is asked for once more."""
        self._unseen = [entry for entry in reducer.entries if entry.parameter.dim() == 2]

    def learn(self, reducer: Reducer, name: str) -> set[Entry]:
        """Those that turn out to be sparse; a collective while there are matrices without a gradient."""
        unseen = self._unseen
        if not unseen or reducer.options.sparse_only or reducer.collectives.size == 1:
            return set()
        gradients = [entry.parameter.grad for entry in unseen]
        rows = torch.tensor([[one is not None, one is not None and one.is_sparse] for one in gradients],
                            dtype=torch.int32)
        reducer.collectives.allreduce_async_(rows, name, op=horovod.Sum, kind="agreement").wait()
        there, sparse = rows.bool().unbind(1)
        self._unseen = [entry for entry, one in zip(unseen, there.tolist(), strict=True) if not one]
        return {entry for entry, one in zip(unseen, sparse.tolist(), strict=True) if one}
