"""``resample="step"`` in PyTorch: other rows at every step, the same U (SENG Algorithm 1)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.seng import sample_rows, seeded_generator
from tests.reference import seng as reference
from tests.torch.per_sample import flat_gradient, held_u
from tests.torch.small import LAM, batch, loss_of, network


def omega(n, q, step, label):
    """The dense matrix of the rows that step draws."""
    rows, weights = sample_rows(n, q, seeded_generator(0, step, label))
    matrix = np.zeros((q, n))
    matrix[np.arange(q), rows] = weights
    return matrix


def test_each_step_solves_its_own_sketched_problem():
    model = network(torch.float64)
    seng = hvd.SENG(model, damping=LAM, update_freq=3, sketch_size=40, resample="step")
    sampled, matrices = 0, {}
    for step in range(5):
        model.zero_grad()
        loss_of(model, batch(step)).backward()
        g = [flat_gradient(layer).numpy() for layer in seng.layers]
        seng.step()
        for layer, gradient in zip(seng.layers, g, strict=True):
            n, u = len(gradient), held_u(seng, layer).numpy()
            assert seng.state.systems[layer].step == 3 * (step // 3)
            if n <= 40:
                wanted = reference.direction(u, gradient, LAM)
            else:
                matrix = matrices[step, layer] = omega(n, 40, step, f"{layer.name}/rows")
                wanted = reference.sketched_direction(u, gradient, LAM, matrix)
                sampled += 1
            np.testing.assert_allclose(flat_gradient(layer).numpy(), wanted, rtol=1e-7, atol=1e-10)
    assert sampled >= 10
    assert all(not np.array_equal(matrix, matrices[step - 1, layer])
               for (step, layer), matrix in matrices.items() if step)


def test_rows_of_factors_are_drawn_anew():
    model = network(torch.float64)
    seng = hvd.SENG(model, damping=LAM, update_freq=10, explicit_threshold=0, row_sketch=5, rank=4,
                    resample="step")
    rows = []
    for step in range(3):
        model.zero_grad()
        loss_of(model, batch(step)).backward()
        seng.step()
        blocks = [block for layer in seng.layers for block in seng.state.systems[layer].blocks]
        rows.append([block.rows_a.tolist() for block in blocks if getattr(block, "rows_a", None) is not None])
    assert rows[0]
    assert rows[0] != rows[1] != rows[2]
    assert {system.step for system in seng.state.systems.values()} == {0}


@pytest.mark.parametrize("coupling", ["block", "lagged"])
def test_a_sketch_of_all_rows_changes_nothing(coupling):
    """Rows in their order at weight 1 are no sketch: every step is that of resample="refresh"."""
    directions = []
    for redraw in ("refresh", "step"):
        model = network(torch.float64)
        largest = max(layer.shape.n for layer in hvd.SENG(model, damping=LAM).layers)
        seng = hvd.SENG(model, damping=LAM, update_freq=10, sketch_size=largest, resample=redraw,
                        coupling=coupling)
        for step in range(3):
            model.zero_grad()
            loss_of(model, batch(step)).backward()
            seng.step()
        directions.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*directions, strict=True))


def test_rows_without_a_factor_are_not_taken():
    model = network(torch.float64)
    seng = hvd.SENG(model, damping=LAM, update_freq=10, sketch_size=40, resample="step")
    loss_of(model, batch(0)).backward()
    seng.step()
    kept = {layer: system.lower for layer, system in seng.state.systems.items()}
    for system in seng.state.systems.values():
        for block in system.blocks:
            block.u = block.u * float("nan")
    model.zero_grad()
    loss_of(model, batch(1)).backward()
    seng.step()
    assert all(seng.state.systems[layer].lower is lower for layer, lower in kept.items())
