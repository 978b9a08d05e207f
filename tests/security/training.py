"""Training that goes on until a file says that the attack is over; the weights are compared at the end."""

import sys
from pathlib import Path

import horovod.torch as hvd
import torch


def train(folder: str) -> str:
    """Train until ``folder / "attacked"`` is there, and a few steps more."""
    hvd.init()
    model = torch.nn.Linear(4, 1)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01),
                                         named_parameters=model.named_parameters())
    (Path(folder) / f"started.{hvd.rank()}").touch()
    left = 5
    while left:
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        over = hvd.allreduce(torch.tensor(float((Path(folder) / "attacked").exists())), op=hvd.Min)
        left -= bool(over)
    weights = hvd.allgather(model.weight.detach())
    assert torch.equal(weights[0], weights[1])
    return f"trained {hvd.rank()} of {hvd.size()}"


def train_elastic(folder: str) -> str:
    """The same under the elastic driver, with its notification services."""
    hvd.init()
    state = hvd.elastic.TorchState(batch=0)
    return str(hvd.elastic.run(lambda _: train(folder))(state))


if __name__ == "__main__":
    print({"static": train, "elastic": train_elastic}[sys.argv[2]](sys.argv[1]), flush=True)
