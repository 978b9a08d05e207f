"""The optimizer that a script holds: the wrapped one's class with Horovod's methods, and a step of its own.

What it does at a step is in ``step.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvd_ext.torch.persistence import optimizer_state
from hvd_ext.torch.persistence.pickling import reduce_wrapped
from hvd_ext.torch.reducers.base import Reducer
from hvd_ext.torch.step import DistributedStep


def extend_optimizer(optimizer: torch.optim.Optimizer, names: dict[Any, str], reducer: Reducer,
                     preconditioner: Any, server: Any, grad_scaler: Any) -> Any:
    """An instance of a subclass of the optimizer's class that shares everything it has."""
    wrapped = type(optimizer)
    # ``step`` is defined in the class itself, under Horovod's module name: Horovod's
    # broadcast_optimizer_state then finds the wrapped optimizer's own step one class above.
    members = {"step": ExtendedOptimizer._distributed_step, "__module__": "horovod.torch.optimizer"}
    # torch would wrap it once more when a state is loaded, and run the user's step hooks twice.
    ExtendedOptimizer._distributed_step.hooked = True  # type: ignore[attr-defined]
    cls = type(wrapped.__name__, (ExtendedOptimizer, wrapped), members)
    extended = cls.__new__(cls)
    # A scheduler that already watches the optimizer has put a step of its own into the instance.
    extended.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
    extended._should_synchronize = True
    if preconditioner is not None and grad_scaler is not None:
        preconditioner.set_grad_scaler(grad_scaler)
    extended._hvd_ext = DistributedStep(extended, names, reducer, preconditioner, server)
    reducer.collectives.scope.belong_to(extended)
    extended._hvd_ext.original = weakref.ref(optimizer)
    extended._hvd_ext.grad_scaler = grad_scaler
    return extended


