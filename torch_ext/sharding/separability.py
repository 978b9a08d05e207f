"""Whether a wrapped optimizer may run on a part of its parameters: tried on small ones, in this process."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvd_ext.sharding import Server, separability
from hvd_ext.torch.muon import Muon
from hvd_ext.torch.sharding.shards import ELEMENTWISE, is_elementwise

# The update of each parameter depends on nothing but its own gradient and state.
KNOWN = (*ELEMENTWISE, torch.optim.Adafactor, torch.optim.ASGD, torch.optim.Rprop, torch.optim.SparseAdam,
         torch.optim.Muon, Muon)
# Of an optimizer: what belongs to the one instance that a script holds.
NOT_COPIED = {"step", "_hvd_ext", "state"}
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
ON_CPU = {"capturable": False, "fused": None, "foreach": None, "differentiable": False}

Cut = tuple[int, int]  # elements of a flattened parameter


def check_separable(optimizer: torch.optim.Optimizer, server: Server) -> None:
    """Refuse an optimizer whose update of what a rank owns is not what it is within the update of all.

    Raises:
        ValueError: it names the optimizer and what to use.
    """
    kind = type(optimizer)
    if server.kind == "replicated" or bool(vars(kind).get("separable", False)):
        return
    beyond = [name for name in ("train", "eval") if callable(getattr(optimizer, name, None))]
    if beyond:
        raise ValueError(separability.beyond_step(kind.__name__, server.kind, beyond))
    if server.kind == "sharded" and kind not in KNOWN:
        Trial(optimizer).compare_updates()


class Trial:
    """Small parameters in the place of an optimizer's own, and its updates of all and of parts of them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.kind = type(optimizer)
        self.chosen = [  # parameters, each with the number of its group
            (group["params"][number], index)
            for index, group in enumerate(optimizer.param_groups[:separability.GROUPS])
            for number in separability.choose_parameters([tuple(p.shape) for p in group["params"]])]

    def compare_updates(self) -> None:
        """Compare the updates.

        Raises:
            ValueError: they differ, or the optimizer cannot be tried.
        """
        if not self.chosen:
            return
        elementwise, failures = is_elementwise(self.kind), []
        for precision, sparse in (("float64", False), ("float32", False), ("float32", True)):
            try:
                whole = self._run_update([(number, None) for number in range(len(self.chosen))], precision,
                                         sparse)
            except Exception as error:
                failures.append(error)
                continue
            self._compare_parts(whole, precision, sparse, elementwise)
            return
        if not elementwise:
            why = separability.untested_message(self.kind.__name__, "sharded", failures[0])
            raise ValueError(why) from failures[0]

    def _compare_parts(self, whole: Run, precision: str, sparse: bool, elementwise: bool) -> None:
        """Compare the update of all with those of parts."""
        numbers = range(len(self.chosen))
        differ, settings = False, set()
        for number in numbers:
            shape = separability.small_shape(self.chosen[number][0].shape)
            beside = whole
            if whole.draws:  # let it draw the same random numbers for this parameter in both
                others = [(other, None) for other in numbers if other != number]
                beside = self._run_update([(number, None), *others], precision, sparse)
            for cut in _possible_cuts(shape) if elementwise and not whole.draws else [None]:
                try:
                    part = self._run_update([(number, cut)], precision, sparse)
                except Exception as error:
                    raise ValueError(
                        separability.fails_in_part(self.kind.__name__, "sharded", error)) from error
                weights = [w if cut is None else w.reshape(-1)[slice(*cut)] for w in beside.weights[number]]
                differ |= separability.has_diverged([w.numpy() for w in weights],
                                                    [w.numpy() for w in part.weights[number]], precision)
                group = self.chosen[number][1]
                settings |= {*separability.differing_settings(beside.settings[group], part.settings[group])}
        if differ or settings:
            raise ValueError(
                separability.depends_on_others(self.kind.__name__, elementwise, sorted(settings)))

    def _run_update(self, parts: Sequence[tuple[int, Cut | None]], precision: str, sparse: bool) -> Run:
        """Update parameters, by number, or elements of them."""
        dtype: torch.dtype = getattr(torch, precision)
        shown: dict[int, torch.nn.Parameter] = {}
        for number, cut in parts:
            shape = separability.small_shape(self.chosen[number][0].shape)
            weights = torch.from_numpy(separability.made_weights(number, shape)).to(dtype)
            shown[number] = torch.nn.Parameter(_cut_tensor(weights, cut))
        twin = self._twin_optimizer(shown, dict(parts), dtype)
        groups = list(twin.param_groups)
        first = groups[self.chosen[parts[0][0]][1]]  # its parameter draws the first random numbers
        twin.param_groups.sort(key=lambda group: bool(group["params"]) and group is not first)
        run = Run({number: [p.detach().clone()] for number, p in shown.items()})
        step = self.kind.step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step  # without torch's hooks
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for count in range(len(separability.SCALES)):
                for number, parameter in shown.items():
                    shape = separability.small_shape(self.chosen[number][0].shape)
                    gradient = torch.from_numpy(separability.made_gradient(number, count, shape)).to(dtype)
                    gradient = _cut_tensor(gradient, dict(parts)[number])
                    parameter.grad = gradient.to_sparse(1) if sparse and gradient.dim() else gradient
                before = torch.manual_seed(count).get_state()
                step(twin)
                run.draws |= not torch.equal(before, torch.get_rng_state())
                for number, parameter in shown.items():
                    run.weights[number].append(parameter.detach().clone())
        run.settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        return run

    def _twin_optimizer(self, shown: Mapping[int, torch.nn.Parameter], cuts: Mapping[int, Cut | None],
                        dtype: torch.dtype) -> Any:
        """The optimizer over other parameters: its class, its settings, its state cut to these."""
        original, twin = self.optimizer, self.kind.__new__(self.kind)
        nothing = torch.empty(0)
        state: defaultdict[Any, Any] = defaultdict(dict)
        memo: dict[int, Any] = {id(original): twin, id(original.state): state}
        memo |= {id(p): nothing for group in original.param_groups for p in group["params"]}
        memo |= {id(self.chosen[number][0]): parameter for number, parameter in shown.items()}
        for name in HOOKS:
            memo[id(getattr(original, name, None))] = OrderedDict()
        twin.__dict__.update(copy.deepcopy(
            {key: value for key, value in vars(original).items() if key not in NOT_COPIED}, memo))
        twin.state = state
        for number, parameter in shown.items():
            whole = self.chosen[number][0]
            kept = original.state.get(whole)
            if kept:
                state[parameter] = {key: _shrink_state(value, whole, parameter, cuts[number], dtype)
                                    for key, value in kept.items()}
        for index, group in enumerate(twin.param_groups):
            group["params"] = [p for number, p in shown.items() if self.chosen[number][1] == index]
            for key, value in group.items():
                if key in ON_CPU:
                    group[key] = ON_CPU[key]
                elif isinstance(value, torch.Tensor):
                    group[key] = value.cpu()
        return twin


