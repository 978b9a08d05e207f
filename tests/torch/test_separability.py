"""Which optimizers may run on a part of their parameters: tried at construction, right or refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import Optimizer

import hvd_ext.torch as hvd
from hvd_ext.sharding import Server
from hvd_ext.torch.sharding import separability
from hvd_ext.torch.sharding.shards import is_elementwise


class Plain(Optimizer):
    """The base of the stand-ins: ``direction`` says what is subtracted from a parameter."""

    def __init__(self, params, lr=0.1, **more):
        super().__init__(params, {"lr": lr, **more})

    def prepare(self):
        """Called once a step."""

    def direction(self, parameter, group):
        return parameter.grad

    @torch.no_grad()
    def step(self, closure=None):
        self.prepare()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * self.direction(parameter, group))

    def gradients(self):
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]


class NormClipped(Plain):
    """Clips by the norm of all gradients in its step, at 1."""

    def prepare(self):
        torch.nn.utils.clip_grads_with_norm_(
            [p for group in self.param_groups for p in group["params"] if p.grad is not None], 1.0,
            torch.nn.utils.get_total_norm(self.gradients()))


class ClippedHigh(NormClipped):
    """The same at 1000."""

    def prepare(self):
        norm = float(torch.nn.utils.get_total_norm(self.gradients()))
        for gradient in self.gradients():
            gradient.mul_(min(1.0, 1000.0 / norm))


class LambGlobal(Plain):
    """LAMB that divides gradients by their norm first."""

    def prepare(self):
        self.norm = max(1.0, math.sqrt(sum(float(g.square().sum()) for g in self.gradients())))

    def direction(self, parameter, group):
        gradient = parameter.grad / self.norm
        state = self.state[parameter]
        if not state:
            state["m"], state["v"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["m"].lerp_(gradient, 0.1)
        state["v"].lerp_(gradient.square(), 0.01)
        update = state["m"] / (state["v"].sqrt() + 1e-6)
        return update * (parameter.norm() / update.norm().clamp(min=1e-12))


class Lamb(LambGlobal):
    """LAMB whose norms are each parameter's own."""

    def prepare(self):
        self.norm = 1.0


class Prodigy(Plain):
    """A step size estimated from products over all parameters, kept in the groups."""

    def __init__(self, params, lr=1.0, d=1e-6):
        super().__init__(params, lr, d=d, numerator=0.0)

    def prepare(self):
        group = self.param_groups[0]
        top, below = 0.0, 0.0
        for parameter in (p for one in self.param_groups for p in one["params"] if p.grad is not None):
            state = self.state[parameter]
            if not state:
                state["start"], state["s"] = parameter.clone(), torch.zeros_like(parameter)
            top += float((parameter.grad * (state["start"] - parameter)).sum()) * group["d"]
            state["s"].add_(parameter.grad, alpha=group["d"])
            below += float(state["s"].abs().sum())
        for one in self.param_groups:
            one["numerator"] += top
            one["d"] = max(one["d"], one["numerator"] / max(below, 1e-30))

    def direction(self, parameter, group):
        return group["d"] * parameter.grad.sign()


class ScheduleFree(Plain):
    """Its averages are put into the weights by ``eval()`` and taken out by ``train()``."""

    def direction(self, parameter, group):
        state = self.state[parameter]
        state.setdefault("z", parameter.clone())
        state["z"].sub_(group["lr"] * parameter.grad)
        return (parameter - state["z"]) * 0.1

    def eval(self):
        pass

    def train(self):
        pass


class Numbered(Plain):
    """A rate that depends on the parameter's place."""

    def prepare(self):
        self.places = {p: n for group in self.param_groups for n, p in enumerate(group["params"])}

    def direction(self, parameter, group):
        return parameter.grad * 0.5 ** self.places[parameter]


class Noisy(Plain):
    """Langevin's noise on each parameter."""

    def direction(self, parameter, group):
        return parameter.grad + torch.randn_like(parameter)


class NoisyClipped(NormClipped, Noisy):
    pass


