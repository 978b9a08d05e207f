"""SENG, the sketchy empirical natural gradient, as a preconditioner for PyTorch.

``step.py`` calls ``attach``, ``before_reduce`` and ``precondition``; without a distributed
optimizer ``step()`` is called between ``loss.backward()`` and ``optimizer.step()``. The equations are
in ``step.py``, the refresh of the curvature in ``refresh.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.torch as horovod
import torch
from torch import nn

from hvd_ext.reducers.skipped_step import SkippedStep
from hvd_ext.seng import CurvatureReport, Settings, takes_settings
from hvd_ext.seng.coverage_report import UncoveredParameters
from hvd_ext.seng.once_warnings import OnceWarnings
from hvd_ext.torch.collectives import Collectives
from hvd_ext.torch.loss_scale import loss_scale
from hvd_ext.torch.seng.batched_solve import BatchedSolver
from hvd_ext.torch.seng.capture import Capture, RuleStatus
from hvd_ext.torch.seng.force_eager import ForceEagerGuard
from hvd_ext.torch.seng.kernels import all_finite
from hvd_ext.torch.seng.layer_discovery import Layer, take_inventory
from hvd_ext.torch.seng.parameter_cache import ParameterCache
from hvd_ext.torch.seng.pending import Candidate, Pending, pending_state
from hvd_ext.torch.seng.refresh import Refresh
from hvd_ext.torch.seng.state import State
from hvd_ext.torch.seng.step import Lagged, Step


class SENG:
    """Replaces gradients by ``p = (U U^T + lam I)^{-1} g`` (SENG eq. 8-9), layer by layer.

    As ``preconditioner=`` of ``hvd.DistributedOptimizer``, or by itself::

        seng = hvd.SENG(model, damping=0.2)
        loss.backward()
        seng.step()                  # .grad, averaged over ranks already, becomes p
        optimizer.step()

    Linear, convolution (1-3 dimensions, transposed in 2), norm, embedding and attention layers, and
    small modules whose ``forward`` treats samples apart, get their empirical Fisher matrix; others what
    ``other`` says. The curvature is taken in every ``update_freq``-th step; hooks exist only then, and a
    compiled model runs uncompiled. The loss must be the mean or sum over the rank's batch; where its layers
    have the batch is found out (``samples``).

    Args:
        model: any module; its parameters are not changed, only their ``.grad``.
        grad_scaler: the ``torch.amp.GradScaler`` in use; before ``step()`` call its ``unscale_(optimizer)``.
        name: prefix of the names in Horovod's timeline; one each when there are several.

    The other arguments are those of :class:`hvd_ext.seng.Settings`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its limits, a sketch larger than every layer, or a model
            with no layer that has a rule.
    """

    @takes_settings
    def __init__(self, model: nn.Module, *, grad_scaler: Any = None, name: str = "seng",
                 **settings: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
        self.settings = self._asked = Settings(**settings)
        self.model = model
        self.name = name
        self.layers: list[Layer] = []
        self.state = State()
        self._scaler = grad_scaler
        self._collectives: Collectives | None = None
        self._attached = False
        self._ranks = 0
        self._step = Step(None, name, self.settings.uc)
        self._notices = OnceWarnings(self.settings)
        self._eager = ForceEagerGuard()
        self._parameters = ParameterCache(model)
        self._joint: BatchedSolver | None = None
        self._missing: list[UncoveredParameters] = []
        self._trainable: list[bool] = []
        self._forget_step()
        self._discover_layers()
        self.settings.check_sketch(
            layer.shape.n for layer in self.layers if not layer.plan.implicit)
        self._install_hooks_if_due()

    # Set-up

    def _discover_layers(self) -> None:
        """Find the layers; keep the curvature of those whose parameters are the same."""
        trainable = [p.requires_grad for p in self._parameters.current_parameters()]
        if self.layers and trainable == self._trainable:
            return
        before = {tuple(map(id, layer.parameters)): layer for layer in self.layers}
        inventory = take_inventory(self.model, self._asked)
        if not inventory.layers and not inventory.without_rule:
            raise ValueError(
                f"{type(self.model).__name__} has no trainable layer that SENG has a rule for "
                "(linear, convolution, batch, layer or group norm); precondition another model, "
                "unfreeze layers, shorten exclude=, or register a rule with "
                "hvd.register_seng_rule")
        self._notices.without_rule(inventory.without_rule)
        kept = {}
        for layer in inventory.layers:
            old = before.get(tuple(map(id, layer.parameters)))
            if old is not None and old in self.state.systems:
                kept[layer] = self.state.systems[old]
        if self.layers:
            self.capture.remove_hooks()
            self._drop_lagged()
            self._joint = None
        self.layers, self._trainable, self.state.systems = inventory.layers, trainable, kept
        self.settings = inventory.settings
        self._notices.print_memory(self.settings, [layer.plan for layer in self.layers],
                                   rank=horovod.rank() if horovod.is_initialized() else 0)
        self._missing, self._trust = inventory.missing, RuleStatus()
        self.capture = Capture(self.model, self.layers, self.settings, lambda: loss_scale(self._scaler))
        self._refresh: Refresh | None = None

    def shared_state(self) -> dict[str, int]:
        """The counters, which are the same on every rank."""
        return {"step": self.state.step, "skipped": self.state.skipped}

    def load_shared_state(self, state: dict[str, int]) -> None:
        """Take over another rank's counters; the curvature is taken anew at the next step."""
        self.state.step, self.state.skipped, self.state.due = state["step"], state["skipped"], True
        self._install_hooks_if_due()

    def attach(self, collectives: Collectives | None, optimizer: Any = None) -> None:
        """Use these collectives from now on. Called again when the number of ranks has changed:
        what depends on it is dropped then and the curvature taken anew at the next step."""
        self._attached = True
        self._set_collectives(collectives)

    def _set_collectives(self, collectives: Collectives | None) -> None:
        ranks = 1 if collectives is None else collectives.size
        self._collectives = collectives if ranks > 1 else None
        self._step.collectives = self._collectives
        self._refresh = None
        if self._ranks not in (0, ranks):
            self.state.lagged, self.state.systems, self.state.due = Lagged(), {}, True
            self._forget_step()
            self._install_hooks_if_due()
        self._ranks = ranks

    def _find_ranks(self) -> None:
        several = horovod.is_initialized() and horovod.size() > 1
        self._set_collectives((self._collectives or Collectives()) if several else None)

    def set_grad_scaler(self, scaler: Any) -> None:
        """The ``torch.amp.GradScaler`` the loss is scaled with; None for none."""
        self._scaler = scaler

    def close(self) -> None:
        """Remove all hooks and wait for what is under way. The object is of no use afterwards."""
        self.capture.remove_hooks()
        self._eager.allow_compiled()
        self._drop_lagged()

    # The step

    def before_reduce(self) -> None:
        """After the backward pass, before the gradients' reduction is waited for: take what was
        captured on a refresh step. Nothing counts before ``precondition()`` sees the gradient."""
        self._prepared = True
        self._discard_captured()  # one that is still there belongs to a step that was not taken
        state = self.state
        if not self._checked:
            self._check_progress(self._make_refresh())
        if not state.due:
            return
        refresh = self._make_refresh()
        lam = self.settings.damping_at(state.step)
        refreshed = refresh.refresh_curvature(self.capture.collect_captured(), self._trust.refused,
                                              self.capture.by_rows(), state.step, lam)
        self.capture.install_hooks(state.step, self._trust)  # what follows is another pass's, if it is used
        lagged = None
        if state.lagged.previous and refreshed.step == state.step:
            # SENG eq. 27 with this step's U and the last gradient, beside the gradients.
            lagged = state.lagged.with_curvature({**state.systems, **refreshed.systems},
                                                 self._step, lam)
        self._candidate = Candidate(refreshed, lagged)

    def _make_refresh(self) -> Refresh:
        if self._refresh is None:
            self._refresh = Refresh(self.layers, self.settings, self._collectives, self.name)
        return self._refresh

    def _check_progress(self, refresh: Refresh) -> None:
        """See that all ranks have the same state before they rely on it."""
        kept = [layer.name for layer in self.state.systems] + self.state.lagged.part_names()
        if not refresh.same_state(self.state.step, self.state.due, kept):
            self._drop_lagged()
            self.state.systems = {}
        self._checked = True

    @torch.no_grad()
    def precondition(self) -> None:
        """Replace every ``parameter.grad``, reduced and the same on all ranks, by p, in place.

        What is kept between steps stays as it is until ``commit()``. A gradient that is not finite is left
        as it is, so that a gradient scaler can back off.

        Raises:
            RuntimeError: no parameter has a gradient.
        """
        parameters = self._parameters.current_parameters()
        held = [p.grad for p in parameters if p.grad is not None]
        if not held:
            raise RuntimeError("SENG.step() found no gradient; call loss.backward() before it, and "
                               "zero_grad() only after optimizer.step()")
        if not self._attached and self._ranks == 0:
            self._find_ranks()
        if not self._prepared:
            self.before_reduce()
        self._prepared = False
        if not all_finite(held):
            self._skip_step()
            return
        self._drop_pending()
        self._pending = self._with_refresh()
        state = self._pending.state
        self._compute_directions(parameters, state)
        state.step += 1
        state.due = state.due or state.step % self.settings.update_freq == 0

    def commit(self) -> None:
        """The step is taken: its curvature and counters hold from here on."""
        self.state.skipped += self._skipped.count_committed()
        pending, self._pending = self._pending, None
        if pending is not None:
            self.state, self._trust = pending.state, pending.trust
            self._install_hooks_if_due()

    def abandon(self) -> None:
        """The step is not taken: keep nothing of it; on all ranks alike."""
        self.state.skipped += self._skipped.count_abandoned(loss_scale(self._scaler))
        self._drop_pending()
        self._discard_captured()
        self._prepared = False

    def _drop_pending(self) -> None:
        """Drop what ``precondition()`` left pending; its messages must have been received before."""
        pending, self._pending = self._pending, None
        if pending is not None and pending.state.lagged is not self.state.lagged:
            pending.state.lagged.wait_messages(self._step)

    def _compute_directions(self, parameters: Sequence[torch.nn.Parameter], state: State) -> None:
        """Gradients into directions: by the layers' curvature, by ``other`` without one."""
        settings = self.settings
        lam = settings.damping_at(state.step)
        if settings.resample == "step":
            state.systems = self._make_refresh().resample_rows(state.systems, state.step, lam)
        lagging = settings.coupling == "lagged"
        stale = [layer for layer, system in state.systems.items()
                 if settings.stale_curvature == "rescale" and system.step != state.step]
        # p is linear in g: only what is kept from step to step, or compared, must have the same scale.
        scale = loss_scale(self._scaler) if self._attached and (lagging or stale) else 1.0
        joint = self._joint
        if joint is None or not joint.is_of(state.systems):
            joint = self._joint = BatchedSolver(state.systems)
        joint.load_gradients(1.0 / scale)
        before = joint.copy_gradients() if stale else {}
        if lagging:
            refresh_next = state.due or (state.step + 1) % settings.update_freq == 0
            lam_next = None if refresh_next else settings.damping_at(state.step + 1)
            state.lagged = self._step.lagged_directions(joint, lam, state.lagged, lam_next)
        else:
            self._step.compute_directions(joint, lam)
        if stale:
            joint.rescale_stale(before, stale)
        divisor = settings.fallback_divisor(lam)
        if divisor != 1.0:
            done = {id(p) for layer in joint.systems for p in layer.parameters}
            for parameter in parameters:
                if parameter.grad is not None and id(parameter) not in done:
                    parameter.grad.div_(divisor)
        joint.store_directions(scale)

    def step(self) -> None:
        """The same without a distributed optimizer, after the backward pass: every ``.grad``,
        already averaged over ranks where there are several (each rank calls it) and unscaled,
        becomes p.

        Raises:
            RuntimeError: no parameter has a gradient.
        """
        if not self._attached:
            self._find_ranks()
        if any(p.grad is not None for p in self._parameters.current_parameters()):
            self.before_reduce()
        self.precondition()
        self.commit()

    def refresh_next(self) -> None:
        """Take the curvature anew at the next step, whatever ``update_freq`` says. On all ranks."""
        self.state.due = True
        if self._pending is not None:
            self._pending.state.due = True
        self._install_hooks_if_due()

    def _with_refresh(self) -> Pending:
        """The state with a refresh's curvature in place, if there is one; warns about what failed."""
        candidate, self._candidate = self._candidate, None
        pending, fresh = pending_state(self.state, self._trust, candidate, self.layers)
        if candidate is not None:
            new = candidate.refreshed
            self._joint = new.joint
            self._notices.warn_refused({layer.name: reason for layer, reason in fresh.items()})
            self._notices.by_rows([layer.name for layer in new.by_rows], self.capture.samples.trouble)
            self._notices.warn_failed({layer.name: reason for layer, reason in new.failures.items()},
                                      {layer.name for layer in pending.state.systems})
        return pending

    def _skip_step(self) -> None:
        """Leave a gradient that is not finite alone, and all that would have followed from it."""
        self._skipped.begin_step(False, loss_scale(self._scaler))
        self._discard_captured()
        if not all_finite(self._parameters.current_parameters()):
            self._notices.warn_diverged(self.state.step, self.settings.damping_at(self.state.step))

    def _discard_captured(self) -> None:
        if self._candidate is not None and self._candidate.lagged is not None:
            self._candidate.lagged.wait_messages(self._step)
        self._candidate = None

    def _drop_lagged(self) -> None:
        self.state.lagged.wait_messages(self._step)
        self.state.lagged = Lagged()
        self._discard_captured()

    def _forget_step(self) -> None:
        """Nothing is under way, and the ranks have not compared their states yet."""
        self._candidate: Candidate | None = None
        self._pending: Pending | None = None
        self._skipped = SkippedStep()
        self._prepared = self._checked = False

    def _install_hooks_if_due(self) -> None:
        """Install the hooks when the coming step refreshes the curvature, remove them otherwise."""
        if self.state.due:
            self._discover_layers()
            self.capture.install_hooks(self.state.step, self._trust)
            self._eager.force_eager()
        elif self.capture.active:
            self.capture.remove_hooks()
            self._eager.allow_compiled()

    # State and figures

    def state_dict(self) -> dict[str, Any]:
        """This rank's state between two steps: curvature, lagged gradient, counters."""
        self.state.lagged.wait_messages(self._step)
        return self.state.to_dict(self.settings, self.ranks())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict()`` gave, bit for bit.

        Raises:
            ValueError: another model, other settings or number of ranks; nothing is changed then.
        """
        loaded = self.check_state_dict(state)
        self.reset_state()
        self.state = loaded
        self._install_hooks_if_due()

    def check_state_dict(self, state: dict[str, Any]) -> State:
        self._discover_layers()
        return State.from_dict(state, self.layers, self.settings, self.ranks())

    def reset_state(self) -> None:
        """Start anew: no curvature, step 0, a refresh at the next step."""
        self._drop_pending()
        self._drop_lagged()
        self._forget_step()
        self.state, self._trust = State(), RuleStatus()
        self._install_hooks_if_due()

    def ranks(self) -> int:
        """M, the ranks that share the curvature."""
        if not self._attached:
            self._find_ranks()
        return max(1, self._ranks)

    def report(self) -> CurvatureReport:
        """Coverage in a line; per layer sizes, bytes, coefficient norm, jitter, age; prints as a table."""
        return self.state.report(self.layers, self.settings, list(self.model.parameters()),
                                 ranks=self.ranks(), waited=self._step.waited, trust=self._trust,
                                 missing=self._missing, samples=self.capture.samples.placements)
