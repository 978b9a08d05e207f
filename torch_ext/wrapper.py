"""An optimizer with extensions in its step: hooks, synchronisation, state.

The way of a gradient: backward hook -> reducer -> ``synchronize()`` -> preconditioner -> the
user's clipping, if any -> ``step()`` -> server.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvd_ext.torch.reducers.base import Entry, Reducer

STATE_KEY = "hvd_ext"


def extend(optimizer: torch.optim.Optimizer, named_parameters: Any, reducer: Reducer,
            preconditioner: Any, server: Any, grad_scaler: Any) -> Any:
    """An instance of a subclass of the optimizer's class that shares everything it has."""
    wrapped = type(optimizer)
    # ``step`` is defined in the class itself, under Horovod's module name: Horovod's
    # broadcast_optimizer_state then finds the wrapped optimizer's own step one class above.
    members = {"step": ExtendedOptimizer._distributed_step, "__module__": "horovod.torch.optimizer"}
    cls = type(wrapped.__name__, (ExtendedOptimizer, wrapped), members)
    extended = cls.__new__(cls)
    # A scheduler that already watches the optimizer has put a step of its own into the instance.
    extended.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
    extended._hvd_setup(named_parameters, reducer, preconditioner, server, grad_scaler)
    return extended


class ExtendedOptimizer(torch.optim.Optimizer):
    """What an optimizer wrapped with an extension has beside its own class's methods."""

    def _hvd_setup(self, named_parameters: Any, reducer: Reducer, preconditioner: Any, server: Any,
                   grad_scaler: Any) -> None:
        self._hvd_wrapped: type = type(self).__mro__[2]
        self._hvd_names = _checked_names(self.param_groups, named_parameters)
        self._hvd_reducer = reducer
        self._hvd_preconditioner = preconditioner
        self._hvd_server = server
        self._hvd_passes: Counter[torch.Tensor] = Counter()
        self._hvd_hooks: dict[torch.Tensor, Any] = {}
        self._hvd_take_step = True
        self._hvd_size = reducer.collectives.size if reducer.collectives.included else 0
        self._synchronized = False
        self._should_synchronize = True
        self._hvd_watch()
        if preconditioner is not None:
            if grad_scaler is not None:
                preconditioner.set_grad_scaler(grad_scaler)
            preconditioner.attach(reducer.collectives, self)
        if server is not None:
            server.attach(reducer.collectives, self, list(self._hvd_entries()))

    @property
    def backward_passes_per_step(self) -> int:
        """Backward passes expected before ``step()``."""
        return self._hvd_reducer.passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change the number of backward passes before ``step()``; between steps only."""
        if passes <= 0:
            raise ValueError("backward_passes_per_step must be > 0")
        self._hvd_passes.clear()
        self._hvd_reducer.forget()
        self._hvd_reducer.passes = passes

    def _hvd_entries(self) -> Iterator[Entry]:
        for index, group in enumerate(self.param_groups):
            for number, parameter in enumerate(group["params"]):
                name = self._hvd_names.setdefault(parameter, f"allreduce.noname.{index}.{number}")
                yield Entry(name, parameter, index, group)

    def _hvd_watch(self) -> None:
        """Hook parameters that require a gradient and are not hooked yet; plan their exchange."""
        fresh = [entry for entry in self._hvd_entries()
                 if entry.parameter.requires_grad and entry.parameter not in self._hvd_hooks]
        if not fresh or not self._hvd_reducer.collectives.included:
            return
        for entry in fresh:
            hook = self._hvd_hook(entry)
            self._hvd_hooks[entry.parameter] = (
                entry.parameter.register_post_accumulate_grad_hook(hook)
            )
        self._hvd_reducer.build([*self._hvd_reducer.entries, *fresh])

    def _hvd_hook(self, entry: Entry) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            done = self._hvd_passes[parameter] + 1
            if done > self._hvd_reducer.passes:
                raise AssertionError(
                    "Gradients were computed more than backward_passes_per_step times before call "
                    "to step(). Increase backward_passes_per_step to accumulate gradients locally."
                )
            self._hvd_passes[parameter] = done
            self._hvd_reducer.gradient_ready(entry, done)

        return hook

    def synchronize(self) -> None:
        """Wait for the reduced gradients and precondition them; ``parameter.grad`` holds them after."""
        reducer = self._hvd_reducer
        if not reducer.collectives.included:
            self._synchronized = True
            return
        try:
            self._hvd_watch()
            self._hvd_meet_ranks()
            if self._hvd_preconditioner is not None:
                self._hvd_preconditioner.before_reduce()
            self._hvd_take_step = reducer.finish()
            if self._hvd_preconditioner is not None and self._hvd_take_step:
                self._hvd_preconditioner.precondition()
        except BaseException:
            reducer.forget()
            raise
        finally:
            self._hvd_passes.clear()
        reducer.collectives.traffic.step()
        self._synchronized = True

    def _hvd_meet_ranks(self) -> None:
        """After an elastic change of the number of ranks, let the extensions take their new part."""
        collectives = self._hvd_reducer.collectives
        before, self._hvd_size = self._hvd_size, collectives.size
        if before == self._hvd_size:
            return
        if self._hvd_server is not None and self._hvd_server.where != "replicated":
            raise RuntimeError(
                f"the number of ranks changed from {before} to {self._hvd_size}, and "
                f"server={self._hvd_server.where!r} left moments on ranks that are not all here; wrap "
                'the optimizer anew and load a gather_state_dict(), or train with server="replicated"'
            )
        if self._hvd_preconditioner is not None:
            self._hvd_preconditioner.attach(collectives, self)

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """``step()`` inside does not synchronize: for clipping between ``synchronize()`` and ``step()``."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def _distributed_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize, unless told not to, and take the wrapped optimizer's step.

        A closure is evaluated once, before the gradients are synchronized.
        """
        loss = None
        if closure is not None:
            if self._hvd_server is not None:
                self._hvd_server.refuse_closure()
            with torch.enable_grad():
                loss = closure()
        if self._should_synchronize:
            if self._synchronized:
                warnings.warn(
                    "optimizer.step() called without optimizer.skip_synchronize() context after "
                    "optimizer.synchronize(). This can cause training slowdown. You may want to "
                    "consider using optimizer.skip_synchronize() context if you use "
                    "optimizer.synchronize() in your code.", stacklevel=2,
                )
            self.synchronize()
        self._synchronized = False
        if not self._hvd_take_step:
            return loss
        inner = super(type(self), self).step
        if self._hvd_server is not None and self._hvd_reducer.collectives.included:
            result = self._hvd_server.step(inner)
            self._hvd_reducer.collectives.traffic.step(same=True)
        else:
            result = inner()
        return loss if closure is not None else result

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """As the wrapped optimizer's; refused while gradients are under way."""
        if self._hvd_passes and not self._synchronized:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before "
                "optimizer.step() or optimizer.synchronize(). This is prohibited as it can cause "
                "a race condition."
            )
        super().zero_grad(*args, **kwargs)

    def report(self) -> dict[str, Any]:
        """Figures of the last step: bytes by kind, and those of each extension in use."""
        traffic = self._hvd_reducer.collectives.traffic
        figures = {"sent": dict(traffic.last_sent), "received": dict(traffic.last_received),
                   **self._hvd_reducer.report()}
        for name in ("preconditioner", "server"):
            extension = getattr(self, f"_hvd_{name}")
            if extension is not None:
                figures[name] = extension.report()
        return figures

    # State

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under "hvd_ext", this rank's of the extensions.

        With ``server="sharded"`` (and with "rank0" on the other ranks) the moments of parameters
        that another rank owns are not in it; see ``gather_state_dict``.
        """
        return self._hvd_state_dict(gather=False)

    def gather_state_dict(self) -> dict[str, Any]:
        """As ``state_dict()``, with the moments of all parameters, whichever rank owns them.

        A collective: call it on every rank. What it gives can be loaded under any ``server=``.
        """
        return self._hvd_state_dict(gather=True)

    def _hvd_state_dict(self, *, gather: bool) -> dict[str, Any]:
        state = super().state_dict()
        collectives = self._hvd_reducer.collectives
        own: dict[str, Any] = {"rank": collectives.rank, "size": collectives.size,
                               "reducer": self._hvd_reducer.state_dict()}
        if self._hvd_preconditioner is not None:
            own["preconditioner"] = self._hvd_preconditioner.state_dict()
        if self._hvd_server is not None:
            server = self._hvd_server
            state, own["server"] = server.gather(state) if gather else server.state_dict(state)
        return {**state, STATE_KEY: own}

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
        state_dict = dict(state_dict)
        own = state_dict.pop(STATE_KEY, None)
        collectives = self._hvd_reducer.collectives
        here = (collectives.rank, collectives.size)
        per_rank = own is not None and any(own.get(key) for key in ("reducer", "preconditioner"))
        if per_rank and not reset_per_rank_state and (own["rank"], own["size"]) != here:
            raise ValueError(
                f"this state was saved by rank {own['rank']} of {own['size']} and is loaded by rank "
                f"{here[0]} of {here[1]}, but the extensions keep state per rank; save and load "
                "one file a rank, or pass reset_per_rank_state=True to start that state anew"
            )
        self._hvd_reducer.forget()
        self._hvd_passes.clear()
        self._synchronized = False
        self._should_synchronize = True
        if self._hvd_server is not None:
            state_dict = self._hvd_server.load_state_dict(
                state_dict, None if own is None else own.get("server")
            )
        super().load_state_dict(state_dict)
        parts = [("reducer", self._hvd_reducer), ("preconditioner", self._hvd_preconditioner)]
        for key, part in parts:
            if part is None:
                continue
            if own is None or reset_per_rank_state or key not in own:
                part.reset_per_rank_state() if part is self._hvd_reducer else part.reset_state()
            else:
                part.load_state_dict(own[key])


def _checked_names(param_groups: list[dict[str, Any]], named_parameters: Any) -> dict[Any, str]:
    """Names by parameter, checked as Horovod checks them."""
    if named_parameters is None:
        return {}
    named = list(named_parameters)
    if any(not isinstance(pair, tuple) for pair in named):
        raise ValueError("named_parameters should be a sequence of tuples (name, parameter), "
                         "usually produced by model.named_parameters().")
    repeated = sorted(name for name, count in Counter(n for n, _ in named).items() if count > 1)
    if repeated:
        raise ValueError("Parameter names in named_parameters must be unique. Found duplicates: "
                         + ", ".join(repeated))
    names = {parameter: name for name, parameter in named}
    unnamed = [p for group in param_groups for p in group["params"] if p not in names]
    if unnamed:
        shapes = ", ".join(str(tuple(p.shape)) for p in unnamed[:4])
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named "
            f"(shapes {shapes}); pass the named_parameters() of the whole model"
        )
    return names
