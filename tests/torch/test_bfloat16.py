"""bfloat16, which Horovod does not know, against float64; weights of any layout."""

from __future__ import annotations

import pytest
import torch

import hvd_ext.torch as hvd
from tests.torch.problems import bits

pytestmark = pytest.mark.distributed
UNIT = 2.0**-8  # half a place of bfloat16, relative


def made(rank, shape=(5, 3)):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)


def close(found, expected):
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    error = (found.double() - expected).abs()
    assert bool((error <= 1.001 * UNIT * expected.abs() + 1e-30).all()), error.max()


def functions():
    rank, size = hvd.rank(), hvd.size()
    mine, all_of = made(rank), [made(r).double() for r in range(size)]
    mean, total = sum(all_of) / size, sum(all_of)
    close(hvd.allreduce(mine), mean)
    close(hvd.allreduce(mine, op=hvd.Sum, compression=hvd.Compression.none), total)
    close(hvd.allreduce(mine, op=hvd.Max), torch.stack(all_of).max(0).values)
    assert torch.equal(mine, made(rank))  # not in place
    close(hvd.synchronize(hvd.allreduce_async(mine, op=hvd.Sum)), total)
    changed = mine.clone()
    assert hvd.allreduce_(changed) is changed
    close(changed, mean)
    changed = mine.clone()
    handle = hvd.allreduce_async_(changed, name="later")
    assert hvd.synchronize(handle) is changed
    close(changed, mean)
    for results in (hvd.grouped_allreduce([mine, 2 * mine]), hvd.grouped_allreduce_([mine.clone(), 2 * mine]),
                    hvd.synchronize(hvd.grouped_allreduce_async([mine, 2 * mine]))):
        close(results[0], mean)
        close(results[1], 2 * mean)
    close(hvd.allgather(mine), torch.cat(all_of))
    close(hvd.synchronize(hvd.allgather_async(mine)), torch.cat(all_of))
    close(hvd.grouped_allgather([mine])[0], torch.cat(all_of))
    close(hvd.broadcast(mine, 1), all_of[1])
    changed = mine.clone()
    assert hvd.broadcast_(changed, 1) is changed
    close(changed, all_of[1])
    rows, received = hvd.alltoall(made(rank, (4, 3)), splits=torch.tensor([1, 3], dtype=torch.int32))
    expected = torch.cat([made(r, (4, 3)).double()[:1] if rank == 0 else made(r, (4, 3)).double()[1:]
                          for r in range(size)])
    close(rows, expected)
    assert received.tolist() == [[1, 1], [3, 3]][rank]
    close(hvd.reducescatter(made(rank, (4, 3)), op=hvd.Sum),
          sum(made(r, (4, 3)).double() for r in range(size))[2 * rank:2 * rank + 2])
    assert torch.equal(hvd.broadcast_object({"w": mine}, root_rank=1)["w"], made(1))
    traced = mine.clone().requires_grad_()
    (hvd.allreduce(traced, op=hvd.Sum).float() * (rank + 1)).sum().backward()
    close(traced.grad, torch.full((5, 3), 3.0, dtype=torch.float64))
    traced = mine.clone().requires_grad_()
    hvd.allgather(traced).float().sum().backward()
    close(traced.grad, torch.ones(5, 3, dtype=torch.float64))
    sparse = torch.sparse_coo_tensor([[rank]], made(rank, (1, 3)), (3, 3))
    both = hvd.sparse_allreduce_async(sparse, "sparse", hvd.Average)().to_dense()
    close(both[:2], torch.cat([made(r, (1, 3)).double() / 2 for r in range(2)]))
    return True


def test_every_function(ranks):
    assert ranks(2).run(functions) == [True, True]


def train(options):
    """Two steps of SGD with made gradients, this rank's weights after them, and the float64 oracle's."""
    size = hvd.size()
    w = torch.nn.Parameter(made(7))
    options = {key: getattr(hvd, value) if key == "op" else value for key, value in options.items()}
    if options.pop("half", False):
        options["compression"] = hvd.Compression.fp16
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([w], lr=1.0), [("w", w)], **options)
    optimizer.zero_grad()
    (w * made(hvd.rank())).sum().backward()
    optimizer.synchronize()
    total = sum(made(r).double() for r in range(size))
    close(w.grad, total if options.get("op") == hvd.Sum else total / size)
    before = w.detach().double().clone()
    reduced = w.grad.double()
    with optimizer.skip_synchronize():
        optimizer.step()
    close(w.detach(), before - reduced)
    sent = sum(optimizer.report()["sent"].values())
    return bits([w]), sent


@pytest.mark.parametrize("options", [{}, {"op": "Sum"}, {"half": True}, {"server": "rank0"},
                                     {"server": "sharded"}], ids=str)
def test_plain_reduction_and_servers(ranks, options):
    (one, sent), (other, _) = ranks(2).run(train, options)
    assert one == other
    if not options:
        assert sent >= 4 * 15  # float32 travels, and the fingerprint of the first step


def adasum():
    w = torch.nn.Parameter(made(7))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([w], lr=1.0), [("w", w)], op=hvd.Adasum)
    (w * made(0)).sum().backward()
    optimizer.step()
    return w.detach().double(), made(7).double(), made(0).double()


def test_adasum_of_equal_gradients_is_that_gradient(ranks):
    for w, start, gradient in ranks(2).run(adasum):
        assert torch.allclose(w, start - gradient, rtol=0.02, atol=0.02)


def layouts():
    torch.manual_seed(hvd.rank())
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    if hvd.rank() == 0:
        model = model.to(memory_format=torch.channels_last)  # layouts differ between the ranks
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    seen = [[t.flatten().tolist() for t in model.state_dict().values()]]
    model = model.to(memory_format=torch.channels_last).bfloat16()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(hvd.rank())
    hvd.broadcast_parameters(model.named_parameters(), root_rank=1)
    seen.append([t.float().flatten().tolist() for t in model.state_dict().values()])
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                                         named_parameters=model.named_parameters())
    x = torch.randn(2, 3, 5, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)
    model(x).float().square().sum().backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["momentum_buffer"].add_(hvd.rank())
    hvd.broadcast_optimizer_state(optimizer, root_rank=1)
    moments = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert not moments[0].is_contiguous()
    seen.append([m.float().flatten().tolist() for m in moments])
    assert hvd.rank() in (0, 1)
    return seen


def test_weights_and_moments_of_any_layout_are_broadcast(ranks):
    one, other = ranks(2).run(layouts)
    assert one == other


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="params must be a state_dict"):
        hvd.broadcast_parameters(3, root_rank=0)
