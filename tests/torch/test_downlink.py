"""Compressed replies of a server: equal to the oracle, the same on all ranks, saved and loaded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.reducers.topk import keep_count
from hvd_ext.torch.sharding import downlink_kernels as kernels
from tests.reference import replies as oracle
from tests.torch.problems import bits, flat, make_parameters, named

SHAPES = [(40, 30), (7,), (33, 21), (2, 3, 5), (600,), (0, 4), ()]
STEPS = 12
LR, MU = 0.1, 0.9


def topk(ratio=0.1, **more):
    return hvd.Compression.topk(ratio, **{"min_size": 20, "values": "float64", **more})


def refused(make):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    return str(caught.value)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"kind": "replicated", "downlink": hvd.Compression.fp16}, "nothing is sent back"),
    ({"kind": "everywhere"}, "server must be one of 'rank0', 'replicated', 'sharded'"),
    ({"kind": "sharded", "downlink": 0.01}, "downlink must be None, hvd.Compression.fp16 or"),
    ({"kind": "sharded", "downlink": hvd.Compression.none}, "downlink must be None"),
    ({"kind": "sharded", "downlink": topk(error_feedback=False)}, "error_feedback out"),
    ({"kind": "rank0", "downlink": topk(exchange="auto")}, "exchange out"),
    ({"kind": "rank0", "downlink": topk(bucket_bytes=2**20)}, "bucket_bytes out"),
])
def test_settings_that_cannot_be_are_refused(arguments, said):
    assert said in refused(lambda: hvd.Server(**arguments))


# The trajectory

def pull(parameters, step, dtype):
    """A loss whose gradient depends on the weights, the rank and the step; its gradient is ``gradient``."""
    loss = torch.zeros((), dtype=dtype)
    for p, target in zip(parameters, targets(hvd.rank(), step, dtype), strict=True):
        loss = loss + 0.5 * (p - target).square().sum()
    loss.backward()


def targets(worker, step, dtype=torch.float64):
    rng = np.random.default_rng([3, worker, step])
    return [torch.from_numpy(np.asarray(rng.standard_normal(shape))).to(dtype) for shape in SHAPES]


def gradient(weights, worker, step):
    return weights - flat(targets(worker, step))


OPTIMIZERS = {
    "momentum": (lambda p: torch.optim.SGD(p, LR, momentum=MU), lambda: oracle.momentum(LR, MU)),
    "adam": (lambda p: torch.optim.Adam(p, LR), lambda: oracle.adam(LR)),
    "rprop": (lambda p: torch.optim.Rprop(p, LR), None),  # by whole parameters
}


def build(server, optimizer="momentum", dtype=torch.float64, **options):
    parameters = make_parameters(SHAPES, dtype=dtype)
    return parameters, hvd.DistributedOptimizer(OPTIMIZERS[optimizer][0](parameters), server=server,
                                                named_parameters=named(parameters), **options)


def train(parameters, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        pull(parameters, step, parameters[0].dtype)
        optimizer.step()


def places(optimizer):
    """Positions in the flat weights that each owner chooses among, and of those that are sent whole."""
    server = optimizer._hvd_ext.server
    start = np.cumsum([0, *(int(np.prod(shape)) for shape in SHAPES)])
    by_route = {"reply": [], "dense": []}
    for message in server.messages:
        for part in message.parts:
            own = [np.arange(start[p.index] + p.start, start[p.index] + p.stop) for p in part]
            route = message.kind.route or "dense"
            by_route[route].append(np.concatenate([np.zeros(0, np.int64), *own]))
    return by_route["reply"], np.concatenate([np.zeros(0, np.int64), *by_route["dense"]])


def case(server, optimizer, options, dtype):
    parameters, distributed = build(server, optimizer, dtype, **options)
    train(parameters, distributed, range(STEPS))
    before = bits(parameters)
    with distributed.exact_weights():
        exact, exact_bits = flat(parameters), bits(parameters)
    return {"held": flat(parameters), "bits": bits(parameters), "exact": exact, "exact_bits": exact_bits,
            "unchanged": before == bits(parameters), "places": places(distributed),
            "report": distributed.report()}


def trajectories(cases):
    return {name: case(hvd.Server(kind, downlink=reply), optimizer, options, dtype)
            for name, (kind, reply, optimizer, options, dtype) in cases.items()}


GRADIENTS = {"compression": topk(0.05, min_size=1)}
WIDE, SINGLE, HALF = torch.float64, torch.float32, torch.bfloat16


def falling(step):
    """A ratio that is a function of the step."""
    return max(0.2, 1 / (1 + step))


CASES = {
    "sharded": ("sharded", topk(), "momentum", {}, WIDE),
    "sharded, TopK gradients": ("sharded", topk(), "momentum", GRADIENTS, WIDE),
    "rank0, TopK gradients": ("rank0", topk(), "adam", GRADIENTS, WIDE),
    "by tensor": ("sharded", topk(per_tensor=True), "adam", {}, WIDE),
    "excluded": ("rank0", topk(exclude=["p0"]), "momentum", {}, WIDE),
    "sharded, fp16": ("sharded", hvd.Compression.fp16, "momentum", {}, WIDE),
    "rank0, fp16": ("rank0", hvd.Compression.fp16, "adam", GRADIENTS, WIDE),
}


def expected(name, found):
    """The oracle's w and w^."""
    _, reply, optimizer, options, _ = CASES[name]
    w0 = flat(make_parameters(SHAPES, dtype=WIDE))
    parts, whole = found["places"]
    if reply is hvd.Compression.fp16:
        sent = oracle.half_reply
    else:
        if reply.per_tensor:
            tensor = np.repeat(np.arange(len(SHAPES)), [int(np.prod(shape)) for shape in SHAPES])
            parts = [part[tensor[part] == one] for part in parts for one in range(len(SHAPES))]
        sent = oracle.topk_reply(parts, whole, lambda numel: keep_count(numel, reply.ratio))
    keep = keep_count(len(w0), 0.05) if options else None
    return oracle.train(gradient, w0, OPTIMIZERS[optimizer][1](), sent, workers=2, steps=STEPS, keep=keep)