class ExtendedOptimizer(torch.optim.Optimizer):
    """The methods of an extended optimizer beside its own class's; Horovod's names and meanings."""

    _hvd_ext: DistributedStep
    _should_synchronize: bool

    @property
    def backward_passes_per_step(self) -> int:
        """Backward passes expected before ``step()``."""
        return self._hvd_ext.reducer.passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change the number of backward passes before ``step()``; between steps only."""
        if passes <= 0:
            raise ValueError("backward_passes_per_step must be > 0")
        self._hvd_ext.set_passes(passes)

    def synchronize(self) -> None:
        """Wait for the reduced gradients and precondition them; ``parameter.grad`` holds them after.

        Then either ``step()`` within ``skip_synchronize()`` applies them, or ``zero_grad()`` throws them
        away: what an extension keeps between steps is then as if this step had not been. Under
        ``server="sharded"`` this takes another exchange, which ``step()`` alone does not need.

        Raises:
            RuntimeError: a backward pass has added to gradients that are reduced already, which the
                extension in use cannot reduce again.
        """
        self._hvd_ext.synchronize(settle=self._hvd_ext.closure is not None)
        self._hvd_ext.gather_gradients()

    @property
    def _synchronized(self) -> bool:
        """Horovod's: ``synchronize()`` has been called in this step."""
        return self._hvd_ext.state.reduced and not self._hvd_ext.state.settled

    @_synchronized.setter
    def _synchronized(self, value: bool) -> None:
        if not value:  # a script gives the step up
            self._hvd_ext.abandon_step()

    @property
    def _requires_update(self) -> set[torch.Tensor]:
        """Horovod's: parameters that are reduced in a step also where no backward pass has reached them."""
        reducer = self._hvd_ext.reducer
        if reducer.required is None:
            return {entry.parameter for entry in reducer.entries if entry.parameter.requires_grad}
        return reducer.required

    @_requires_update.setter
    def _requires_update(self, parameters: set[torch.Tensor]) -> None:
        self._hvd_ext.reducer.required = set(parameters)

    @property
    def _handles(self) -> dict[torch.Tensor, Any]:
        """Horovod's: parameters whose gradients are on their way; to read."""
        return dict.fromkeys(self._hvd_ext._passes.done)

    @_handles.setter
    def _handles(self, handles: dict[torch.Tensor, Any]) -> None:
        """Scripts empty it to drop a step that has begun; nothing else can be set."""
        if handles:
            raise ValueError("optimizer._handles can be emptied, and not set to other handles: this "
                             "optimizer keeps its own")
        self._hvd_ext.abort_step()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """``step()`` inside does not synchronize: for clipping between ``synchronize()`` and ``step()``."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def _distributed_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize, unless inside ``skip_synchronize()``, and take the wrapped optimizer's step.

        A closure is evaluated once. Gradients are reduced at the end of the ``loss.backward()`` in it: what
        follows there, such as clipping, sees reduced gradients.

        Raises:
            RuntimeError: the update would use gradients that are not reduced, or are reduced twice.
        """
        loss, wrapped = None, self._hvd_ext.original()
        if wrapped is not None:  # a scheduler may have been made with it, and watch its steps
            wrapped._opt_called = True
        if closure is not None:
            with torch.enable_grad(), self._hvd_ext.reducing_in_closure(self._should_synchronize):
                loss = closure()
        self._hvd_ext.synchronize_for_step(self._should_synchronize)
        result = self._hvd_ext.apply_update(super(type(self), self).step)
        return loss if closure is not None else result

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """As the wrapped optimizer's; refused while gradients are on their way.

        After ``synchronize()`` it throws the step away, on all ranks alike.
        """
        if self._hvd_ext.step_in_progress() and not self._hvd_ext.state.reduced:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before "
                "optimizer.step() or optimizer.synchronize(). This is prohibited as it can cause "
                "a race condition."
            )
        self._hvd_ext.abandon_step()
        super().zero_grad(*args, **kwargs)

    def skip_step(self) -> None:
        """Throw the step away that ``synchronize()`` has reduced, on all ranks alike; nothing without one.

        As ``zero_grad()``, which leaves a delayed gradient (``overlap=``) waiting for the next step: this one
        throws away what ``synchronize()`` has handed out, such as a spike.

        Raises:
            RuntimeError: gradients are on their way.
        """
        self._hvd_ext.skip_step()

    def flush(self, before_update: Callable[[], Any] | None = None) -> None:
        """Take the update that is still to come with ``overlap=``; without, nothing.

        A collective: call it on every rank after the last step, and before weights are used otherwise.
        ``parameter.grad`` is the same before and after; a step that was reduced and not taken is thrown away.

        Args:
            before_update: called between the two halves of this step, while ``parameter.grad`` holds the
                gradient without the loss's scale: for what the loop does between ``synchronize()`` and
                ``step()``, such as ``lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)``.

        Raises:
            RuntimeError: a step has begun.
        """
        self._hvd_ext.flush(super(type(self), self).step, before_update)

    @contextmanager
    def exact_weights(self) -> Iterator[None]:
        """Within the block the parameters hold the exact weights, where the server's replies are compressed.

        After it they hold again what the ranks share and take gradients at. For evaluation and saving; a
        collective: enter it on every rank, between two steps.

        Raises:
            RuntimeError: a step has begun, or is taken within.
        """
        with self._hvd_ext.exact_weights():
            yield

    __reduce_ex__ = reduce_wrapped

    def report(self) -> dict[str, Any]:
        """Figures of the last step: bytes by kind, and those of each extension in use."""
        return optimizer_state.report(self._hvd_ext)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under "hvd_ext", this rank's of the extensions.

        With ``server="sharded"`` (and with "rank0" on the other ranks) the moments of parameters
        that another rank owns are not in it; see ``gather_state_dict``.
        """
        return optimizer_state.state_dict(self._hvd_ext, super().state_dict(), gather=False)

    def gather_state_dict(self) -> dict[str, Any]:
        """As ``state_dict()``, with the moments of all parameters, whichever rank owns them.

        A collective: call it on every rank. What it gives can be loaded under any ``server=``.
        """
        return optimizer_state.state_dict(self._hvd_ext, super().state_dict(), gather=True)

    def load_state_dict(self, state_dict: dict[str, Any], *,
                        reset_per_rank_state: bool = False) -> None:
        """Restore what ``state_dict()`` gave on this rank.

        Args:
            state_dict: of this rank, of as many ranks. One without extension state (plain
                Horovod or torch) is taken too; the extensions then start anew.
            reset_per_rank_state: take a state of another rank or number of ranks, and start
                what is kept per rank anew.

        Raises:
            ValueError: the state is another rank's or of another number of ranks.
        """
        optimizer_state.load_state_dict(self._hvd_ext, state_dict, super().load_state_dict,
                                        reset_per_rank_state=reset_per_rank_state)
        self._should_synchronize = True