class Run:
    """What updates gave.

    Attributes:
        weights: of each parameter, by number: at first, and after each step.
        settings: the parameter groups' settings at the end.
        draws: whether random numbers were drawn.
    """

    def __init__(self, weights: dict[int, list[torch.Tensor]]) -> None:
        self.weights = weights
        self.settings: list[dict[str, Any]] = []
        self.draws = False


def _possible_cuts(shape: Sequence[int]) -> list[Cut | None]:
    numel = torch.Size(shape).numel()
    return [None] if numel < 2 else [(0, numel // 2), (numel // 2, numel)]


def _cut_tensor(tensor: torch.Tensor, cut: Cut | None) -> torch.Tensor:
    return tensor if cut is None else tensor.reshape(-1)[slice(*cut)].clone()


def _shrink_state(value: Any, whole: torch.Tensor, small: torch.Tensor, cut: Cut | None,
                  dtype: torch.dtype) -> Any:
    """What is kept of a parameter, for the small one in its place."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    value = value.detach().cpu()
    if value.shape == whole.shape and value.dim():
        shape = separability.small_shape(whole.shape)
        value = _cut_tensor(value[tuple(slice(extent) for extent in shape)].clone(), cut).reshape(small.shape)
    return value.to(dtype) if value.is_floating_point() and value.dim() else value.clone()