@pytest.mark.distributed
def test_trajectory_is_the_oracles(ranks):
    everyone = ranks(2).run(trajectories, CASES)
    for name in CASES:
        first = everyone[0][name]
        w, held = expected(name, first)
        np.testing.assert_allclose(first["exact"], w, rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(first["held"], held, rtol=1e-9, atol=1e-12, err_msg=name)
        error = math.hypot(*(one[name]["report"]["server"]["downlink"]["error_norm"] for one in everyone))
        assert error == pytest.approx(np.linalg.norm(w - held), rel=1e-6), name
        assert np.linalg.norm(w - held) > 0
        for one in everyone:
            assert (one[name]["bits"], one[name]["exact_bits"]) == (first["bits"], first["exact_bits"]), name
            assert one[name]["unchanged"], name


OTHERS = {
    "by parameter": ("sharded", topk(), "rprop", {}, SINGLE),
    "sampled": ("sharded", topk(selection="sampled"), "adam", {}, SINGLE),
    "ratio of the step": ("sharded", topk(falling), "adam", {}, SINGLE),
    "float16 values": ("rank0", topk(values="float16"), "adam", {}, SINGLE),
    "half precision": ("sharded", topk(values="float32"), "momentum", {}, HALF),
    "delay compensation": ("sharded", topk(), "momentum", {"op": hvd.DelayCompensated(lam=0.1)}, SINGLE),
    "PowerSGD": ("sharded", topk(), "momentum", {"compression": hvd.Compression.powersgd(2)}, SINGLE),
    "late": ("sharded", topk(), "momentum", {"overlap": hvd.DelayedUpdate()}, SINGLE),
}
EQUAL = {
    f"{kind}, {optimizer}, {dtype}": (kind, reply, optimizer, options, dtype)
    for kind in ("sharded", "rank0") for optimizer, options in (("momentum", {}), ("rprop", GRADIENTS))
    for dtype in (SINGLE, HALF) for reply in (topk(1.0, values="float32"),)
}


@pytest.mark.distributed
def test_every_way_keeps_replicas_identical_and_ratio_1_is_the_server_without_a_reply(ranks):
    without = {name: (kind, None, *more) for name, (kind, _, *more) in EQUAL.items()}
    both = [ranks(2).run(trajectories, cases) for cases in ({**OTHERS, **EQUAL}, without)]
    for everyone in both:
        for name, first in everyone[0].items():
            for one in everyone:
                assert (one[name]["bits"], one[name]["exact_bits"]) == (first["bits"], first["exact_bits"])
            assert np.isfinite(first["held"]).all()
    for name in OTHERS:
        error = sum(one[name]["report"]["server"]["downlink"]["error_norm"] for one in both[0])
        assert 0 < error < np.linalg.norm(both[0][0][name]["exact"]), name
    for name, (*_, dtype) in EQUAL.items():
        reply, plain = both[0][0][name], both[1][0][name]
        if dtype == HALF:  # w - w^ of 8-bit numbers is exact in float32, and so is the sum
            assert reply["bits"] == plain["bits"], name
        np.testing.assert_allclose(reply["held"], plain["held"], rtol=2e-5, atol=2e-6, err_msg=name)


# What is sent

def sent_bytes(server):
    parameters = make_parameters([(300, 200), (200,), (100, 50)])
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, 0.1), named_parameters=named(parameters), server=server,
        compression=hvd.Compression.topk(0.01))
    for _ in range(2):
        optimizer.zero_grad()
        sum((p * torch.randn_like(p)).sum() for p in parameters).backward()
        optimizer.step()
    return sum(optimizer.report()["sent"].values()), optimizer.report()


@pytest.mark.distributed
def test_with_topk_at_most_three_times_what_replicated_topk_sends(ranks):
    plain = ranks(2).run(sent_bytes, "replicated")
    for kind in ("sharded", "rank0"):
        replied = ranks(2).run(sent_bytes, hvd.Server(kind, downlink=hvd.Compression.topk(0.01)))
        whole = ranks(2).run(sent_bytes, kind)
        most = max(sent for sent, _ in replied)
        assert most <= 3 * max(sent for sent, _ in plain)
        assert 5 * most < max(sent for sent, _ in whole)
        reply = replied[0][1]["server"]["downlink"]
        assert 0 < reply["bytes_sent"] <= replied[0][1]["sent"]["weights"]
        assert (reply["compression"], reply["ratio"]) == ("topk", 0.01)


