"""Small models, data and functions for the names that PyTorch's blocks leave open."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import hvd_ext.torch as hvd
from tests.docs.completion import AS_ALWAYS

Names = dict[str, Any]  # the block's globals; those below are made when a block asks for them
FEATURES, CLASSES, ROWS = 8, 3, 4
USUAL_ARGUMENTS = "torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters()"


def make_model(names: Names) -> torch.nn.Module:
    """With one matrix that is large enough for TopK and PowerSGD to compress."""
    torch.manual_seed(names["_seed_"])
    return torch.nn.Sequential(torch.nn.Linear(FEATURES, 160), torch.nn.Tanh(), torch.nn.Linear(160, CLASSES))


def make_normalized(names: Names) -> torch.nn.Module:
    """With batch normalization."""
    return torch.nn.Sequential(torch.nn.BatchNorm1d(FEATURES), make_model(names))


def make_resnet(names: Names) -> torch.nn.Module:
    """A convolution and a last layer called ``fc``, of rows as the other models."""
    torch.manual_seed(0)
    return torch.nn.Sequential(OrderedDict(
        image=torch.nn.Unflatten(1, (2, 2, 2)), conv1=torch.nn.Conv2d(2, 4, 2), flat=torch.nn.Flatten(),
        fc=torch.nn.Linear(4, CLASSES)))


class Scale(torch.nn.Module):
    """One factor a feature: a layer of one's own."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def make_batch(step: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of this rank, or of another."""
    made = torch.Generator().manual_seed(1000 * step + (hvd.rank() if rank is None else rank))
    return torch.randn(ROWS, FEATURES, generator=made), torch.randint(CLASSES, (ROWS,), generator=made)


class Loss:
    """Of a forward pass of the block's model, which is made when the block comes to ``loss.backward()``."""

    def __init__(self, names: Names, scale: float = 1.0) -> None:
        self.names, self.scale = names, scale
        need(names, "model")

    def backward(self) -> None:
        """Gradients begin new."""
        self.names["model"].zero_grad()
        x, y = make_batch(0)
        (self.scale * torch.nn.functional.cross_entropy(self.names["model"](x), y)).backward()


def take_step(model: torch.nn.Module, optimizer: Any, step: int) -> None:
    """One step of training, as always."""
    optimizer.zero_grad()
    x, y = make_batch(step)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def step_as_always(names: Names) -> Callable[..., None]:
    """``...``: within a loop over batches the passes that come before ``step()``, else a whole step."""
    def as_always(x: Any = None, y: Any = None) -> None:
        if x is None:
            take_step(names["model"], names["optimizer"], 0)
        else:
            names["optimizer"].zero_grad()
            torch.nn.functional.cross_entropy(names["model"](x), y).backward()
    return as_always


def train_now_and_then(names: Names) -> Callable[[int], None]:
    """Of a thousand steps two, so that they take no time."""
    def train(step: int) -> None:
        if step % 1000 >= 998:
            take_step(names["model"], names["optimizer"], step)
    return train


def split_batches(names: Names) -> Callable[[int, int], list[Any]]:
    """Each worker's share."""
    return lambda worker, workers: [make_batch(step, worker) for step in range(3)]


def plain_optimizer(names: Names) -> torch.optim.Optimizer:
    """Not distributed."""
    return torch.optim.SGD(need(names, "model").parameters(), lr=0.1, momentum=0.9)


def distributed_optimizer(names: Names) -> Any:
    """Plain reduction."""
    optimizer = plain_optimizer(names)
    return hvd.DistributedOptimizer(optimizer, named_parameters=names["model"].named_parameters())


