"""``server="sharded"`` with plain reduction: gradients to their owners, weights back."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from tests.ranks import run_ranks
from tests.torch.problems import UNEVEN, backward, bits, flat, make_parameters, named, worker_gradients

pytestmark = pytest.mark.distributed

SHAPES = [*UNEVEN, (8, 5, 7, 7), (37,)]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.05, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.05),
    "radam": lambda p: torch.optim.RAdam(p, 0.05),
    "adamax": lambda p: torch.optim.Adamax(p, 0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "amsgrad": lambda p: hvd.AMSGrad(p, 0.05),
    "rprop": lambda p: torch.optim.Rprop(p, 0.05),  # not among those that are cut: by whole parameters
}


def build(name, server, shapes=SHAPES, *, dtype=torch.float32, channels_last=False, **options):
    parameters = make_parameters(shapes, dtype=dtype)
    for p in parameters if channels_last else ():
        if p.dim() == 4:  # its elements do not lie in row-major order
            p.data = p.data.to(memory_format=torch.channels_last)
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS[name]([{"params": parameters}]), server=server,
                                         named_parameters=named(parameters), **options)
    return parameters, optimizer


def gradients(step, shapes=SHAPES, part=0):
    return worker_gradients(shapes, worker=hvd.rank(), step=100 * part + step)


def run(name, server, steps=5, *, before_step=None, passes=1, skip=(), late=True, dtype=torch.float32,
        shapes=SHAPES, **options):
    """Train; the weights, and what ``before_step`` returned each time."""
    parameters, optimizer = build(name, server, shapes, dtype=dtype, backward_passes_per_step=passes,
                                  **options)
    seen = []
    for step in range(steps):
        if late and step == 3:
            extra = make_parameters([(6, 5), (7,)], seed=9, dtype=dtype)
            optimizer.add_param_group({"params": extra, "lr": 0.02})
            parameters, shapes = parameters + extra, [*shapes, (6, 5), (7,)]
        optimizer.zero_grad()
        for part in range(passes):
            backward(parameters, gradients(step, shapes, part), skip=skip if step == 2 else (),
                     reverse=bool(step % 2))
        if before_step is not None:
            seen.append(before_step(parameters, optimizer))
        optimizer.step()
    return parameters, optimizer, seen


def trajectories(names):
    found = {}
    for name in names:
        for server in ("replicated", "sharded"):
            parameters, optimizer, _ = run(name, server, skip=(2,))
            state = sum(v.numel() for s in optimizer.state.values() for v in s.values()
                        if isinstance(v, torch.Tensor) and v.dim() > 0)
            found[name, server] = bits(parameters), flat(parameters), state, optimizer.report()["server"]
            if server == "sharded":
                hvd.assert_replicas_equal(named(parameters))
    return found


@pytest.mark.parametrize(("size", "names"), [(2, tuple(OPTIMIZERS)), (3, ("adam", "sgd", "rprop"))])
def test_trajectory_is_that_of_every_rank_updating_all(ranks, size, names):
    everyone = ranks(size).run(trajectories, names, timeout=120)
    for name in names:
        for one in everyone:
            assert one[name, "sharded"][0] == everyone[0][name, "sharded"][0]
            # Three terms are added up in another order than Horovod's: the last bit may differ.
            np.testing.assert_allclose(one[name, "sharded"][1], one[name, "replicated"][1], rtol=1e-5,
                                       atol=1e-6)
            if size == 2:
                assert one[name, "sharded"][0] == one[name, "replicated"][0], name
        owned = [one[name, "sharded"][3]["owned_elements"] for one in everyone]
        assert sum(owned) == everyone[0][name, "sharded"][3]["elements"]
        if name != "rprop":
            assert max(owned) - min(owned) <= 2 * 2 * 128  # two buckets, each cut at multiples of 128
        held = [one[name, "sharded"][2] for one in everyone]
        assert max(held) < 0.8 * everyone[0][name, "replicated"][2]


def full_gradients(server):
    def ask(parameters, optimizer):
        optimizer.synchronize()
        return flat([p.grad for p in parameters])

    asked = run("sgd", server, before_step=ask)
    parameters, optimizer, _ = run("sgd", server, steps=4)
    return asked[2], bits(asked[0]), [p.grad is None for p in parameters], optimizer.report()


@pytest.mark.filterwarnings("ignore:optimizer.step")
def test_all_gradients_come_when_asked_for(ranks):
    plain = ranks(2).run(full_gradients, "replicated")
    sharded = ranks(2).run(full_gradients, "sharded")
    for one, other in zip(plain, sharded, strict=True):
        for a, b in zip(one[0], other[0], strict=True):
            np.testing.assert_array_equal(a, b)
        assert one[1] == other[1]
        # What was not gathered is neither the rank's own gradient nor the sum, and is not left about.
        numels = [int(np.prod(shape)) for shape in [*SHAPES, (6, 5), (7,)]]
        assert other[2] == [numel > 0 for numel in numels]  # nothing is to be gathered of an empty one
        assert one[2] == [False] * len(numels)


def ways():
    """Weights under both servers with each option; bits, values, and the replicas' bits."""
    cases = {
        # Horovod's own reduction takes no gradient that is not contiguous.
        "topk": {"compression": hvd.Compression.topk(0.2, min_size=10), "channels_last": True},
        "accumulated": {"passes": 3}, "in half": {"compression": hvd.Compression.fp16},
        "sum": {"op": hvd.Sum}, "grouped": {"groups": 2}, "float64": {"dtype": torch.float64},
    }
    found = {}
    for name, options in cases.items():
        for server in ("replicated", "sharded"):
            parameters, _, _ = run("adamw", server, **options)
            found[name, server] = bits(parameters), flat(parameters)
    return found


