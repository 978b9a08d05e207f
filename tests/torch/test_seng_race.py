"""The race runs, keeps its rules, and its profile is the one that AlgoPerf defines."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.seng_race import __main__ as race
from benchmarks.seng_race import additions, data, results, runs
from benchmarks.seng_race.additions import ADDITIONS
from benchmarks.seng_race.methods import METHODS
from benchmarks.seng_race.workloads import WORKLOADS, squared_error


def test_a_quick_race_writes_what_it_says(tmp_path):
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    arguments = ["--quick", "--workloads", "regression", "--methods", "SGD", "SENG, every step"]
    result = race.main([*arguments, *files])
    assert [one["method"] for one in result["contests"]] == ["SGD", "SENG, every step"]
    assert json.loads((tmp_path / "out.json").read_text())["contests"] == result["contests"]
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_learns_and_repeats_itself(name):
    workload = replace(WORKLOADS[name], steps=30, every=10)
    first, again = (runs.run(METHODS["AdamW"], {"lr": 2e-3}, workload, 1, 1e3) for _ in range(2))
    assert first["ended"] == "steps used up"
    assert first["value"] == again["value"] < workload.make(1).value()


@pytest.mark.parametrize("name", [*METHODS, *ADDITIONS])
def test_every_method_takes_steps(name):
    method = runs.find_method(name)
    if method.needs:
        pytest.importorskip(method.needs)
    workload = replace(WORKLOADS["regression"], steps=20)
    found = runs.run(method, runs.trials(method, 1)[0], workload, 0, 1e3)
    assert found["value"] < workload.make(0).value()


@pytest.mark.parametrize("name", [name for name in ADDITIONS if name not in METHODS])
def test_every_addition_changes_the_run(name):
    workload = replace(WORKLOADS["regression"], steps=60)
    values = {"rate": 1.0, "lr": 0.3, "damping": 0.3}  # lr is rate times damping
    plain, added = (runs.run(method, values, workload, 0, 1e3)["value"]
                    for method in (METHODS["SENG, every 10"], ADDITIONS[name]))
    assert added != plain


def test_clipping_shortens_a_step_to_its_limit():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    x, y = torch.randn(20, 5), torch.randn(20, 3)
    directions = []
    for start in (additions.clipped, METHODS["SENG, every step"].start):
        model.zero_grad()
        _, precondition = start(model, {"rate": 10.0, "damping": 0.3}, {"explicit_threshold": 0})
        squared_error(model(x), y).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
        precondition(0.0, None)
        directions.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    clipped, plain = directions
    assert 9.0 * float(gradient @ plain) > additions.CLIP
    shortened = float(clipped @ plain / (plain @ plain))
    torch.testing.assert_close(clipped, shortened * plain)
    assert shortened ** 2 * 9.0 * float(gradient @ plain) == pytest.approx(additions.CLIP, rel=1e-4)


def drawn(output, loss, seed):
    """The loss's gradients by the outputs, for labels of the model's own distribution."""
    rng = torch.Generator().manual_seed(seed)
    if loss is squared_error:
        return torch.randn(output.shape, dtype=output.dtype, generator=rng)
    probabilities = output.softmax(1)
    labels = probabilities.multinomial(1, generator=rng).squeeze(1)
    return probabilities - torch.eye(output.shape[1], dtype=output.dtype)[labels]


@pytest.mark.parametrize("loss", [squared_error, torch.nn.functional.cross_entropy])
def test_kfac_solves_with_the_damped_kronecker_product(loss):
    pytest.importorskip(METHODS["K-FAC"].needs)
    from benchmarks.seng_race import kfac

    torch.manual_seed(0)
    model, lam = torch.nn.Linear(5, 3).double(), 0.05
    x = torch.randn(2, 40, 5, dtype=torch.float64)
    y = torch.randn(2, 40, 3).double() if loss is squared_error else torch.randint(3, (2, 40))
    method = kfac.KFAC(model, loss, damping=lam)
    ones = torch.ones(40, 1, dtype=torch.float64)
    inputs, outputs = torch.zeros(6, 6).double(), torch.zeros(3, 3).double()
    for number in range(2 * kfac.EVERY):
        refresh, late = divmod(number, kfac.EVERY)
        if late == 0:  # the mean of the factors of one batch, then of two
            a, g = torch.cat([x[refresh], ones], 1), drawn(model(x[refresh]).detach(), loss, refresh + 1)
            inputs += (a.T @ a / 40 - inputs) / (refresh + 1)
            outputs += (g.T @ g / 40 - outputs) / (refresh + 1)
        model.zero_grad()
        loss(model(x[refresh]), y[refresh]).backward()
        gradient = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
        method.step(x[refresh], y[refresh])
        direction = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
        pi = math.sqrt(inputs.trace() / 6 / (outputs.trace() / 3))
        damped = torch.kron(outputs + math.sqrt(lam) / pi * torch.eye(3),
                            inputs + math.sqrt(lam) * pi * torch.eye(6))
        torch.testing.assert_close(damped @ direction.flatten(), gradient.flatten())
        with torch.no_grad():
            model.weight.add_(0.1 * torch.randn(3, 5))


@pytest.mark.parametrize("name", WORKLOADS)
def test_kfac_takes_every_layer_with_a_matrix_and_leaves_no_trace(name):
    pytest.importorskip(METHODS["K-FAC"].needs)
    from benchmarks.seng_race import kfac

    problem = WORKLOADS[name].make(0)
    x, y = problem.draw(np.random.default_rng(0))
    method = kfac.KFAC(problem.model, problem.loss, damping=0.1)
    torch.testing.assert_close(method.twin(x), problem.model(x))
    problem.loss(problem.model(x), y).backward()
    before = {key: one.clone() for key, one in problem.model.state_dict().items()}
    gradients = {key: p.grad.clone() for key, p in problem.model.named_parameters()}
    method.step(x, y)
    torch.testing.assert_close(problem.model.state_dict(), before, rtol=0, atol=0)
    left = {key for key, p in problem.model.named_parameters() if p.grad.equal(gradients[key])}
    assert left == {key for key in gradients if "norm" in key or key in ("positions", "characters.weight")
                    or (name == "convolutions" and key.split(".")[0] in ("1", "4", "7"))}


@pytest.mark.parametrize("name", WORKLOADS)
def test_kfac_learns_on_every_workload(name):
    pytest.importorskip(METHODS["K-FAC"].needs)
    workload = replace(WORKLOADS[name], steps=30, every=10)
    values = {"rate": 0.1, "damping": 0.1}
    first, again = (runs.run(METHODS["K-FAC"], values, workload, 1, 1e3) for _ in range(2))
    assert first["ended"] == "steps used up"
    assert first["value"] == again["value"] < workload.make(1).value()


@pytest.mark.filterwarnings("ignore:Failed to compute Cholesky")
def test_kfac_that_diverges_ends_as_that():
    pytest.importorskip(METHODS["K-FAC"].needs)
    values = {"rate": 1e3, "damping": 1.0}
    over = runs.run(METHODS["K-FAC"], values, replace(WORKLOADS["autoencoder"], every=100), 0, 1e3)
    assert (over["ended"], over["seconds"]) == ("diverged", None)


def test_kfac_says_which_losses_it_takes():
    pytest.importorskip(METHODS["K-FAC"].needs)
    from benchmarks.seng_race import kfac

    with pytest.raises(ValueError, match="squared_error and cross_entropy"):
        kfac.KFAC(torch.nn.Linear(2, 1), torch.nn.functional.l1_loss, damping=0.1)


def test_trials_are_spread_over_the_space():
    tried = runs.trials(METHODS["SENG, every step"], 5)
    for setting, (low, high) in METHODS["SENG, every step"].space.items():
        places = sorted(math.log(one[setting] / low) / math.log(high / low) for one in tried)
        assert 0 <= places[0] < 0.4 < 0.6 < places[-1] <= 1
    assert tried == runs.trials(METHODS["SENG, every step"], 5)


def test_a_run_ends_at_its_target_or_says_why_not():
    workload = WORKLOADS["regression"]
    start = workload.make(0).value()
    assert runs.run(METHODS["SGD"], {"lr": 0.1}, replace(workload, target=2 * start), 0, 1e3)["steps"] == 10
    over = runs.run(METHODS["SGD"], {"lr": 1e6}, workload, 0, 1e3)
    assert (over["ended"], over["seconds"]) == ("diverged", None)
    assert runs.run(METHODS["SGD"], {"lr": 1e-3}, workload, 0, 1e-9)["ended"] == "time used up"


def test_the_profile():
    times = {("a", "SGD"): 1.0, ("a", "SENG"): 2.5, ("b", "SGD"): None, ("b", "SENG"): 3.0}
    found = [{"workload": workload, "method": method, "seconds": seconds}
             for (workload, method), seconds in times.items()]
    curves = results.profile(found)
    assert curves["SGD"] == ([1.0, math.inf], 0.5)
    taus = np.linspace(1.0, 4.0, 300_001)
    area = np.mean([np.mean(np.array([1.0, 2.5]) <= tau) for tau in taus[::100]])
    assert curves["SENG"][0] == [1.0, 2.5]
    assert curves["SENG"][1] == pytest.approx(area, abs=1e-3)


def test_the_drawn_digits_are_scaled_and_all_kinds_are_in_both_parts():
    digits = data.drawn_digits()
    assert (digits.x.shape, digits.held_out_x.shape) == ((5600, 1, 32, 32), (794, 1, 32, 32))
    assert abs(float(digits.x.mean())) < 1e-4
    assert abs(float(digits.x.std()) - 1.0) < 1e-4
    assert set(digits.y) == set(digits.held_out_y) == set(range(10))
