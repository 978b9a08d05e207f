"""An extended optimizer behaves as the wrapped one, and as Horovod's, in everything else."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import UNEVEN, backward, bits, flat, make_parameters, named, worker_gradients


def delayed(parameters, inner=None, **options):
    inner = inner or torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    return hvd.DistributedOptimizer(inner, named_parameters=named(parameters),
                                    op=options.pop("op", hvd.DelayCompensated()), **options)


def take_steps(optimizer, parameters, steps, shapes=UNEVEN):
    for step in steps:
        optimizer.zero_grad()
        backward(parameters, worker_gradients(shapes, worker=hvd.rank(), step=step))
        optimizer.step()


def check_drop_in():
    parameters = make_parameters()
    adasum = hvd.DistributedOptimizer(torch.optim.Adam(parameters), op=hvd.Adasum,
                                      named_parameters=named(parameters))
    assert type(adasum).__module__ == "horovod.torch.optimizer"
    extended = delayed(parameters, torch.optim.Adam(parameters, lr=0.1))
    assert isinstance(extended, torch.optim.Adam)
    assert type(extended).__name__ == "Adam"
    with pytest.raises(ValueError, match="wrap it once"):
        delayed(parameters, extended)
    with pytest.raises(ValueError, match="LBFGS"):
        delayed(parameters, torch.optim.LBFGS(parameters))
    with pytest.raises(ValueError, match=r"Compression\.topk and op=DelayCompensated"):
        delayed(parameters, compression=hvd.Compression.topk(0.01))
    with pytest.raises(ValueError, match="Found duplicates: p0"):
        hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), op=hvd.DelayCompensated(),
                                 named_parameters=[("p0", p) for p in parameters])
    with pytest.raises(ValueError, match="not named"):
        hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), op=hvd.DelayCompensated(),
                                 named_parameters=named(parameters[:-1]))
    with pytest.raises(ValueError, match="sequence of tuples"):
        hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), op=hvd.DelayCompensated(),
                                 named_parameters=parameters)
    with pytest.raises(ValueError, match="backward_passes_per_step must be > 0"):
        delayed(parameters, backward_passes_per_step=0)
    with pytest.raises(ValueError, match="gradient_predivide_factor"):
        delayed(parameters, gradient_predivide_factor=2.0)
    with pytest.raises(ValueError, match="server must be one of"):
        delayed(parameters, server="everywhere")


def check_schedulers_and_hooks():
    parameters = make_parameters()
    inner = torch.optim.SGD(parameters, lr=0.1)
    early = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.5**step)
    calls = []
    inner.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer = delayed(parameters, inner)
    late = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*")
        take_steps(optimizer, parameters, [0])
        late.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    early.step()
    assert optimizer.param_groups[0]["lr"] != pytest.approx(0.01)
    assert calls == ["post"]


def check_clipping_and_misuse():
    parameters = make_parameters()
    optimizer = delayed(parameters, torch.optim.SGD(parameters, lr=1.0))
    before = flat(parameters)
    backward(parameters, worker_gradients(UNEVEN, worker=hvd.rank(), step=0))
    with pytest.raises(AssertionError, match="race condition"):
        optimizer.zero_grad()
    with pytest.raises(AssertionError, match="backward_passes_per_step"):
        backward(parameters, worker_gradients(UNEVEN, worker=hvd.rank(), step=0))
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    with optimizer.skip_synchronize():
        optimizer.step()
    assert np.linalg.norm(flat(parameters) - before) == pytest.approx(0.5, rel=1e-4)
    optimizer.zero_grad()
    backward(parameters, worker_gradients(UNEVEN, worker=hvd.rank(), step=1))
    optimizer.synchronize()
    with pytest.raises(RuntimeError, match=r"DelayCompensated cannot do: .*skip_synchronize\(\)"):
        optimizer.step()
    optimizer.zero_grad()

    def closure():
        optimizer.zero_grad()
        backward(parameters, worker_gradients(UNEVEN, worker=hvd.rank(), step=2))
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7.0


def check_parameters_that_come_and_go():
    parameters = make_parameters()
    parameters[2].requires_grad_(False)
    optimizer = delayed(parameters[:-1], torch.optim.SGD(parameters[:-1], lr=0.1))
    gradients = worker_gradients(UNEVEN, worker=hvd.rank(), step=0)
    both = [worker_gradients(UNEVEN, worker=w, step=0) for w in range(hvd.size())]
    frozen = parameters[2].detach().clone()
    # Rank 1 has no gradient for the fifth; it takes part with zeros.
    backward(parameters, gradients, skip=(2, 7) + ((5,) if hvd.rank() == 1 else ()))
    optimizer.synchronize()
    assert torch.equal(parameters[2].detach(), frozen)
    np.testing.assert_allclose(flat([parameters[5].grad]), both[0][5].ravel() / hvd.size(), rtol=1e-5)
    with optimizer.skip_synchronize():
        optimizer.step()
    # Unfrozen and added parameters are reduced too; under Horovod they would not be.
    parameters[2].requires_grad_(True)
    optimizer.add_param_group({"params": [parameters[-1]], "lr": 0.01})
    for _ in range(3):
        optimizer.zero_grad()
        backward(parameters, gradients)
        optimizer.step()
    return bits(parameters)


def check_sparse_and_layouts():
    table = torch.nn.Embedding(6, 3, sparse=True)
    torch.nn.init.ones_(table.weight)
    for as_dense in (False, True) if hvd.size() > 1 else (True,):  # alone nothing is packed
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(table.parameters(), lr=1.0),
                                             op=hvd.DelayCompensated(lam=0.0),
                                             sparse_as_dense=as_dense)
        loss = table(torch.tensor([hvd.rank(), 3])).sum()
        if not as_dense:
            with pytest.raises(ValueError, match="sparse_as_dense=True"):
                loss.backward()
            optimizer._hvd_ext.remove_hooks()
            table.weight.grad = None
            continue
        loss.backward()
        optimizer.step()
        assert table.weight.grad.is_sparse
        expected = torch.ones(6, 3)
        expected[3] -= 1
        for rank in range(hvd.size()):
            expected[rank] -= 1 / hvd.size()
        torch.testing.assert_close(table.weight.detach(), expected)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(conv).to(memory_format=torch.contiguous_format)
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(hvd.rank()))
    weights = []
    for model, layout in ((conv, torch.channels_last), (twin, torch.contiguous_format)):
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                             op=hvd.DelayCompensated())
        model(x.to(memory_format=layout)).square().mean().backward()
        optimizer.step()
        weights.append(model.weight.detach())
    assert weights[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def check_state():
    """Resuming gives the bit-identical next steps; another rank's state is refused or reset."""
    parameters = make_parameters()
    optimizer = delayed(parameters)
    take_steps(optimizer, parameters, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in parameters]
    take_steps(optimizer, parameters, range(3, 6))

    def resumed(**options):
        again = make_parameters()
        with torch.no_grad():
            for p, w in zip(again, weights, strict=True):
                p.copy_(w)
        fresh = delayed(again)
        fresh.load_state_dict(copy.deepcopy(saved), **options)
        take_steps(fresh, again, range(3, 6))
        return bits(again)

    assert resumed() == bits(parameters)
    if hvd.size() > 1:
        assert resumed(reset_per_rank_state=True) != bits(parameters)
    others = copy.deepcopy(saved)
    others["hvd_ext"]["size"] = hvd.size() + 1
    fresh = delayed(make_parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fresh.load_state_dict(others)
    said = [str(one.message) for one in caught if "begin new" in str(one.message)]
    assert len(said) == (hvd.rank() == 0 and hvd.size() > 1)
    assert all(f"of {hvd.size() + 1} and is loaded by" in text for text in said)
    fresh.load_state_dict(others, reset_per_rank_state=True)
    plain = {k: v for k, v in saved.items() if k != "hvd_ext"}
    fresh.load_state_dict(plain)
    assert fresh.state_dict()["hvd_ext"]["reducer"]["mean_square"] == {}
    # Another model's state does not fit.
    other = make_parameters([(3,), (2,), (2,), (2,), (2,), (2,), (2,), (2,)])
    if hvd.size() > 1:
        with pytest.raises(ValueError, match="slices of MeanSquare do not fit this model: bucket 0"):
            delayed(other).load_state_dict(saved)


def check_broadcast_and_elastic():
    parameters = make_parameters()
    optimizer = delayed(parameters)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)  # fresh: state is made, then alike
    take_steps(optimizer, parameters, range(2))
    hvd.broadcast_parameters(named(parameters), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    model = torch.nn.ParameterList(parameters)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, batch=0)
    state.sync()
    take_steps(optimizer, parameters, range(2, 4))
    after = bits(parameters)
    kept = flat(optimizer._hvd_ext.reducer.mean_square.values())
    state.restore()
    assert bits(parameters) != after
    take_steps(optimizer, parameters, range(2, 4))
    assert bits(parameters) == after
    np.testing.assert_array_equal(flat(optimizer._hvd_ext.reducer.mean_square.values()), kept)
    if hvd.size() == 1:
        return
    # Of a checkpoint read on rank 0 only all get what is shared; the rest begins new everywhere.
    fresh = delayed(make_parameters())
    if hvd.rank() == 0:
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    hvd.broadcast_optimizer_state(fresh, root_rank=0)
    assert fresh._hvd_ext.reducer.steps == optimizer._hvd_ext.reducer.steps
    assert fresh._hvd_ext.reducer.mean_square == {}


