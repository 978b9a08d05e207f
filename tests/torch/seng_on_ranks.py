"""What ranks run for tests/torch/test_seng_ranks.py; every function is called on all ranks at once."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

import hvd_ext.torch as hvd
from hvd_ext.torch.seng import SENG
from tests.torch.per_sample import flat_gradient, held_u

LAM = 0.25


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """No batch statistics, so that ranks and one process on the joined batch see the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).to(dtype)


def data(rank: int, step: int, rho: int, dtype: torch.dtype = torch.float64
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's batch of a step; every rank can make every other's."""
    rng = np.random.default_rng([rank, step])
    return (torch.from_numpy(rng.standard_normal((rho, 2, 5, 5))).to(dtype),
            torch.from_numpy(rng.integers(0, 3, rho)))


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(settings: dict[str, Any], steps: int, rhos: list[int], same: bool = False,
            dtype: str = "float64", lr: float = 0.1) -> list[dict[str, Any]]:
    """Each step's local gradient, direction, U and weights on this rank, by layer."""
    kind = getattr(torch, dtype)
    model = network(kind)
    seng = hvd.SENG(model, **{"damping": LAM, **settings})
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr), named_parameters=model.named_parameters(),
        preconditioner=seng)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        me = 0 if same else hvd.rank()
        fresh = clone(model)
        local = torch.autograd.grad(loss_of(fresh, data(me, step, rhos[hvd.rank()], kind)),
                                    list(fresh.parameters()))
        loss_of(model, data(me, step, rhos[hvd.rank()], kind)).backward()
        optimizer.synchronize()
        where = {id(p): k for k, p in enumerate(model.parameters())}
        seen.append({
            "gradients": [np.concatenate([local[where[id(p)]].numpy().ravel()
                                          for p in layer.parameters]) for layer in seng.layers],
            "directions": [flat_gradient(layer).numpy() for layer in seng.layers],
        })
        with optimizer.skip_synchronize():
            optimizer.step()
        seen[-1]["u"] = [held_u(seng, layer).numpy() for layer in seng.layers]  # counts from the update on
        seen[-1]["weights"] = bits(model)
    seen[-1]["report"] = dict(seng.report())
    seng.close()
    return seen


def clone(model: nn.Module) -> nn.Module:
    """A copy without hooks that gives the local gradient."""
    fresh = network(next(model.parameters()).dtype)
    fresh.load_state_dict(model.state_dict())
    return fresh


def bits(model: nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def composed(case: str) -> tuple[list[float], bytes, bool]:
    """Losses, weights and whether all is finite with other extensions in the other slots."""
    torch.manual_seed(hvd.rank())
    model = network(torch.float32)
    options: dict[str, Any] = {
        "fp16": {"compression": hvd.Compression.fp16},
        "adasum": {"op": hvd.Adasum},
        "delay": {"op": hvd.DelayCompensated(lam=0.5)},
        "topk": {"compression": hvd.Compression.topk(ratio=0.3, min_size=1)},
        "sharded": {"server": "sharded"},
        "clipping": {}, "lagged": {}, "full": {}, "two passes": {"backward_passes_per_step": 2},
    }[case]
    seng = hvd.SENG(model, damping=LAM, update_freq=3, explicit_threshold=200,
                    coupling=case if case in ("lagged", "full") else "block",
                    loss_scale=0.5 if case == "two passes" else 1.0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        named_parameters=model.named_parameters(), preconditioner=seng, **options)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    losses = []
    batch = data(hvd.rank(), 0, 12, torch.float32)
    for _ in range(15):
        optimizer.zero_grad()
        if case == "two passes":
            (loss_of(model, (batch[0][:6], batch[1][:6])) / 2).backward()
            loss = loss_of(model, (batch[0][6:], batch[1][6:]))
            (loss / 2).backward()
        else:
            loss = loss_of(model, batch)
            loss.backward()
        losses.append(loss.item())
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0 if case == "clipping" else 100.0)
        with optimizer.skip_synchronize():
            optimizer.step()
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return losses, bits(model), finite


class Poisoned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def failing_on_one_rank(coupling: str, culprit: int) -> tuple[list[Any], bytes, list[str]]:
    """A layer whose capture is not finite on one rank at steps 0 and 3, with a refresh a step."""
    step = 0

    def rule(module: nn.Module, x: torch.Tensor, gz: torch.Tensor, pick: Any) -> Any:
        u = pick(x) * pick(gz)
        bad = hvd.rank() == culprit and step in (0, 3)
        return {"weight": u * float("nan") if bad else u}

    hvd.register_seng_rule(Poisoned, rule, replace=True)
    model = nn.Sequential(network(), Poisoned())
    seng = hvd.SENG(model, damping=LAM, update_freq=1, coupling=coupling)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
        preconditioner=seng)
    ages = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, data(hvd.rank(), step, 5)).backward()
            optimizer.step()
            ages.append(seng.report()["layers"][-1].get("age"))
    return ages, bits(model), [str(one.message) for one in said]


def gradient_not_finite_on_one_rank(coupling: str) -> tuple[int, bool, bytes]:
    """One rank's NaN is everyone's after the reduction: the step is left alone on all."""
    model = network()
    seng = hvd.SENG(model, damping=LAM, update_freq=2, coupling=coupling)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
        preconditioner=seng)
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, data(hvd.rank(), step, 5))
        (loss * float("nan") if hvd.rank() == 1 and step in (0, 3, 4) else loss).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            finite = all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
            assert finite == (step not in (0, 3, 4)), step
            if finite:
                optimizer.step()
            else:
                optimizer._synchronized = False
    return seng.report()["skipped"], seng.report()["failures"] == 0, bits(model)


