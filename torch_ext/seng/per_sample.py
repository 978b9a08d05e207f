"""Rules that are tried: the gradient check says at the first refresh whether one of them holds.

For a module that has no rule of its own, or a subclass that overrides ``forward``. :func:`vjp_rule` needs
nothing but a ``forward`` that treats samples alike and apart: it runs the module on each sample and
pulls the sample's ``gz`` back to the parameters.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from hvd_ext.torch.seng.rules import Factors, PerSample, Pick, Registered, rule_for, same_convolution

MOST_CALLS = 256  # a module that cannot be vectorised is run once for each sample, up to so many
CHUNK_SAMPLES = 32        # samples that are run at once


@dataclass
class Call:
    """How a module was called; ``x`` is the tensor that shows the samples.

    ``states`` are the gradients by what a recurrent module returns beside its output, by place, samples
    on axis 1.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def x(self) -> torch.Tensor:
        """Its first tensor."""
        return next(leaf for leaf in pytree.tree_leaves((self.args, self.kwargs))
                    if isinstance(leaf, torch.Tensor))


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters, and those that ``torch.nn.utils.parametrize`` computes its own from."""
    found = {name: p for name, p in module._parameters.items() if p is not None}
    if parametrize.is_parametrized(module):
        inner = module.parametrizations.named_parameters()  # type: ignore[union-attr,operator]
        found.update((f"parametrizations.{name}", p) for name, p in inner)
    return found


def candidate_rules(module: nn.Module, limit: int) -> tuple[Registered, ...]:
    """Rules that may hold for a module whose ``forward`` no rule is for, best first; () for none.

    Args:
        limit: parameters that per-sample gradients are affordable for (``explicit_threshold``).
    """
    own = parameters_of(module)
    if not own or len(list(module.parameters())) != len(own):
        return ()  # a container
    kind = type(module).__name__
    base, _ = rule_for(module)
    found: list[Registered] = []
    weight = own.get("weight")
    if base is not None and base.groups is not None and weight is not None:
        found.append(replace(base, kind=kind))
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found.append(replace(base, kind=kind, rule=same_convolution))
    elif base is None and weight is not None and weight.dim() == 2 and set(own) <= {"weight", "bias"}:
        found += [Registered(kind, _linear_like, _single_factor_shape, ones=False),
                  Registered(kind, _transposed_like, _single_factor_shape, ones=False)]
    if base is not None and base.lookup:
        found.append(replace(base, kind=kind))
    elif sum(p.numel() for p in own.values()) < max(limit, 1):
        found.append(Registered(kind, vjp_rule, called=True))
    return tuple(found)


def _single_factor_shape(module: nn.Module) -> tuple[int, int, int]:
    return 1, *module.weight.shape  # type: ignore[return-value,union-attr]


def _linear_like(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> Factors:
    return _outer_factors(gz, x, pick, module)


def _transposed_like(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Pick) -> Factors:
    """``z = x W + b`` with W (in, out), as transformers' ``Conv1D``: G and A change places."""
    return _outer_factors(x, gz, pick, module, flipped=True)


def _outer_factors(rows: torch.Tensor, columns: torch.Tensor, pick: Pick, module: nn.Module, *,
                   flipped: bool = False) -> Factors:
    shape = module.weight.shape  # type: ignore[union-attr]
    if (rows.shape[-1], columns.shape[-1]) != tuple(shape) or rows.shape[:-1] != columns.shape[:-1]:
        raise ValueError("no rule reproduces its gradient")
    g, a = (pick(t) for t in (rows, columns))
    g, a = (t.reshape(t.shape[0], 1, -1, t.shape[-1]) for t in (g, a))
    return Factors(g, a, (a if flipped else g).sum((1, 2)))


def vjp_rule(module: nn.Module, call: Any, gz: torch.Tensor | None, pick: Pick) -> PerSample:
    """``u_i``, the gradient of ``sum(gz_i * module(x_i))``, for any module that treats samples apart.

    ``gz`` is None where a recurrent module's states alone were used. Rows of one sample are run together.

    Batch norms get the statistics of the whole batch as given, as SENG's rule for them does.

    Raises:
        ValueError: the module does not work on one sample, or cannot be vectorised and there are
            more samples than :data:`MOST_CALLS`.
    """
    axis = int(getattr(pick, "axis", 0))
    parameters = {name: p.detach() for name, p in parameters_of(module).items() if p.requires_grad}
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    rows = call.x.shape[axis] if gz is None else gz.shape[0]
    split = [k for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)
             and leaf.dim() > axis and leaf.shape[axis] == rows]
    if not split:
        raise ValueError("its output has other rows than its input")
    joined = getattr(pick, "rows_per_sample", lambda: 1)()

    def by_sample(tensor: torch.Tensor, at: int) -> torch.Tensor:
        """(samples, rows of each, ...)"""
        return pick(tensor.movedim(at, 0)).unflatten(0, (-1, joined))

    held = [by_sample(leaves[k], axis) for k in split]
    dtype = next(iter(parameters.values())).dtype
    held = [t.to(dtype) if t.is_floating_point() else t for t in held]
    # Which output, the axis of its samples, and the gradient by it.
    known = [] if gz is None else [(0, axis, by_sample(gz, 0))]
    known += [(k, 1, by_sample(g, 1)) for k, g in call.states.items()]

    def share(*these: torch.Tensor) -> dict[str, torch.Tensor]:
        row = list(leaves)
        for k, one in zip(split, these[:len(split)], strict=True):
            row[k] = one.movedim(0, axis)
        args, kwargs = pytree.tree_unflatten(row, spec)

        def run(values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            out = pytree.tree_leaves(functional_call(module, values, args, kwargs))
            return [out[k] for k, _, _ in known]

        out, pull = vjp(run, parameters)
        pulled = [g.movedim(0, at).to(z.dtype) for z, g, (_, at, _) in
                  zip(out, these[len(split):], known, strict=True)]
        return pull(pulled)[0]  # type: ignore[no-any-return]

    given = [*held, *(g for _, _, g in known)]
    with _given_statistics(module, call.x), torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # an operator that vmap loops over
        try:
            found = vmap(share, chunk_size=CHUNK_SAMPLES)(*given)
        except Exception as error:
            count = len(given[0])
            if count > MOST_CALLS:
                raise ValueError(f"its per-sample gradients cannot be vectorised ({error})") from None
            parts = [share(*(t[i] for t in given)) for i in range(count)]
            found = {name: torch.stack([part[name] for part in parts]) for name in parameters}
    return {name: one.detach().to(known[0][2].dtype) for name, one in found.items()}


@contextmanager
def _given_statistics(module: nn.Module, x: torch.Tensor) -> Iterator[None]:
    """Evaluation mode, no hooks that see outputs; batch norms take the statistics of this batch."""
    attributes = [(one, dict(vars(one)), dict(one._buffers)) for one in module.modules()]
    try:
        for one in list(module.modules()):
            batch = isinstance(one, nn.modules.batchnorm._BatchNorm)
            if batch and (one.training or one.running_mean is None):
                values = x if x.dtype == torch.float64 else x.float()
                others = [axis for axis in range(x.dim()) if axis != 1]
                variance, mean = torch.var_mean(values, others, correction=0)
                one._buffers.update(running_mean=mean, running_var=variance)
            vars(one)["_forward_hooks"] = OrderedDict()
        module.eval()
        yield
    finally:
        for one, before, buffers in attributes:
            vars(one).clear()
            vars(one).update(before)
            one._buffers.clear()
            one._buffers.update(buffers)