def check_process_set():
    evens = hvd.add_process_set([0, 2])
    odds = hvd.add_process_set([1, 3])
    mine = evens if hvd.rank() % 2 == 0 else odds
    parameters = make_parameters()
    optimizer = delayed(parameters, process_set=mine)
    take_steps(optimizer, parameters, range(3))
    outside = delayed(make_parameters(), process_set=odds if mine is evens else evens)
    outside.synchronize()  # not a member: nothing to do, no hang
    hvd.barrier()
    for process_set in (evens, odds):
        hvd.remove_process_set(process_set)
    return bits(parameters)


def check_two_optimizers():
    """Two at once, as in a GAN: their collectives do not meet."""
    first, second = make_parameters(seed=1), make_parameters(seed=2)
    optimizers = [delayed(first), delayed(second)]
    gradients = worker_gradients(UNEVEN, worker=hvd.rank(), step=0)
    for _ in range(3):
        backward(first, gradients)
        backward(second, gradients)
        for optimizer in reversed(optimizers):
            optimizer.step()
            optimizer.zero_grad()
    return bits(first) + bits(second)


def check_unused_without_gradient():
    """A step with no gradient anywhere: zeros, as under Horovod."""
    parameters = make_parameters()
    optimizer = delayed(parameters, torch.optim.SGD(parameters, lr=0.1))
    before = bits(parameters)
    optimizer.step()
    assert bits(parameters) == before
    assert all(p.grad is not None or hvd.size() == 1 for p in parameters)