def test_options(ranks):
    results = ranks(2).run(ways, timeout=120)
    for name in ("topk", "accumulated", "in half", "sum", "grouped", "float64"):
        for one in results:
            assert one[name, "sharded"][0] == results[0][name, "sharded"][0]
            if name == "in half":  # rounded once after the mean, not at every addition
                np.testing.assert_allclose(one[name, "sharded"][1], one[name, "replicated"][1], atol=5e-2)
            else:
                assert one[name, "sharded"][0] == one[name, "replicated"][0], name


def half_against_oracle():
    """SGD steps with fp16 against the mean of rounded gradients, in float64."""
    shapes = [(50, 4), (9,)]
    parameters = make_parameters(shapes)
    oracle = [p.detach().double().numpy().copy() for p in parameters]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, 0.1), named_parameters=named(parameters),
                                         compression=hvd.Compression.fp16, server="sharded")
    for step in range(3):
        optimizer.zero_grad()
        backward(parameters, gradients(step, shapes))
        optimizer.step()
        for number, weights in enumerate(oracle):
            each = [worker_gradients(shapes, worker=rank, step=step)[number] for rank in range(hvd.size())]
            weights -= 0.1 * np.mean([np.float16(np.float32(g)).astype(float) for g in each], axis=0)
    return max(np.abs(p.detach().numpy() - w).max() for p, w in zip(parameters, oracle, strict=True))


def test_half_precision_against_float64(ranks):
    # Each step rounds the mean to half precision once: gradients of about 1 to 2^-11, times lr and steps.
    assert max(ranks(2).run(half_against_oracle)) < 3 * 0.1 * 4 * 2.0**-11


def with_sparse_gradients(server, clip):
    model = torch.nn.Sequential(torch.nn.Embedding(40, 6, sparse=True), torch.nn.Flatten(),
                                torch.nn.Linear(18, 3))
    for p, made in zip(model.parameters(), make_parameters([(40, 6), (3, 18), (3,)]), strict=True):
        p.data.copy_(made.data)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.003), server=server,
                                         named_parameters=model.named_parameters())
    norms = []
    for step in range(4):
        x = torch.from_numpy(np.random.default_rng([hvd.rank(), step]).integers(0, 40, (5, 3)))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        if clip and server == "sharded":
            norms.append(float(hvd.clip_grad_norm_(optimizer, 1e9)))
        optimizer.step()
    return bits(list(model.parameters())), flat(list(model.parameters())), norms, optimizer.report()


