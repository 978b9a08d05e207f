"""Which parameters' gradients are sparse: a rank learns it from the others before it has had one."""

from __future__ import annotations

import horovod.torch as horovod
import torch

from hvd_ext.torch.collectives import Handle
from hvd_ext.torch.reducers.base import NamedParameter, Reducer


class Layouts:
    """What the ranks know together of the layouts of gradients.

    A rank may have no gradient of an embedding in its first steps, while others have a sparse one: what it
    sends for it then, and what its optimizer is given, has to be as theirs.
    """

    def __init__(self) -> None:
        self._unseen: list[NamedParameter] = []  # matrices that have had no gradient on any rank
        self._asked: tuple[torch.Tensor, Handle] | None = None  # about this step

    def restart(self, reducer: Reducer) -> None:
        """The ranks have met, or met again: what each knew alone is asked for once more."""
        self._unseen = [entry for entry in reducer.entries if entry.parameter.dim() == 2]

    def start_exchange(self, reducer: Reducer, name: str) -> None:
        """Start to tell the other ranks, once a step, while there are matrices without a gradient."""
        if self._asked is not None or not self._unseen or reducer.options.sparse_only \
                or reducer.collectives.size == 1:
            return
        gradients = [entry.parameter.grad for entry in self._unseen]
        rows = torch.tensor([[one is not None, one is not None and one.is_sparse] for one in gradients],
                            dtype=torch.int32)
        self._asked = rows, reducer.collectives.allreduce_async_(rows, name, op=horovod.Sum,
                                                                 kind="agreement")

    def learn_sparse(self, reducer: Reducer, name: str) -> set[NamedParameter]:
        """Those that turn out to be sparse; a collective, as above."""
        self.start_exchange(reducer, name)
        if self._asked is None:
            return set()
        (rows, handle), unseen = self._asked, self._unseen
        self._asked = None
        handle.wait()
        there, sparse = rows.bool().unbind(1)
        self._unseen = [entry for entry, one in zip(unseen, there.tolist(), strict=True) if not one]
        return {entry for entry, one in zip(unseen, sparse.tolist(), strict=True) if one}

    def pending_handles(self) -> list[Handle]:
        """The collective, until it has been waited for."""
        return [] if self._asked is None else [self._asked[1]]

    def abort_step(self) -> None:
        """Drop what was asked in this step."""
        self._asked = None
