"""Kernels against their equations in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hvd_ext.torch as hvd
from hvd_ext.torch.seng import kernels
from tests.reference import seng as reference
from tests.torch.per_sample import flat_gradient, held_u


@pytest.mark.parametrize("shape", [(5, 9, 7), (9, 5, 7), (4, 9, 30), (9, 4, 30), (3, 3, 2)])
def test_truncation_is_the_svd_of_the_smaller_factor(shape):
    n_g, n_a, kappa = shape
    torch.manual_seed(0)
    g, a = torch.randn(3, 2, kappa, n_g).double(), torch.randn(3, 2, kappa, n_a).double()
    cut_g, cut_a = kernels.truncate_rank(g, a, 3)
    if kappa <= 3:
        assert cut_g is g
        return
    g, a, cut_g, cut_a = g.mT, a.mT, cut_g.mT, cut_a.mT
    assert cut_g.shape[-1] == cut_a.shape[-1] == 3
    for i in range(3):
        for k in range(2):
            small, other = (g, a) if n_g <= n_a else (a, g)
            q, s, vt = np.linalg.svd(small[i, k].numpy(), full_matrices=False)
            left, right = q[:, :3] * s[:3], other[i, k].numpy() @ vt[:3].T
            wanted = left @ right.T if n_g <= n_a else right @ left.T
            np.testing.assert_allclose((cut_g[i, k] @ cut_a[i, k].T).numpy(), wanted, atol=1e-10)
            norms = torch.linalg.norm(cut_g[i, k] if n_g <= n_a else cut_a[i, k], dim=0)
            np.testing.assert_allclose(norms.numpy(), s[:3], atol=1e-10)
    assert (cut_a.sum(-2) >= 0).all()


def test_truncation_of_a_factor_of_lower_rank_and_of_zero():
    g = torch.zeros(1, 1, 4, 9)
    g[..., :1] = 1.0
    a = torch.randn(1, 1, 6, 9)
    cut_g, cut_a = kernels.truncate_rank(g.mT, a.mT, 3)
    torch.testing.assert_close(cut_g.mT @ cut_a, g @ a.mT)
    cut_g, cut_a = kernels.truncate_rank(torch.zeros_like(g).mT, a.mT, 3)
    assert torch.isfinite(cut_a).all()
    assert not (cut_g.mT @ cut_a).any()


def implicit_parts(rho=4, r=3, groups=2, n_g=5, n_a=6):
    torch.manual_seed(1)
    g = torch.randn(rho, groups, n_g, r).double()
    a = torch.randn(rho, groups, n_a, r).double()
    u = torch.matmul(g, a.mT).flatten(1)
    return kernels.samples_last(g.mT), kernels.samples_last(a.mT), u


def product(left, right):
    return left @ right.mT


def test_implicit_products_equal_the_dense_ones(monkeypatch):
    g, a, u = implicit_parts()
    z = torch.randn(2, 5, 6).double()
    c = torch.randn(4).double()
    torch.testing.assert_close(kernels.gram_implicit(g, a), u @ u.T)
    monkeypatch.setattr(kernels, "GRAM_BLOCK", 1)
    torch.testing.assert_close(kernels.gram_implicit(g, a), u @ u.T)
    torch.testing.assert_close(kernels.project_implicit(g, a, z), u @ z.flatten())
    torch.testing.assert_close(product(*kernels.exact_terms(g, a, c)).flatten(), u.T @ c)


def test_row_sketches_are_a_kronecker_product():
    """SENG eq. 19 and 21 equal ``(Omega_A kron Omega_G) u_i`` multiplied out."""
    g, a, u = implicit_parts(groups=1)
    rng = np.random.default_rng(0)
    omega_g, omega_a = (torch.from_numpy(rng.standard_normal(s)) for s in ((3, 5), (4, 6)))
    omega = torch.kron(omega_g, omega_a)  # for row-major vec of (n_G, n_A)
    z = torch.randn(1, 5, 6).double()
    xg, xa = (torch.einsum("qn,knri->kqri", *pair) for pair in ((omega_g, g), (omega_a, a)))
    torch.testing.assert_close(kernels.gram_implicit(xg, xa), (u @ omega.T) @ (omega @ u.T))
    torch.testing.assert_close(kernels.project_implicit(xg, xa, omega_g @ z @ omega_a.T),
                               (u @ omega.T) @ (omega @ z.flatten()))


def test_factored_product_of_zero_coefficients_is_zero():
    g, a, _ = implicit_parts()
    c = torch.zeros(4).double()
    left, right = kernels.factored_means(g, a, c, c.abs().sqrt().sum())
    assert not left.any()
    assert not right.any()


def test_half_precision_storage_is_summed_in_the_working_precision(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 7)
    torch.manual_seed(0)
    u = torch.randn(4, 30).bfloat16()
    z, b = torch.randn(30), torch.randn(4)
    exact = u.float()
    torch.testing.assert_close(kernels.gram_explicit(u), exact @ exact.T)
    torch.testing.assert_close(kernels.project_explicit(u, z), exact @ z)
    torch.testing.assert_close(kernels.expand_explicit(u, b, torch.empty(30)), exact.T @ b)
    gradient = z.clone()
    kernels.subtract_explicit(gradient, u, b, 0.5)
    torch.testing.assert_close(gradient, (z - exact.T @ b) / 0.5)


def test_factor_climbs_the_ladder_and_gives_up():
    rank_one = torch.ones(4, 4).double()
    lower, jitter = kernels.factor_gram(rank_one, 1e-3)
    assert jitter == 0.0
    torch.testing.assert_close(lower @ lower.T, rank_one + 1e-3 * torch.eye(4).double())
    lower, jitter = kernels.factor_gram(rank_one - 1e-5 * torch.eye(4).double(), 1e-9)
    assert jitter > 0.0
    assert torch.isfinite(lower).all()
    assert kernels.factor_gram(-torch.eye(4).double(), 1e-9)[0] is None
    assert kernels.factor_gram(torch.full((2, 2), float("nan")), 1.0)[0] is None


def small_problem(dtype=torch.float64):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    model.to(dtype)
    return model, torch.randn(6, 8, dtype=dtype), torch.randn(6, 3, dtype=dtype)


@pytest.mark.parametrize("sketch", ["uniform", "leverage"])
@pytest.mark.parametrize("replacement", [False, True])
def test_sketched_explicit_direction_solves_the_sketched_problem(sketch, replacement):
    model, x, y = small_problem()
    seng = hvd.SENG(model, damping=0.2, sketch=sketch, sketch_size=25, replacement=replacement)
    (model(x) - y).square().sum(1).mean().backward()
    g = [flat_gradient(layer).numpy() for layer in seng.layers]
    seng.step()
    for layer, gradient in zip(seng.layers, g, strict=True):
        u = held_u(seng, layer).numpy()
        omega, start, row = np.zeros((25, len(gradient))), 0, 0
        for block in seng.state.systems[layer].blocks:
            for place, weight in zip(block.rows.tolist(), block.weights.tolist(), strict=True):
                omega[row, start + place] = weight
                row += 1
            start += block.u.shape[1]
        assert row == 25
        np.testing.assert_allclose(
            flat_gradient(layer).numpy(), reference.sketched_direction(u, gradient, 0.2, omega),
            rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("sketch", ["uniform", "leverage"])
def test_sketched_implicit_direction_uses_the_rows_of_the_factors(sketch):
    model, x, y = small_problem()
    seng = hvd.SENG(model, damping=0.2, sketch=sketch, row_sketch=5, explicit_threshold=0,
                    uc="exact")
    (model(x) - y).square().sum(1).mean().backward()
    g = [flat_gradient(layer) for layer in seng.layers]
    seng.step()
    for layer, gradient in zip(seng.layers, g, strict=True):
        block = seng.state.systems[layer].blocks[0]
        n_g, n_a = block.g.shape[1], block.a.shape[1]
        omega_g, omega_a = np.eye(n_g), np.zeros((5, n_a))
        omega_a[np.arange(5), block.rows_a] = block.weights_a
        if n_g > 5:
            omega_g = np.zeros((5, n_g))
            omega_g[np.arange(5), block.rows_g] = block.weights_g
        # Bring [weight, bias] into the row-major order of (n_G, n_A).
        order = np.concatenate([
            np.arange(n_g * (n_a - 1)).reshape(n_g, n_a - 1),
            n_g * (n_a - 1) + np.arange(n_g)[:, None]], 1).ravel()
        u = held_u(seng, layer).numpy()[order]
        wanted = reference.sketched_direction(u, gradient.numpy()[order], 0.2,
                                              np.kron(omega_g, omega_a))
        np.testing.assert_allclose(flat_gradient(layer).numpy()[order], wanted, rtol=1e-6,
                                   atol=1e-9)


def test_all_finite_looks_at_every_kind_of_tensor():
    fine = [torch.randn(3), torch.randn(3).bfloat16(), torch.randn(2).double(), torch.zeros(0),
            torch.tensor([1, 2]), torch.full((3,), 6e4).half(), torch.full((3,), 1e30),
            torch.eye(2).to_sparse(), torch.randn(2, 3).t()]
    assert kernels.all_finite(fine)
    assert kernels.all_finite([])
    for bad in (torch.tensor([1.0, float("nan")]), torch.tensor([float("-inf")]).bfloat16(),
                (torch.eye(2) * float("inf")).to_sparse()):
        assert not kernels.all_finite([*fine, bad])


def test_factors_of_several_systems_are_those_of_each():
    torch.manual_seed(0)
    roots = torch.randn(4, 5, 3).double()
    grams = roots @ roots.mT
    grams[1] = -torch.eye(5)
    grams[2, 0, 0] = float("nan")
    grams[3] = torch.ones(5, 5) - 1e-5 * torch.eye(5)
    lower, jitters, good = kernels.factor_all(grams, 1e-9)
    assert good == [True, False, False, True]
    assert jitters[0] == 0.0 < jitters[3]
    for k in (0, 3):
        assert torch.equal(lower[k], kernels.factor_gram(grams[k], 1e-9)[0])
    rhs = torch.randn(2, 5).double()
    for k, b in zip((0, 3), kernels.solve_system(lower[[0, 3]], rhs), strict=True):
        shifted = grams[k] + (1e-9 + jitters[k]) * torch.eye(5).double()
        torch.testing.assert_close(shifted @ b, rhs[0 if k == 0 else 1], rtol=1e-5, atol=1e-5)


def test_rows_of_one_tensor_are_joined_without_a_copy():
    whole = torch.randn(3, 4, 2)
    assert kernels.stack_as_view(whole.unbind()).data_ptr() == whole.data_ptr()
    for parts in (whole.unbind()[::-1], whole.unbind()[:2], [one.clone() for one in whole]):
        found = kernels.stack_as_view(parts)
        assert torch.equal(found, torch.stack(list(parts)))
        assert found.data_ptr() != whole.data_ptr()