def flat_weights(model: torch.nn.Module) -> Any:
    """In the parameter server's order, as a NumPy array of its own."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()


def recorded_gradient(names: Names) -> Callable[[Any, int], Any]:
    """Of the mini-batch that the recording has for an update, at given weights."""
    model, batches = make_model(names), split_batches(names)

    def gradient(w: Any, k: int) -> Any:
        torch.nn.utils.vector_to_parameters(torch.from_numpy(w.copy()), model.parameters())
        model.zero_grad()
        x, y = batches(int(names["recording"].senders[k]), 0)[names["recording"].batches[k]]
        torch.nn.functional.cross_entropy(model(x), y).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()
    return gradient


def loss_of(model: torch.nn.Module) -> float:
    """On one batch."""
    x, y = make_batch(0)
    return float(torch.nn.functional.cross_entropy(model(x), y))


MAKERS: dict[str, Callable[[Names], Any]] = {
    "torch": lambda names: torch,
    "hvd": lambda names: hvd,
    "model": make_model,
    "generator": make_model,
    "discriminator": make_resnet,
    "resnet": make_resnet,
    "optimizer": distributed_optimizer,
    "sgd": plain_optimizer,
    "scheduler": lambda names: torch.optim.lr_scheduler.StepLR(need(names, "sgd"), 1),
    "loss": Loss,
    "loss_fn": lambda names: torch.nn.functional.cross_entropy,
    "loader": lambda names: [make_batch(step) for step in range(2)],
    "batches": split_batches,
    "steps": lambda names: 1000,
    "epoch": lambda names: 0,
    "wandb": lambda names: SimpleNamespace(log=lambda figures: json.dumps(figures)),
    "mlflow": lambda names: SimpleNamespace(log_metrics=lambda figures: json.dumps(figures)),
    "train": train_now_and_then,
    "evaluate": lambda names: loss_of,
    "path": lambda names: str(Path(names["_folder_"], "model.pt")),
    "Scale": lambda names: Scale,
    AS_ALWAYS: step_as_always,
}
ALWAYS_NEW = {"loss", "sgd", "scheduler"}

# Sections whose blocks need something else, or begin anew, by page and heading.
SECTIONS: dict[tuple[str, str], dict[str, Callable[[Names], Any]]] = {
    ("docs/async.md", "Settings"): {"start": lambda names: flat_weights(make_model(names)),
                                    "gradient": recorded_gradient},
    ("docs/uneven_data.md", "Ranks with different numbers of batches"): {
        "loader": lambda names: [make_batch(step) for step in range(2 + hvd.rank())]},
    ("docs/drop_in.md", "Scripts without DistributedOptimizer"): {
        "model": make_model, "optimizer": plain_optimizer},
    ("docs/drop_in.md", "Batch normalization over the ranks"): {"model": make_normalized},
    ("docs/own_reducer.md", "Bring your own reducer"): {"model": make_model},
    ("docs/downlink.md", "Compressed replies"): {"model": make_model},
}

# Blocks that are run again, with other values, for what they do the second time.
AGAIN: dict[tuple[str, str], dict[str, Callable[[Names], Any]]] = {
    ("docs/checkpoints.md", "Checkpoints"): {"steps": lambda names: 2000, "sgd": plain_optimizer},
    ("docs/drop_in.md", "Throw gradients away, skip steps"): {
        "loss": lambda names: Loss(names, 1e6)},
}

# Sections with blocks after which ranks may differ: nothing averages there.
ALONE = {("docs/seng.md", "SENG: natural gradient")}


def need(names: Names, name: str) -> Any:
    """A name of the block, made if it is not there."""
    if name not in names:
        names[name] = names["_makers_"][name](names)
    return names[name]


def train_with(made: Names, names: Names) -> None:
    """Train with what a block has made: weights move, and are the same on all ranks.

    Args:
        made: the names that the block has bound.
        names: all names.
    """
    values = list(made.values())
    values += [one for value in values if isinstance(value, dict) for one in value.values()]
    optimizers = [one for one in values
                  if isinstance(one, torch.optim.Optimizer) and hasattr(one, "synchronize")]
    models = [value for value in names.values() if isinstance(value, torch.nn.Module)]
    for optimizer in optimizers:
        own = {p for group in optimizer.param_groups for p in group["params"]}
        model = next(model for model in models if own <= set(model.parameters()))
        before = [p.detach().clone() for p in own]
        for step in range(3):
            take_step(model, optimizer, step)
        optimizer.flush()
        assert not all(torch.equal(one, other) for one, other in zip(before, own, strict=True))


def prove_replay(names: Names) -> None:
    """The replay ends at the weights of the run, and correcting for delay mattered."""
    import numpy as np

    reached, start = flat_weights(names["model"]), flat_weights(make_model(names))
    assert names["recording"].delays.max() > 0
    np.testing.assert_allclose(names["trajectory"].weights, reached, rtol=0, atol=1e-6)
    assert np.abs(reached - start).max() > 0.01


def prove_resumed(names: Names) -> None:
    """The second run went on where the first had saved."""
    assert names["first"] == 1000


def prove_trained(names: Names) -> None:
    """The script has learnt its data, and has written its last checkpoint."""
    assert names["accuracy"] > 0.8
    assert Path(names["_folder_"], "first_torch", "update-000000000005").is_dir()


def prove_thrown_away(names: Names) -> None:
    """The second pass was thrown away."""
    assert names["norm"] > 100


def prove_rule(names: Names) -> None:
    """SENG takes the layer of one's own."""
    model = torch.nn.Sequential(Scale(FEATURES), torch.nn.Linear(FEATURES, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seng = hvd.SENG(model, damping=0.2)
    x, y = make_batch(0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    seng.step()
    optimizer.step()
    report = seng.report()
    assert report["coverage"] == 1.0
    assert report["layers"][0]["kind"] == "Scale"  # by that rule, and not by running it on each sample


# What else must be true after a block, by page and heading.
PROOFS: dict[tuple[str, str], Callable[[Names], None]] = {
    ("docs/async.md", "Settings"): prove_replay,
    ("docs/first_script.md", "PyTorch"): prove_trained,
    ("docs/checkpoints.md", "Checkpoints"): prove_resumed,
    ("docs/drop_in.md", "Throw gradients away, skip steps"): prove_thrown_away,
    ("docs/seng_models.md", "What it does with each layer"): prove_rule,
}
