"""The PyTorch front end, beside a Horovod that runs in the same program."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hvd_ext.reducers.delay_compensation.engine import replay
from hvd_ext.reducers.delay_compensation.update_rules import AsyncRule
from hvd_ext.torch.async_ps import ParameterServer, TorchModel

STEPS = 15


def build(seed=0, device="cpu"):
    """A small network of mixed shapes, with a parameter that gets no gradient."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.BatchNorm1d(9), torch.nn.Tanh(),
                                torch.nn.Linear(9, 3))
    model.unused = torch.nn.Parameter(torch.ones(4))
    model.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    return model.to(device)


def backward(model, worker, batch):
    """The gradients of one of a worker's mini-batches."""
    rng = np.random.default_rng([worker, batch])
    x = torch.from_numpy(rng.normal(size=(8, 6)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 3, size=8))
    device = next(model.parameters()).device
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()


def flat(model):
    """All trainable parameters (n,)."""
    buffer = TorchModel(list(model.parameters())).new_buffer()
    buffer.take_weights()
    return buffer.read_entries().copy()


def train(options, size):
    """A run on the first ``size`` ranks between two allreduces of Horovod."""
    import horovod.torch as hvd
    from mpi4py import MPI

    before = hvd.allreduce(torch.tensor(float(hvd.rank())), op=hvd.Sum)
    part = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank < size)
    told = None
    if MPI.COMM_WORLD.rank < size:
        model = build()
        ps = ParameterServer(model, comm=part, progress=False, **options)
        if ps.is_server:
            ps.serve()
            told = {"recording": ps.recording} if part.rank == 0 else {}
        else:
            for batch in range(STEPS):
                backward(model, ps.worker, batch)
                ps.step()
            report = ps.finish()
            told = {"updates": report.updates}
        told["weights"] = flat(model)
    after = hvd.allreduce(torch.tensor(float(hvd.rank())), op=hvd.Sum)
    return told, float(before), float(after)


def replayed(recording, rule, momentum):
    """What the delay engine makes of the recorded delays with the same model's gradients."""
    model = build()
    buffer = TorchModel(list(model.parameters())).new_buffer()

    def gradient(w, k):
        buffer.write_entries(w)
        buffer.put_weights()
        backward(model, int(recording.senders[k]), int(recording.batches[k]))
        buffer.take_gradients()
        return buffer.read_entries().copy()

    return replay(gradient, flat(model), steps=len(recording), delays=recording, lr=0.1,
                  momentum=momentum, rule=rule).weights


@pytest.mark.distributed
def test_run_beside_horovod_replays(ranks):
    options = {"lr": 0.1, "rule": "dc-asgd-a", "lam": 0.2, "momentum": 0.4}
    results = ranks(3).run(train, options, 3)
    told = results[0][0]
    assert results[2][0]["updates"] == STEPS * 2
    for result, before, after in results:
        assert before == after == 3.0
        np.testing.assert_array_equal(result["weights"], told["weights"])
    np.testing.assert_allclose(
        told["weights"],
        replayed(told["recording"], AsyncRule(name="dc-asgd-a", lam=0.2), 0.4), rtol=0, atol=1e-6,
    )


def sequential():
    """Sequential SGD in this process: by NumPy and by torch."""
    model, optimizer_model = build(), build()
    w = flat(model)
    buffer = TorchModel(list(model.parameters())).new_buffer()
    optimizer = torch.optim.SGD(optimizer_model.parameters(), lr=0.1)
    for batch in range(STEPS):
        backward(optimizer_model, 0, batch)
        optimizer.step()
        buffer.write_entries(w)
        buffer.put_weights()
        backward(model, 0, batch)
        buffer.take_gradients()
        w = w - buffer.read_entries() * np.float32(0.1)
    return w, flat(optimizer_model)


@pytest.mark.distributed
def test_one_worker_is_sequential_sgd(ranks):
    pool = ranks(3)
    results = pool.run(train, {"lr": 0.1, "rule": "dc-asgd-a"}, 2)
    w, by_torch = pool.run(sequential)[0]  # by a rank, whose threads round as a worker's do
    np.testing.assert_array_equal(results[0][0]["weights"], w)  # bit for bit
    # torch.optim.SGD rounds lr * g and the difference in one operation instead of two
    np.testing.assert_allclose(w, by_torch, rtol=1e-4, atol=1e-6)
    assert results[2][0] is None


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float16,),
                                    (torch.bfloat16, torch.float32)])
def test_flat_and_back_keeps_every_entry(dtypes):
    parameters = [torch.nn.Parameter(torch.randn(3, i + 2).to(d)) for i, d in enumerate(dtypes)]
    before = [p.detach().clone() for p in parameters]
    model = TorchModel(parameters)
    assert model.dtype == (np.float64 if torch.float64 in dtypes else np.float32)
    buffer = model.new_buffer()
    buffer.take_weights()
    for p in parameters:
        p.data.zero_()
    buffer.put_weights()
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(p, old)
        assert p.dtype == old.dtype
    parameters[0].grad = torch.full_like(parameters[0], 2.0)
    buffer.take_gradients()
    assert buffer.read_entries()[:6].tolist() == [2.0] * 6
    assert (buffer.read_entries()[6:] == 0).all()
    assert buffer.max_magnitude() == 2.0
    parameters[0].grad[0, 0] = float("nan")
    buffer.take_gradients()
    assert np.isnan(buffer.max_magnitude())


@pytest.mark.parametrize("use", [lambda b: b.wire, lambda b: b.write_entries(np.zeros(6, np.float32)),
                                 lambda b: b.take_gradients()])
def test_a_buffer_is_not_used_before_what_is_copied_out_of_it_is_gone(use):
    waited = []
    buffer = TorchModel([torch.zeros(6, requires_grad=True)]).new_buffer()
    buffer._leaving = [SimpleNamespace(synchronize=lambda: waited.append(1))]
    for _ in range(2):
        use(buffer)
    assert waited == [1]


def test_parameters_that_cannot_travel_are_refused():
    with pytest.raises(TypeError, match=r"parameter 0 must be real floating point, got torch.comp"):
        TorchModel([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(ValueError, match="cuda_aware=True needs all parameters on one CUDA"):
        TorchModel([torch.zeros(2, requires_grad=True)], cuda_aware=True)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_aware", [False, True])
def test_gpu_parameters_are_staged(cuda_aware):
    model = build(device="cuda")
    flattened = TorchModel(list(model.parameters()), cuda_aware=cuda_aware)
    buffer = flattened.new_buffer()
    assert buffer._flat.is_cuda == cuda_aware
    assert buffer._flat.is_pinned() != cuda_aware
    buffer.take_weights()
    np.testing.assert_array_equal(buffer.read_entries(), flat(build()))
    buffer.write_entries(2 * buffer.read_entries())
    buffer.put_weights()
    np.testing.assert_array_equal(flat(model.cpu()), 2 * flat(build()))