def other_settings_on_one_rank() -> str:
    """The error each rank sees."""
    model = network()
    seng = SENG(model, damping=LAM, rank=2 + hvd.rank())
    loss_of(model, data(0, 0, 4)).backward()
    try:
        seng.step()
    except RuntimeError as error:
        return str(error)
    finally:
        seng.close()
    return "nothing"


def other_damping_on_one_rank() -> tuple[str, str]:
    """The errors for dampings that differ from the start, and from step 2 on."""
    odd = 0.3 * (1 + hvd.rank())
    return (error_of_three_steps(odd, "constant"),
            error_of_three_steps(lambda step: odd if step == 2 else 0.3, "at_step_2"))


def error_of_three_steps(damping: Any, name: str) -> str:
    """What goes wrong when the curvature is taken at each of three steps."""
    model = network()
    seng = SENG(model, damping=damping, update_freq=1, name=name)
    try:
        for _ in range(3):
            model.zero_grad()
            loss_of(model, data(0, 0, 5)).backward()
            seng.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def fewer_layers_on_one_rank() -> str:
    """The error when one rank leaves a layer out."""
    model = network()
    seng = SENG(model, damping=LAM, exclude=["3"] if hvd.rank() else [], name="fewer")
    loss_of(model, data(0, 0, 4)).backward()
    try:
        seng.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def joined_with_a_schedule(coupling: str) -> bytes:
    """Rank 1 starts anew while rank 0 is at step 3 of a damping that falls: both go on together."""
    model = network()
    seng = SENG(model, damping=lambda step: 0.5 / (1 + step), update_freq=3, coupling=coupling,
                name=f"joined{coupling}")
    for step in range(3):
        model.zero_grad()
        loss_of(model, data(0, step, 4)).backward()
        seng.step()
    state = seng.state_dict()
    seng.reset_state()
    if hvd.rank() == 0:
        seng.load_state_dict(state)
    model.zero_grad()
    loss_of(model, data(0, 5, 4)).backward()
    seng.step()
    return b"".join(p.grad.numpy().tobytes() for p in model.parameters())


def other_image_sizes(uc: str, coupling: str) -> tuple[bool, bytes]:
    """Images of another size, so kappa and columns of the factors, on each rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(3, 3)).double()
    seng = hvd.SENG(model, damping=LAM, explicit_threshold=0, rank=6, uc=uc, coupling=coupling)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
        preconditioner=seng)
    rng = np.random.default_rng(hvd.rank())
    size = 3 + hvd.rank() % 2
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.from_numpy(rng.standard_normal((4, 2, size, size)))
        loss_of(model, (x, torch.tensor([0, 1, 2, 0]))).backward()
        optimizer.step()
    return all(bool(torch.isfinite(p).all()) for p in model.parameters()), bits(model)


def resumed(coupling: str) -> tuple[bool, str]:
    """Whether a run that goes on equals one that was saved and loaded; the error at a false load."""
    def made() -> tuple[nn.Module, Any]:
        model = network(torch.float32)
        seng = hvd.SENG(model, damping=LAM, update_freq=3, coupling=coupling,
                        explicit_threshold=200)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            named_parameters=model.named_parameters(), preconditioner=seng)
        return model, optimizer

    def go(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, data(hvd.rank(), step, 6, torch.float32)).backward()
            optimizer.step()

    model, optimizer = made()
    go(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    go(model, optimizer, range(2, 6))
    file.seek(0)
    again, other = made()
    weights, state = torch.load(file, weights_only=False)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    go(again, other, range(2, 6))
    error = ""
    try:
        own = state["hvd_ext"]["preconditioner"]
        other._hvd_ext.preconditioner.load_state_dict({**own, "ranks": 7})
    except ValueError as caught:
        error = str(caught)
    return bits(model) == bits(again), error


def standalone(coupling: str) -> tuple[list[np.ndarray], bytes]:
    """``seng.step()`` on gradients averaged by hand."""
    model = network()
    seng = hvd.SENG(model, damping=LAM, coupling=coupling, sketch=None, uc="exact")
    loss_of(model, data(hvd.rank(), 0, 4 + hvd.rank())).backward()
    for k, p in enumerate(model.parameters()):
        p.grad.copy_(hvd.allreduce(p.grad, name=f"by hand {k}"))
    seng.step()
    directions = [flat_gradient(layer).numpy() for layer in seng.layers]
    seng.close()
    return directions, b"".join(d.tobytes() for d in directions)


def other_state_on_one_rank(due: bool) -> tuple[str, bytes]:
    """The error when only rank 0 has loaded a state; none when all are about to refresh."""
    model = network()
    seng = SENG(model, damping=LAM, update_freq=3, name=f"odd{due}")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
        preconditioner=seng)
    for step in range(3 if due else 2):
        optimizer.zero_grad()
        loss_of(model, data(hvd.rank(), step, 4)).backward()
        optimizer.step()
    state = seng.state_dict()
    seng.reset_state()
    if hvd.rank() == 0:
        seng.load_state_dict(state)
    optimizer.zero_grad()
    loss_of(model, data(hvd.rank(), 5, 4)).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), bits(model)
    return "", bits(model)