def test_sparse_gradients_go_the_plain_way(ranks):
    plain = ranks(2).run(with_sparse_gradients, None, False)
    for clip in (False, True):
        sharded = ranks(2).run(with_sparse_gradients, "sharded", clip)
        assert len({one[0] for one in sharded}) == 1
        # A piece of the embedding is updated by the sum of its rows, the whole by one rank's rows after
        # the other's.
        np.testing.assert_allclose(sharded[0][1], plain[0][1], rtol=1e-5, atol=1e-6)
        assert sharded[0][2] == sharded[1][2]
        assert sharded[0][3]["sent_to_owners"] == 2  # the linear layer's weight and bias


def bytes_of(server, clip):
    shapes = [(300, 100), (100,), (100, 50), (50,), (20, 50, 3, 3)]
    ask = (lambda p, o: hvd.clip_grad_norm_(o, 1.0)) if clip else None
    _, optimizer, _ = run("adam", server, shapes=shapes, late=False, before_step=ask)
    report = optimizer.report()
    return sum(report["sent"].values()), sum(report["received"].values())


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_those_of_an_allreduce(ranks, size):
    dense = ranks(size).run(bytes_of, "replicated", False)
    for clip in (False, True):
        for one, other in zip(ranks(size).run(bytes_of, "sharded", clip), dense, strict=True):
            for way in (0, 1):
                assert 0.97 * other[way] <= one[way] <= 1.02 * other[way]


def with_nan(server):
    parameters, optimizer = build("adam", server)
    for step in range(4):
        optimizer.zero_grad()
        made = gradients(step)
        if step == 2 and hvd.rank() == 1:
            made[0][0, 0] = np.nan
        backward(parameters, made)
        optimizer.step()
    return bits(parameters), [bool(torch.isnan(p).any()) for p in parameters]


def test_a_nan_of_one_rank_reaches_all_as_under_replicated(ranks):
    plain, sharded = ranks(2).run(with_nan, "replicated"), ranks(2).run(with_nan, "sharded")
    assert sharded[0] == sharded[1]
    assert sharded[0][1] == plain[0][1] == [True] + [False] * (len(SHAPES) - 1)


def muon(server, steps=4):
    shapes = [(24, 16), (16, 40), (8, 8), (40, 16)]
    parameters = make_parameters(shapes)
    optimizer = hvd.DistributedOptimizer(torch.optim.Muon(parameters, lr=0.05), server=server,
                                         named_parameters=named(parameters))
    calls = []
    inner = torch.optim._muon._zeropower_via_newtonschulz
    torch.optim._muon._zeropower_via_newtonschulz = lambda g, *a: calls.append(tuple(g.shape)) or inner(g, *a)
    try:
        for step in range(steps):
            optimizer.zero_grad()
            backward(parameters, gradients(step, shapes))
            optimizer.step()
    finally:
        torch.optim._muon._zeropower_via_newtonschulz = inner
    return bits(parameters), len(calls) // steps, len(optimizer.state)


def test_muon_orthogonalises_only_what_a_rank_owns(ranks):
    plain, sharded = ranks(2).run(muon, "replicated"), ranks(2).run(muon, "sharded")
    assert {one[0] for one in plain} == {one[0] for one in sharded}
    assert [one[1] for one in plain] == [4, 4]
    assert sum(one[1] for one in sharded) == sum(one[2] for one in sharded) == 4
    assert all(one[1] for one in sharded)


def save(name):
    parameters, optimizer, _ = run(name, "sharded", late=False)
    kept = pickle.dumps(([p.detach().clone() for p in parameters], optimizer.gather_state_dict(),
                         optimizer.state_dict()))
    for step in range(5, 8):
        optimizer.zero_grad()
        backward(parameters, gradients(step))
        optimizer.step()
    return kept, bits(parameters)