# What is wrong

def broken(what):
    """The error of each rank's step, and whether replicas are the same after it."""
    ratio = 0.1 + 0.1 * (hvd.rank() if what == "other replies" else 0)
    parameters, optimizer = build(hvd.Server("sharded", downlink=topk(ratio)))
    steps, error = 1, None
    try:
        train(parameters, optimizer, range(steps))
        if what == "not finite":
            optimizer.zero_grad()
            pull(parameters, 1, WIDE)
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                parameters[0].grad.view(-1)[-1] = math.inf  # one owner's
                optimizer.step()
        elif what == "inside":
            with optimizer.exact_weights():
                train(parameters, optimizer, [1])
        elif what == "begun":
            pull(parameters, 1, WIDE)
            with optimizer.exact_weights():
                pass
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    optimizer._hvd_ext.abort_step()
    return error, bits(parameters)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:optimizer.step")
def test_what_is_wrong_is_an_error_on_all_ranks(ranks):
    for what, said in (("other replies", ["ValueError", "server's reply: Compression.topk ratio=0.2"]),
                       ("not finite", ["the update failed on rank", "FloatingPointError: the update made"]),
                       ("inside", ["within optimizer.exact_weights()"]), ("begun", ["between backward()"])):
        found = ranks(2).run(broken, what)
        assert all(error is not None for error, _ in found), (what, found[0][0], found[1][0])
        for one in said:
            assert any(one in error for error, _ in found), (what, found[0][0], found[1][0])
        assert found[0][1] == found[1][1], what


def set_by_hand():
    parameters, optimizer = build(hvd.Server("sharded", downlink=topk()), dtype=SINGLE)
    train(parameters, optimizer, range(3))
    for p in parameters[:3]:
        p.data.fill_(2.0)
    optimizer.param_groups[0]["lr"] = 0.0
    train(parameters, optimizer, [3])
    with optimizer.exact_weights():
        exact = [bool((p == 2.0).all()) for p in parameters[:3]]
    return exact, [bool((p == 2.0).all()) for p in parameters[:3]]


@pytest.mark.distributed
def test_weights_that_were_set_count(ranks):
    assert ranks(2).run(set_by_hand) == [([True] * 3, [True] * 3)] * 2


OWNERS_OF_NOTHING = {
    "adam": (lambda p: torch.optim.Adam(p, LR), [(10,)], topk(min_size=0)),
    "muon": (lambda p: hvd.Muon(p, lr=LR), [(40, 40)], topk()),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=LR), [(40, 40)], topk(per_tensor=True)),
    "sampled": (lambda p: torch.optim.Adafactor(p, lr=LR), [(40, 40)], topk(selection="sampled")),
    "half": (lambda p: torch.optim.Adafactor(p, lr=LR), [(40, 40)], hvd.Compression.fp16),
    "in groups": (lambda p: hvd.Muon(p, lr=LR), [(40, 40), (40, 30)], topk()),
}


def owning_nothing(kind):
    """By case: whether some rank owns nothing of a message, the weights before and after three steps, the
    exact ones, and how many parameters the gathered state has."""
    found = {}
    for case, (make, shapes, reply) in OWNERS_OF_NOTHING.items():
        parameters = make_parameters(shapes, dtype=torch.float32)
        optimizer = hvd.DistributedOptimizer(make(parameters), named_parameters=named(parameters),
                                             server=hvd.Server(kind, downlink=reply),
                                             groups=2 if case == "in groups" else None)
        start = bits(parameters)
        for step in range(3):
            optimizer.zero_grad()
            sum((w * (hvd.rank() + 1 + step)).pow(2).sum() for w in parameters).backward()
            optimizer.step()
        nothing = any(0 in message.splits for message in optimizer._hvd_ext.server.messages)
        with optimizer.exact_weights():
            exact = bits(parameters)
        found[case] = (nothing, start, bits(parameters), exact, len(optimizer.gather_state_dict()["state"]))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "size"), [("sharded", 2), ("sharded", 3), ("rank0", 2)])
def test_a_rank_may_own_nothing_of_a_message(ranks, kind, size):
    first, *others = ranks(size).run(owning_nothing, kind)
    for case, (nothing, start, end, _, states) in first.items():
        assert nothing, case
        assert start != end, case
        assert states == len(OWNERS_OF_NOTHING[case][1]), case
    assert all(other == first for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sum_of_bits_depends_on_values_alone(dtype):
    memory = torch.randn(40, dtype=dtype)
    for size in (0, 1, 5, 12):
        sums = {int(kernels.bit_sum(torch.cat([memory[:start], memory[20 : 20 + size]])[start:]))
                for start in range(5)}
        assert len(sums) == 1
        if size:
            changed = memory[20 : 20 + size].clone()
            changed[-1] += 0.5
            assert int(kernels.bit_sum(changed)) not in sums
