"""SENG, the sketchy empirical natural gradient, as a preconditioner for PyTorch.

``optimizer.py`` calls ``attach``, ``before_reduce`` and ``precondition``; without a distributed
optimizer ``step()`` is called between ``loss.backward()`` and ``optimizer.step()``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hvd_ext.seng import DEFAULT_SKETCH_SIZE, Report, Settings
from hvd_ext.seng.settings import Damping
from hvd_ext.torch.collectives import Collectives, Handle
from hvd_ext.torch.loss_scale import loss_scale
from hvd_ext.torch.seng import state as saved
from hvd_ext.torch.seng.blocks import (
    Curvature,
    contribution,
    subtract,
    subtract_at_once,
)
from hvd_ext.torch.seng.capture import Capture
from hvd_ext.torch.seng.gradients import Gradients, all_finite
from hvd_ext.torch.seng.inventory import Layer, take_inventory
from hvd_ext.torch.seng.refresh import Refresh, Refreshed


class SENG:
    """Replaces gradients by ``p = (U U^T + lam I)^{-1} g`` (SENG eq. 8-9), layer by layer.

    As ``preconditioner=`` of ``hvd.DistributedOptimizer``, or by itself::

        seng = hvd.SENG(model, damping=0.2)
        loss.backward()
        seng.step()                  # .grad, averaged over ranks already, becomes p
        optimizer.step()

    Linear, convolution (1-3 dimensions, transposed in 2), batch, layer and group norm layers get
    their empirical Fisher matrix, any other parameter ``g/(1 + lam)``. The curvature is taken
    from the forward and backward pass of every ``update_freq``-th step; hooks exist only then.
    The loss must be the mean or sum over the rank's batch, the first axis of every layer's input.

    Args:
        model: any module; its parameters are not changed, only their ``.grad``.
        grad_scaler: the ``torch.amp.GradScaler`` the loss is scaled with, if any. With ``step()``
            call ``grad_scaler.unscale_(optimizer)`` before it.
        name: prefix of the names in Horovod's timeline; one each when there are several.

    The other arguments are those of :class:`hvd_ext.seng.Settings`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its limits, a sketch larger than every layer, or a model
            with no layer that has a rule.
    """

    def __init__(self, model: nn.Module, *, damping: Damping, update_freq: int = 200,
                 coupling: str = "block", uc: str = "factored", explicit_threshold: int = 700_000,
                 sketch: str | None = "uniform", sketch_size: int = DEFAULT_SKETCH_SIZE,
                 replacement: bool = False, rank: int = 16, row_sketch: int = 512,
                 subsample: int | None = None, loss_reduction: str = "mean",
                 loss_scale: float = 1.0, curvature_dtype: str | torch.dtype | None = None,
                 exclude: Iterable[str] | None = None, seed: int = 0,
                 grad_scaler: Any = None, name: str = "seng") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
        if isinstance(exclude, str):
            raise TypeError(f"exclude must be a list of module names, got {exclude!r}; pass "
                            f"[{exclude!r}]")
        if isinstance(curvature_dtype, torch.dtype):
            curvature_dtype = str(curvature_dtype).removeprefix("torch.")
        self.settings = Settings(
            damping=damping, update_freq=update_freq, coupling=coupling, uc=uc,
            explicit_threshold=explicit_threshold, sketch=sketch, sketch_size=sketch_size,
            replacement=replacement, rank=rank, row_sketch=row_sketch, subsample=subsample,
            loss_reduction=loss_reduction, loss_scale=loss_scale, curvature_dtype=curvature_dtype,
            exclude=exclude, seed=seed,
        )
        self.model = model
        self.name = name
        self._scaler = grad_scaler
        self._collectives: Collectives | None = None
        self._attached = False
        self._ranks = 0
        self._said: set[tuple[str, str]] = set()
        self._layers: list[Layer] = []
        self._trainable: list[bool] = []
        self.waited = 0.0
        self._forget()
        self._scan()
        self.settings.check_sketch(
            layer.shape.n for layer in self._layers if not layer.plan.implicit)
        self._arm()

    def _forget(self) -> None:
        self._step = 0
        self._due = True
        self._checked = False
        self._prepared = False
        self._curvatures: dict[Layer, Curvature] = {}
        self._candidate: Refreshed | None = None
        self._pending: dict[Layer, Handle | torch.Tensor] | None = None
        self._candidate_pending: dict[Layer, Handle | torch.Tensor] | None = None
        self._previous: dict[Layer, list[torch.Tensor]] | None = None
        self._failures: dict[str, int] = {}
        self._skipped = 0

    def _scan(self) -> None:
        """Find the layers; keep the curvature of those whose parameters are the same."""
        trainable = [p.requires_grad for p in self.model.parameters()]
        if self._layers and trainable == self._trainable:
            return
        former = {tuple(map(id, layer.parameters)): layer for layer in self._layers}
        inventory = take_inventory(self.model, self.settings)
        if not inventory.layers:
            raise ValueError(
                f"{type(self.model).__name__} has no trainable layer that SENG has a rule for "
                "(linear, convolution, batch, layer or group norm); precondition another model, "
                "unfreeze layers, shorten exclude=, or register a rule with "
                "hvd.register_seng_rule")
        if inventory.without_rule:
            self._say_once("rule", ", ".join(inventory.without_rule),
                           "SENG has no rule for {}; their parameters get g/(1 + damping). Teach it "
                           "one with hvd.register_seng_rule, or name them in exclude= to agree")
        kept = {}
        for layer in inventory.layers:
            old = former.get(tuple(map(id, layer.parameters)))
            if old is not None and old in self._curvatures:
                kept[layer] = self._curvatures[old]
        if self._layers:
            self.capture.stop()
            self._drop_lagged()
        self._layers, self._trainable, self._curvatures = inventory.layers, trainable, kept
        self.capture = Capture(self._layers, self.settings, self._amp_scale)

    def attach(self, collectives: Collectives | None, optimizer: Any = None) -> None:
        """Use these collectives from now on. Called again when the number of ranks has changed:
        what depends on it is dropped then and the curvature taken anew at the next step."""
        self._attached = True
        self._use(collectives)

    def _use(self, collectives: Collectives | None) -> None:
        ranks = 1 if collectives is None else collectives.size
        self._collectives = collectives if ranks > 1 else None
        if self._ranks not in (0, ranks):
            # Ranks that have joined have no curvature; the refresh that follows gives it to all.
            self._pending = self._candidate_pending = self._previous = self._candidate = None
            self._curvatures = {}
            self._due, self._prepared, self._checked = True, False, False
            self._arm()
        self._ranks = ranks

    def set_grad_scaler(self, scaler: Any) -> None:
        """The ``torch.amp.GradScaler`` the loss is scaled with; None for none."""
        self._scaler = scaler

    def close(self) -> None:
        """Remove all hooks and wait for what is under way. The object is of no use afterwards."""
        self.capture.stop()
        self._drop_lagged()

    def before_reduce(self) -> None:
        """After the backward pass, before the gradients' reduction is waited for: take what was
        captured on a refresh step. Nothing counts before ``precondition()`` sees the gradient."""
        self._prepared = True
        # One that is still there belongs to a step that was not taken.
        self._discard()
        if self._checked and not self._due:
            return
        refresh = Refresh(self._layers, self.settings, self._collectives, self.name)
        if not self._checked:
            self._check(refresh)
        if not self._due:
            return
        captured = self.capture.collect()
        lam = self.settings.damping_at(self._step)
        self._candidate = refresh.run(captured, self._step, lam)
        if self._previous is not None and self._candidate.step == self._step:
            # SENG eq. 27 with this step's U and the former gradient, beside the gradients.
            curvatures = {**self._curvatures, **self._candidate.curvatures}
            self._candidate_pending = {
                layer: self._start(layer, self._message(layer, curvatures[layer],
                                                        self._previous[layer], lam))
                for layer in self._layers if layer in curvatures and layer in self._previous}

    def _check(self, refresh: Refresh) -> None:
        """See that the ranks are alike before they rely on it."""
        kept = [layer.name for layer in self._curvatures]
        kept += [key for key in ("_pending", "_previous") if getattr(self, key) is not None]
        if not refresh.same_state(self._step, self._due, kept):
            self._drop_lagged()
            self._curvatures = {}
        self._checked = True

    @torch.no_grad()
    def precondition(self) -> None:
        """Replace every ``parameter.grad``, reduced and the same on all ranks, by p, in place.

        A gradient that is not finite is left as it is, with the whole state, so that a gradient
        scaler can back off.

        Raises:
            RuntimeError: no parameter has a gradient.
        """
        held = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not held:
            raise RuntimeError("SENG.step() found no gradient; call loss.backward() before it, and "
                               "zero_grad() only after optimizer.step()")
        if not self._attached and self._ranks == 0:
            self._find_ranks()
        if not self._prepared:
            self.before_reduce()
        self._prepared = False
        if not all_finite(held):
            self._skip()
            return
        self._commit()
        lam = self.settings.damping_at(self._step)
        scale = self._amp_scale() if self._attached and self.settings.coupling == "lagged" else 1.0
        gradients = {layer: Gradients(layer, 1.0 / scale) for layer in self._curvatures}
        self._directions(gradients, lam)
        done = {id(p) for layer in gradients for p in layer.parameters}
        for parameter in self.model.parameters():
            if parameter.grad is not None and id(parameter) not in done:
                parameter.grad.div_(1.0 + lam)
        for one in gradients.values():
            one.write_back(scale)
        self._step += 1
        self._due = self._due or self._step % self.settings.update_freq == 0
        self._arm()

    def step(self) -> None:
        """The same without a distributed optimizer, after the backward pass: every ``.grad``,
        already averaged over ranks where there are several (each rank calls it) and unscaled,
        becomes p.

        Raises:
            RuntimeError: no parameter has a gradient.
        """
        if not self._attached:
            self._find_ranks()
        if any(p.grad is not None for p in self.model.parameters()):
            self.before_reduce()
        self.precondition()

    def _find_ranks(self) -> None:
        import horovod.torch as horovod

        if horovod.is_initialized() and horovod.size() > 1:
            self._use(self._collectives or Collectives())
        else:
            self._use(None)

    def _directions(self, gradients: dict[Layer, Gradients], lam: float) -> None:
        for layer in gradients:
            # Only a damping that changes with the step needs a new factor here. Should none
            # exist, the former one still gives a direction, the same on every rank.
            self._curvatures[layer].factor(lam)
        if self.settings.coupling == "lagged":
            self._lagged(gradients, lam)
            return
        if self._collectives is None:
            for layer, one in gradients.items():
                curvature = self._curvatures[layer]
                b = curvature.solve(one.flat)
                subtract_at_once(curvature, b, one.flat, lam, self.settings.uc)
            return
        started = {layer: self._start(layer, self._message(layer, self._curvatures[layer],
                                                           one.flat, lam))
                   for layer, one in gradients.items()}
        for layer, one in gradients.items():
            subtract(self._curvatures[layer], self._wait(started[layer]), one.flat, lam,
                     self.settings.uc)

    def _lagged(self, gradients: dict[Layer, Gradients], lam: float) -> None:
        """SENG eq. 27; "block" for layers that have no former gradient yet."""
        pending = self._pending or {}
        started = {layer: pending[layer] if layer in pending else
                   self._start(layer, self._message(layer, self._curvatures[layer], one.flat, lam))
                   for layer, one in gradients.items()}
        refresh_next = (self._step + 1) % self.settings.update_freq == 0 or self._due
        if refresh_next:
            self._previous, self._pending = {}, None
        else:
            self._previous, self._pending = None, {}
            lam_next = self.settings.damping_at(self._step + 1)
        for layer, one in gradients.items():
            curvature, following = self._curvatures[layer], None
            if self._previous is not None:
                self._previous[layer] = [g.clone() for g in one.flat]
            else:
                following = self._message(layer, curvature, one.flat, lam_next)
            subtract(curvature, self._wait(started[layer]), one.flat, lam, self.settings.uc)
            if following is not None and self._pending is not None:
                # Under way from here on, during the next forward and backward pass.
                self._pending[layer] = self._start(layer, following)

    def _message(self, layer: Layer, curvature: Curvature, flat: list[torch.Tensor],
                 lam: float) -> torch.Tensor:
        curvature.factor(lam)
        return contribution(curvature, curvature.solve(flat), self.settings.uc)

    def _start(self, layer: Layer, message: torch.Tensor) -> Handle | torch.Tensor:
        if self._collectives is None:
            return message
        return self._collectives.allreduce_async_(message, f"{self.name}.uc/{layer.name}",
                                                  kind="curvature")

    def _wait(self, started: Handle | torch.Tensor) -> torch.Tensor:
        if isinstance(started, torch.Tensor):
            return started
        begin = time.perf_counter()
        message = started.wait()
        self.waited += time.perf_counter() - begin
        return message

    def _commit(self) -> None:
        """Put a refresh's curvature in place; say what failed."""
        candidate, self._candidate = self._candidate, None
        if candidate is None:
            return
        self._curvatures = {layer: candidate.curvatures.get(layer, self._curvatures.get(layer))
                            for layer in self._layers
                            if layer in candidate.curvatures or layer in self._curvatures}
        if self._candidate_pending is not None:
            self._pending, self._candidate_pending = self._candidate_pending, None
        self._previous = None
        self._step = candidate.step
        # With nothing captured anywhere the next step tries again.
        self._due = not candidate.curvatures
        for layer, reason in candidate.failures.items():
            self._failures[layer.name] = self._failures.get(layer.name, 0) + 1
            left = ("keeps its former curvature" if layer in self._curvatures
                    else "gets g/(1 + damping) until then")
            self._say_once(layer.name, layer.name, f"SENG could not refresh {{}}: {reason}. It "
                           f"{left}; further failures are counted in report()")

    def _skip(self) -> None:
        """Leave a gradient that is not finite alone, and all that would have followed from it."""
        self._skipped += 1
        self._discard()
        if self._due:
            self.capture.start(self._step)

    def _discard(self) -> None:
        self._candidate = None
        for started in (self._candidate_pending or {}).values():
            self._wait(started)
        self._candidate_pending = None

    def _drop_lagged(self) -> None:
        for pending in (self._pending, self._candidate_pending):
            for started in (pending or {}).values():
                self._wait(started)
        self._pending = self._candidate_pending = self._previous = self._candidate = None

    def _arm(self) -> None:
        """Install the hooks when the coming step refreshes the curvature, remove them otherwise."""
        if self._due:
            self._scan()
            self.capture.start(self._step)
        elif self.capture.active:
            self.capture.stop()

    def _amp_scale(self) -> float:
        return loss_scale(self._scaler)

    def _say_once(self, key: str, names: str, message: str) -> None:
        if (key, message) not in self._said:
            self._said.add((key, message))
            warnings.warn(message.format(names), stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state between two steps: curvature, lagged gradient, counters."""
        return saved.save(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict()`` gave, so that the next step is the same bit for bit.

        Raises:
            ValueError: it is of another model, other settings or another number of ranks.
        """
        saved.load(self, state)

    def reset_state(self) -> None:
        """Start anew: no curvature, step 0, a refresh at the next step."""
        self._drop_lagged()
        self._forget()
        self._arm()

    def report(self) -> Report:
        """Per layer: kind, sizes, bytes, coefficient norm, jitter, age; prints as a table."""
        return saved.report(self)