class Noting:
    """A preconditioner that does nothing but note who attached it, and in which order it is called."""

    def __init__(self):
        self.calls = []

    def attach(self, collectives, optimizer):
        self.calls.append(f"attach {collectives.size}")

    def before_reduce(self):
        self.calls.append("before")

    def precondition(self):
        self.calls.append("precondition")

    def commit(self):
        self.calls.append("commit")

    def abandon(self):
        self.calls.append("abandon")


def check_change_of_size():
    """What an elastic change of the number of ranks does, as seen by the optimizer."""
    parameters = make_parameters()
    noting = Noting()
    optimizer = delayed(parameters, preconditioner=noting)
    take_steps(optimizer, parameters, [0])
    size = f"attach {hvd.size()}"
    assert noting.calls == [size, "before", "precondition", "commit"]
    optimizer._hvd_ext.ranks = optimizer._hvd_ext.reducer._ranks = hvd.size() + 1
    if hvd.size() > 1:
        with pytest.warns(UserWarning, match="starts MeanSquare anew"):
            take_steps(optimizer, parameters, [1])
    else:
        take_steps(optimizer, parameters, [1])
    assert noting.calls[4:] == [size, "before", "precondition", "commit"]
    optimizer = delayed(parameters := make_parameters(), server="sharded")
    optimizer._hvd_ext.ranks = hvd.size() + 1
    backward(parameters, worker_gradients(UNEVEN, worker=hvd.rank(), step=0))
    with pytest.raises(RuntimeError, match=r"hvd\.elastic\.TorchState"):
        optimizer.synchronize()


CHECKS = [check_change_of_size, check_drop_in, check_schedulers_and_hooks, check_clipping_and_misuse,
          check_sparse_and_layouts, check_state, check_broadcast_and_elastic,
          check_unused_without_gradient]


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_ranks(ranks, size, check):
    ranks(size).run(check)


@pytest.mark.distributed
@pytest.mark.parametrize("check", [check_parameters_that_come_and_go, check_two_optimizers],
                         ids=lambda check: check.__name__)
def test_replicas_stay_identical(ranks, check):
    assert len(set(ranks(2).run(check))) == 1


@pytest.mark.distributed
@pytest.mark.parametrize("size", [4])
def test_process_sets_train_apart(size):
    from tests.ranks import run_ranks

    zero, one, two, three = run_ranks(check_process_set, size, env={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    assert zero == two
    assert one == three
    assert zero != one


@pytest.mark.parametrize(("setting", "said"), [
    ({"lam": -1}, "lam must be in"), ({"lam": float("nan")}, "lam must be in"),
    ({"lam": "2"}, "lam must be a number"), ({"decay": 1.0}, "decay must be in"),
    ({"eps": 0}, "eps must be in"), ({"order": "size"}, "order must be one of 'norm', 'rank'"),
    ({"displacement": "all"}, "displacement must be one of"), ({"adaptive": 1}, "adaptive must be"),
    ({"virtual_workers": "thread"}, "virtual_workers must be one of"),
])
def test_settings_are_checked_at_construction(setting, said):
    with pytest.raises((ValueError, TypeError), match=said):
        hvd.DelayCompensated(**setting)


def schedule_after_loading(load):
    """Weights after steps whose learning rate falls, with or without a load_state_dict() between."""
    parameters = make_parameters([(6, 4), (5,)], dtype=torch.float64)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.5), named(parameters),
                                         op=hvd.DelayCompensated(lam=4.0, adaptive=False))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    for step in range(4):
        if load and step == 1:
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        backward(parameters, worker_gradients([(6, 4), (5,)], worker=hvd.rank(), step=step))
        optimizer.step()
        schedule.step()
    return flat(parameters)


@pytest.mark.distributed
def test_the_learning_rate_reaches_the_recursion_after_load_state_dict(ranks):
    pool = ranks(2)
    plain, loaded = pool.run(schedule_after_loading, False), pool.run(schedule_after_loading, True)
    np.testing.assert_array_equal(loaded[0], plain[0])
