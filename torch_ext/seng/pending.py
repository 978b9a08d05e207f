"""What a step of SENG leaves for the next one, until the step is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hvd_ext.torch.seng.capture import RuleStatus
from hvd_ext.torch.seng.layer_discovery import Layer
from hvd_ext.torch.seng.refresh import Refreshed
from hvd_ext.torch.seng.state import State
from hvd_ext.torch.seng.step import Lagged


@dataclass
class Candidate:
    """A refresh that counts once the step's gradient is known to be finite."""

    refreshed: Refreshed
    lagged: Lagged | None


@dataclass
class Pending:
    """What holds from the next step on, if this one is taken."""

    state: State
    trust: RuleStatus


def pending_state(state: State, trust: RuleStatus, candidate: Candidate | None,
                  layers: Sequence[Layer]) -> tuple[Pending, dict[Layer, str]]:
    """A copy of the state with a refresh's curvature in place; layers that it newly refuses, with why.

    Args:
        state, trust: as they are, and stay.
        candidate: the refresh, if this step has one.
        layers: of the model.
    """
    state = replace(state, failures=dict(state.failures))
    trust = RuleStatus(dict(trust.accepted), dict(trust.refused))
    if candidate is None:
        return Pending(state, trust), {}
    new = candidate.refreshed
    fresh = {layer: reason for layer, reason in new.trust.refused.items() if layer not in trust.refused}
    trust.accepted.update(new.trust.accepted)
    trust.refused.update(fresh)
    both = {**state.systems, **new.systems}
    state.systems = {layer: both[layer] for layer in layers
                     if layer in both and layer not in trust.refused}
    state.lagged = candidate.lagged or Lagged(state.lagged.pending)
    state.step = new.step
    # With nothing captured anywhere the next step tries again.
    state.due = not new.systems
    for layer in new.failures:
        state.failures[layer.name] = state.failures.get(layer.name, 0) + 1
    return Pending(state, trust), fresh
