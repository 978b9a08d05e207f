"""Selection against a sort, feedback bit for bit, at all sizes, with ties, zeros and heavy tails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvd_ext.reducers.topk import Layout, TopK, keep_count
from hvd_ext.reducers.topk.plan import Segment
from hvd_ext.reducers.topk.selection import MIN_SAMPLED_NUMEL
from hvd_ext.torch.reducers.kernels import topk as kernels
from tests.reference.spars_ams import top_k

LARGE = 4 * MIN_SAMPLED_NUMEL


def whole(flat, ratio):
    return [Segment(0, flat.numel(), keep_count(flat.numel(), ratio))]


def sorted_choice(flat, k):
    """The oracle's rule by NumPy's stable sort, for sizes at which the oracle's own is slow."""
    magnitude = np.abs(flat.numpy())
    chosen = np.argsort(-magnitude, kind="stable")[:k]
    return np.sort(chosen[magnitude[chosen] > 0])


FLATS = {
    "normal": lambda g: torch.randn(LARGE, generator=g),
    "heavy tails": lambda g: torch.randn(LARGE, generator=g) ** 9,
    "few values": lambda g: torch.randint(-3, 4, (LARGE,), generator=g).float(),
    "all alike": lambda g: torch.ones(LARGE),
    "mostly zeros": lambda g: (torch.rand(LARGE, generator=g) < 0.004).float()
    * torch.randn(LARGE, generator=g),
    "all zeros": lambda g: torch.zeros(LARGE),
    "one": lambda g: torch.eye(1, LARGE)[0],
    "large ones together": lambda g: torch.linspace(0, 1, LARGE) ** 4,
    "double": lambda g: torch.randn(LARGE, generator=g, dtype=torch.float64),
}


@pytest.mark.parametrize("name", FLATS)
@pytest.mark.parametrize("ratio", [1e-5, 0.001, 0.01, 0.2, 0.6, 1.0])
def test_exact_selection_is_what_a_sort_gives(name, ratio):
    flat = FLATS[name](torch.Generator().manual_seed(1))
    k = keep_count(flat.numel(), ratio)
    expected = sorted_choice(flat, k)
    for seed in range(3):
        chosen = kernels.select_entries(flat, whole(flat, ratio), TopK(), (seed,))
        np.testing.assert_array_equal(chosen.numpy(), expected)


@pytest.mark.parametrize("numel", [1, 2, 3, 17, 500])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
def test_small_tensors_against_the_oracle(numel, ratio):
    generator = torch.Generator().manual_seed(numel)
    for flat in (torch.randn(numel, generator=generator),
                 torch.randint(-2, 3, (numel,), generator=generator).float()):
        chosen = kernels.select_entries(flat, whole(flat, ratio), TopK(), (0,))
        np.testing.assert_array_equal(chosen.numpy(), top_k(flat.numpy(), keep_count(numel, ratio)))


@pytest.mark.parametrize("name", FLATS)
def test_sampled_selection_stays_within_its_tolerance(name):
    flat = FLATS[name](torch.Generator().manual_seed(2))
    k = keep_count(flat.numel(), 0.01)
    config = TopK(selection="sampled", tolerance=0.05)
    nonzero = int((flat != 0).sum())
    for seed in range(5):
        chosen = kernels.select_entries(flat, whole(flat, 0.01), config, (seed,))
        again = kernels.select_entries(flat, whole(flat, 0.01), config, (seed,))
        assert torch.equal(chosen, again)
        assert min(nonzero, 0.95 * k) <= chosen.numel() <= k
        assert torch.equal(chosen, chosen.unique())
        if chosen.numel():
            left = flat.abs().clone()
            left[chosen] = 0
            assert left.max() <= flat[chosen].abs().min()


def test_segments_are_chosen_from_one_by_one():
    flat = torch.tensor([1.0, 2.0, 3.0, 40.0, 50.0, 60.0])
    pieces = [Segment(0, 3, 1), Segment(3, 3, 2)]
    assert kernels.select_entries(flat, pieces, TopK(), (0,)).tolist() == [2, 4, 5]


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stays_and_what_goes_are_what_was(values, scale, dtype):
    generator = torch.Generator().manual_seed(3)
    total = torch.randn(5000, generator=generator, dtype=dtype) * scale
    total = total.clamp(-3e38, 3e38)
    before = total.clone()
    positions = kernels.select_entries(total, whole(total, 0.1), TopK(values=values), (0,))
    sent = kernels.split_selected(total, positions, getattr(torch, values))
    assert sent.dtype == getattr(torch, values)
    assert bool(sent.isfinite().all())
    whole_again = total.clone()
    whole_again[positions] += sent.to(dtype)
    assert torch.equal(whole_again, before)
    if values == "float32" and dtype == torch.float32:
        assert not bool(total[positions].any())


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLATS)
def test_a_gpu_gives_the_bits_of_the_cpu(name):
    total = FLATS[name](torch.Generator().manual_seed(4))
    config, pieces = TopK(values="bfloat16"), whole(total, 0.01)
    layout = Layout(pieces[0].k, config.values)
    results = []
    for device in ("cpu", "cuda"):
        flat = total.to(device)
        positions = kernels.select_entries(flat, pieces, config, (0,))
        values = kernels.split_selected(flat, positions, torch.bfloat16)
        messages = torch.cat([kernels.pack_message(positions, values, layout)] * 3)
        mean = torch.zeros_like(flat)
        counts = [header[0] for header in kernels.read_headers(messages, 3)]
        kernels.add_up(messages, counts, layout, torch.bfloat16, mean)
        results.append((positions.cpu(), flat.cpu(), messages.cpu(), mean.cpu()))
    for cpu, cuda in zip(*results, strict=True):
        assert torch.equal(cpu, cuda)


@pytest.mark.parametrize("name", FLATS)
@pytest.mark.parametrize("ratio", [1e-5, 0.01, 0.6])
def test_a_device_of_its_own_takes_the_same_of_equals(name, ratio):
    """What is done where the host must not wait for numbers, against what is done on a CPU."""
    flat = FLATS[name](torch.Generator().manual_seed(1)).abs()
    k = keep_count(flat.numel(), ratio)
    least = torch.topk(flat, k, sorted=False).values.min()
    keep = kernels._with_equals(flat > least, flat, least, k)
    assert torch.equal(keep.nonzero().flatten(), kernels.select_largest(flat, k))
