"""K-FAC of the package curvlinops, as the race runs it: its factors, their running mean, their inverses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from torch import nn
from torch.nn import functional

from benchmarks.seng_race.workloads import squared_error

EVERY = 10  # steps from one refresh to the next
DECAY = 0.95 ** EVERY  # of a refresh; Martens and Grosse keep 0.95 a step
# The package looks at the class of a loss.
KINDS = {squared_error: nn.MSELoss, functional.cross_entropy: nn.CrossEntropyLoss}
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SplitAttention(nn.Module):
    """A ``MultiheadAttention`` on one input, as two linear layers with the same parameters.

    The package sees what a layer takes and gives by hooks, and PyTorch's attention calls no layer.
    """

    batch_first = True  # the encoder asks for it

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        if not whole.batch_first or whole.in_proj_weight is None or whole.dropout:
            raise ValueError("K-FAC takes attention with batch_first=True, packed projections and no dropout")
        self.heads = whole.num_heads
        outputs, inputs = whole.in_proj_weight.shape
        self.packed = nn.Linear(inputs, outputs, device="meta")
        self.packed.weight, self.packed.bias = whole.in_proj_weight, whole.in_proj_bias
        self.out = whole.out_proj

    def forward(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                attn_mask: torch.Tensor | None = None, **_: object) -> tuple[torch.Tensor, None]:
        n, t, _width = x.shape
        q, k, v = self.packed(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out(mixed.transpose(1, 2).flatten(2)), None


def twin(model: nn.Module) -> nn.Module:
    """The model with split attention: the same parameters, other buffers, so that a pass leaves no trace."""
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in list(other.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, SplitAttention(child))
    return other


class KFAC:
    """Turns the gradients of linear layers, convolutions and attention into K-FAC's directions.

    For a layer with weights and bias in one matrix, directions are ``(G + √λ/π I)^-1 g (A + π√λ I)^-1``, with
    A of the inputs, G of the gradients for labels that the model draws, and π² the mean eigenvalue of A over
    that of G (Martens and Grosse 2015, section 6.3). Other gradients are left alone.
    """

    def __init__(self, model: nn.Module, loss: Loss, *, damping: float) -> None:
        if loss not in KINDS:
            raise ValueError(f"K-FAC takes squared_error and cross_entropy, got {loss}")
        self.twin = twin(model)
        self.loss = KINDS[loss]()
        self.damping = damping
        self.params = [p for module in self.twin.modules() if isinstance(module, (nn.Linear, nn.Conv2d))
                       for p in module.parameters(recurse=False)]
        self.factors: dict[tuple[str, str], torch.Tensor] = {}
        self.steps = self.refreshes = 0

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """``.grad`` becomes the direction; curvature is of this batch, if it is time for it."""
        if self.steps % EVERY == 0:
            self._refresh(x, y)
        self.steps += 1
        with torch.no_grad():
            gradients = [p.grad for p in self.params]
            try:
                directions = self.inverse @ gradients
            except torch.linalg.LinAlgError:  # the run has diverged, and is to end as that
                directions = [torch.full_like(one, math.nan) for one in gradients]
            for gradient, direction in zip(gradients, directions, strict=True):
                gradient.copy_(direction)

    def _refresh(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.refreshes += 1
        keep = min(1.0 - 1.0 / self.refreshes, DECAY)
        operator = KFACLinearOperator(self.twin, self.loss, self.params, [(x, y)], check_deterministic=False,
                                      seed=self.refreshes, separate_weight_and_bias=False)
        operator.compute_kronecker_factors()
        state = operator.state_dict()
        # MSELoss is the mean over the outputs, squared_error half their sum.
        units = {"input_covariances": 1.0,
                 "gradient_covariances": 2.0 / y.shape[-1] if isinstance(self.loss, nn.MSELoss) else 1.0}
        # The state holds the operator's own tensors: what is written here is what it inverts.
        for kind, unit in units.items():
            for name, factor in state[kind].items():
                factor.div_(unit).lerp_(self.factors.get((kind, name), factor), keep)
                self.factors[kind, name] = factor
        self.inverse = KFACInverseLinearOperator(operator, damping=self.damping, use_heuristic_damping=True)