def resume(name, kept, server, gathered):
    weights, whole, own = pickle.loads(kept[0 if gathered else hvd.rank()])
    parameters, optimizer = build(name, server)
    with torch.no_grad():
        for p, w in zip(parameters, weights, strict=True):
            p.copy_(w)
    try:
        optimizer.load_state_dict(whole if gathered else own)
    except ValueError as error:
        return str(error)
    for step in range(5, 8):
        optimizer.zero_grad()
        # As two ranks would train: a third and fourth have the mean of theirs.
        mean = [np.mean([worker_gradients(SHAPES, worker=r, step=step)[i] for r in range(2)], axis=0)
                for i in range(len(SHAPES))]
        backward(parameters, gradients(step) if hvd.size() == 2 else mean)
        optimizer.step()
    return bits(parameters), flat(parameters)


def load_own(name, kept, server):
    """What loading the file of this rank says."""
    _, optimizer = build(name, server)
    try:
        optimizer.load_state_dict(pickle.loads(kept[hvd.rank()])[2])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["adam", "adagrad", "rprop"])
def test_checkpoints(ranks, name):
    saved = ranks(2).run(save, name)
    kept, after = [one[0] for one in saved], saved[0][1]
    for server, gathered in (("sharded", True), ("sharded", False), ("replicated", True), ("rank0", True)):
        for bits_now, _ in ranks(2).run(resume, name, kept, server, gathered):
            assert bits_now == after, (server, gathered)
    whole = pickle.loads(kept[0])[1]["state"]
    shapes = {number: tuple(state[key].shape) for number, state in whole.items()
              for key in state if state[key].dim() > 0}
    assert shapes == {n: shape for n, shape in enumerate(SHAPES) if shape != ()}


def test_a_checkpoint_loads_on_more_ranks(ranks):
    saved = ranks(2).run(save, "adam")
    kept = [one[0] for one in saved]
    expected = ranks(2).run(resume, "adam", kept, "replicated", True)[0][1]
    more = ranks(3).run(resume, "adam", kept * 2, "sharded", True)
    assert len({one[0] for one in more}) == 1
    np.testing.assert_allclose(more[0][1], expected, rtol=1e-4, atol=1e-6)
    loaded, refused, _ = ranks(3).run(load_own, "adam", kept + kept[1:], "sharded")
    assert loaded == ""  # a third of all is within the half that rank 0 had
    assert "gather_state_dict()" in refused


def between_servers(folder):
    """A run that is saved under each server goes on under the others, and nothing has to be reset."""
    found = {}
    for saver in ("sharded", "replicated"):
        parameters, optimizer, _ = run("adam", saver, late=False)
        model = torch.nn.ParameterList(parameters)
        hvd.save_checkpoint(f"{folder}/{saver}", 1, model=model, optimizer=optimizer)
        for loader in ("sharded", "replicated"):
            parameters, optimizer = build("adam", loader)
            hvd.load_checkpoint(f"{folder}/{saver}", model=torch.nn.ParameterList(parameters),
                                optimizer=optimizer)
            for step in range(5, 7):
                optimizer.zero_grad()
                backward(parameters, gradients(step))
                optimizer.step()
            found[saver, loader] = bits(parameters)
    return found


def test_a_checkpoint_of_one_server_loads_under_another(ranks, tmp_path):
    for found in ranks(2).run(between_servers, str(tmp_path)):
        assert len(set(found.values())) == 1


def in_a_process_set():
    few = hvd.add_process_set([0, 2])
    parameters, optimizer = build("adam", "sharded", process_set=few)
    plain, other = build("adam", "replicated", process_set=few)
    for step in range(3):
        for p, o in ((parameters, optimizer), (plain, other)):
            o.zero_grad()
            backward(p, gradients(step))
            o.step()
    hvd.remove_process_set(few)
    return bits(parameters) == bits(plain), bits(parameters)


def test_process_sets():
    results = run_ranks(in_a_process_set, 3, env={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    assert [one[0] for one in results] == [True] * 3
    assert results[0][1] == results[2][1]