class CountedByGroup(Plain):
    """Counters in groups and on the instance, a state made on construction."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr, k=0)
        self.calls = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"] = torch.full_like(parameter, 0.1)

    def prepare(self):
        self.calls += 1
        for group in self.param_groups:
            group["k"] += 1

    def direction(self, parameter, group):
        total = self.state[parameter]["sum"]
        total += parameter.grad.square()
        return parameter.grad / total.sqrt() / math.sqrt(group["k"] + self.calls)


class Lookahead(Plain):
    """An optimizer around another one, with slow weights of its own."""

    def __init__(self, base):
        self.base = base
        self.__dict__.update({key: value for key, value in vars(base).items() if key != "step"})

    def step(self, closure=None):
        self.base.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
                slow.lerp_(parameter.detach(), 0.5)


class NeedsClosure(Plain):
    def step(self, closure):
        return closure()


class SparseOnly(Plain):
    """Takes sparse gradients only."""

    def direction(self, parameter, group):
        if not parameter.grad.is_sparse:
            raise RuntimeError("dense gradients are not supported")
        return parameter.grad.coalesce()


class Matrices(Plain):
    """Takes matrices only, as Muon does."""

    def direction(self, parameter, group):
        u, _, v = torch.linalg.svd(parameter.grad, full_matrices=False)
        return u @ v


class SaysElementwise(Lamb):
    elementwise = True


class ElementwiseOf(Plain):
    elementwise = True


class SaysSeparable(NormClipped):
    separable = True


class FailingElementwise(NeedsClosure):
    elementwise = True


def parameters(shapes=((6, 5), (5,), (3, 2, 2), (7, 4))):
    return [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]


def check(optimizer, where="sharded"):
    separability.check_separable(optimizer, Server(where))


GROUPED = [lambda ps: ps, lambda ps: [{"params": ps[:1], "lr": 0.3}, {"params": ps[1:]}],
           lambda ps: [{"params": []}, {"params": ps[:2]}, {"params": ps[2:], "lr": 0.01}]]


@pytest.mark.parametrize("grouped", GROUPED, ids=["one group", "two groups", "an empty group"])
@pytest.mark.parametrize("kind", [NormClipped, ClippedHigh, LambGlobal, Prodigy, NoisyClipped])
def test_a_statistic_over_all_parameters_is_refused(kind, grouped):
    with pytest.raises(ValueError, match=rf"server='sharded' cannot be used with {kind.__name__}: .*"
                                         r"server='replicated' or server='rank0'"):
        check(kind(grouped(parameters())))


def test_the_message_names_settings_of_groups_that_depend_on_all():
    with pytest.raises(ValueError, match=r"and so does d, numerator of its group"):
        check(Prodigy(parameters()))


def test_what_depends_on_the_place_among_others_is_refused():
    with pytest.raises(ValueError, match="cannot be used with Numbered"):
        check(Numbered(parameters()))


@pytest.mark.parametrize("grouped", GROUPED, ids=["one group", "two groups", "an empty group"])
@pytest.mark.parametrize("kind", [Plain, Lamb, Noisy, CountedByGroup, ElementwiseOf])
def test_an_update_of_each_parameter_by_itself_is_taken(kind, grouped):
    check(kind(grouped(parameters())))


def test_other_kinds_of_optimizers_are_taken():
    check(Lookahead(torch.optim.Adam(parameters())))
    check(SparseOnly(parameters([(8, 3), (7, 3)])))
    check(Matrices(parameters([(8, 3), (7, 3)])))
    check(FailingElementwise(parameters()))  # nobody but the class can know
    check(SaysSeparable(parameters()))
    check(Plain(parameters([(3, 0), (0,)])))  # nothing to try


def test_a_wrong_word_of_the_class_is_refused():
    with pytest.raises(ValueError, match=r"SaysElementwise.*an element's update depends.*elementwise = True"):
        check(SaysElementwise(parameters()))


def test_an_optimizer_that_cannot_be_tried_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"NeedsClosure could not be tried .*TypeError.*separable = True"):
        check(NeedsClosure(parameters()))


@pytest.mark.parametrize("where", ["sharded", "rank0"])
def test_methods_that_move_weights_by_the_state_of_owners_are_refused(where):
    with pytest.raises(ValueError, match=rf"server='{where}' .*ScheduleFree.*train\(\) and eval\(\)"):
        check(ScheduleFree(parameters()), where)
    check(ScheduleFree(parameters()), "replicated")


@pytest.mark.parametrize("where", ["rank0", "replicated"])
def test_servers_that_update_all_in_one_place_take_any(where):
    for kind in (NormClipped, Prodigy, NeedsClosure):
        check(kind(parameters()), where)


def test_a_trial_leaves_the_optimizer_the_random_numbers_and_hooks_alone():
    called = []
    optimizer = Noisy(parameters())
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before, rng = [p.detach().clone() for p in optimizer.param_groups[0]["params"]], torch.get_rng_state()
    check(optimizer)
    assert torch.equal(rng, torch.get_rng_state())
    assert not called
    assert not optimizer.state
    assert schedule.optimizer is optimizer
    assert all(torch.equal(a, b) and b.grad is None
               for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))


def known(kind, params):
    needs = {torch.optim.SGD: {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
             torch.optim.Adagrad: {"initial_accumulator_value": 0.1},
             torch.optim.RMSprop: {"momentum": 0.5, "centered": True}}
    return kind(params, lr=0.1, **needs.get(kind, {}))


@pytest.mark.parametrize("kind", separability.KNOWN, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_what_is_known_passes_the_trial(kind):
    matrices = issubclass(kind, torch.optim.Muon) or kind is torch.optim.SparseAdam
    shapes = [(6, 5), (7, 4), (3, 9)] if matrices else [(6, 5), (5,), (3, 2, 2), (7, 4), ()]
    separability.Trial(known(kind, parameters(shapes))).compare_updates()


def test_what_torch_has_and_nobody_knows_of():
    """A new optimizer of torch is tried like anybody's; this says when there is one."""
    kinds = {kind for kind in vars(torch.optim).values()
             if isinstance(kind, type) and issubclass(kind, Optimizer)}
    assert kinds - set(separability.KNOWN) == {Optimizer, torch.optim.LBFGS}
    assert all(is_elementwise(kind) == (kind in separability.ELEMENTWISE) for kind in kinds)


def construct():
    for server in ("sharded", Server("sharded", downlink=hvd.Compression.fp16)):
        with pytest.raises(ValueError, match="cannot be used with NormClipped"):
            hvd.DistributedOptimizer(NormClipped(parameters()), server=server)
    hvd.DistributedOptimizer(NormClipped(parameters()), server="rank0")
    for server in ("sharded", "rank0", "replicated"):
        with pytest.raises(ValueError, match=r"\(LBFGS\) cannot be combined with .* any server=; leave"):
            hvd.DistributedOptimizer(torch.optim.LBFGS(parameters()[:1]), server=server)
    hvd.DistributedOptimizer(torch.optim.LBFGS(parameters()[:1]))


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_distributed_optimizer_refuses_at_construction(ranks, size):
    ranks(size).run(construct)
