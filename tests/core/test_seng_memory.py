"""``memory=``: what is chosen fits, changes no more than it must, and says so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_ext.checks import check_bytes
from hvd_ext.seng import LayerShape, Settings, plan_layer
from hvd_ext.seng.memory import bytes_held, memory_text, within_memory

SHAPES = [LayerShape("norm", "LayerNorm", 128, 128, 1, product=False),
          LayerShape("small", "Linear", 64 * 65, 64, 65),
          LayerShape("large", "Conv2d", 512 * 4609, 512, 4609),
          LayerShape("grouped", "Conv2d", 8 * 16 * 72, 16, 72, groups=8)]


@pytest.mark.parametrize(("value", "meant"), [
    (1000, 1000), ("1000", 1000), ("500MB", 500_000_000), ("2 GiB", 2 * 2**30), ("1.5k", 1500),
    ("3mib", 3 * 2**20)])
def test_sizes(value, meant):
    assert check_bytes("memory", value) == meant


@pytest.mark.parametrize(("bad", "said"), [
    ({"memory": "lots"}, "memory must be a size of at least 1 byte, got 'lots'; pass a number of bytes"),
    ({"memory": 0}, "memory must be at least 1"), ({"memory": 1.5}, "whole number"),
    ({"memory": "0.1"}, "at least 1 byte"), ({"memory": True}, "whole number"),
    ({"memory": "1GB", "coupling": "full"}, "memory must be None with coupling=\"full\"")])
def test_bad_sizes(bad, said):
    with pytest.raises((TypeError, ValueError), match=said):
        Settings(damping=1.0, **bad)


def table_2(shapes, settings, samples, itemsize):
    """SENG Table 2's memory, written out again, with the small systems and the sampled rows' numbers."""
    total = 0
    for shape in shapes:
        if shape.product and shape.n >= settings.explicit_threshold:
            r = min(settings.rank, shape.n_g, shape.n_a)
            for rows in (shape.n_g, shape.n_a):
                sampled = settings.row_sketch if rows > settings.row_sketch else 0
                total += shape.groups * (rows + sampled) * r * samples * itemsize + 16 * sampled
        else:
            sampled = settings.sketch_size if shape.n > settings.sketch_size else 0
            total += (shape.n + sampled) * samples * itemsize + 16 * sampled
        total += 16 * samples**2
    return total


sides = st.integers(1, 600)
shapes = st.lists(st.builds(lambda g, a, groups: LayerShape("one", "Linear", g * a * groups, g, a, groups),
                            sides, sides, st.sampled_from([1, 1, 4])), min_size=1, max_size=5)


@given(shapes, st.integers(1, 10**9), st.sampled_from([None, 8, 300]), st.sampled_from([2, 16]))
def test_what_is_chosen_fits(layers, memory, subsample, rank):
    settings = Settings(damping=1.0, memory=memory, subsample=subsample, rank=rank)
    try:
        chosen = within_memory(layers, settings, 4)
    except ValueError:
        least = min(table_2(layers, Settings(damping=1.0, rank=1, explicit_threshold=threshold), 1, 4)
                    for threshold in {0, 700_000, *(one.n for one in layers)})
        assert least > memory
        return
    assert table_2(layers, chosen, chosen.subsample, 4) <= memory
    assert chosen.rank <= rank
    assert chosen.explicit_threshold <= settings.explicit_threshold
    assert subsample is None or chosen.subsample <= subsample


@given(shapes, st.sampled_from([2, 4, 8]))
def test_the_formula_is_table_2(layers, itemsize):
    settings = Settings(damping=1.0, explicit_threshold=5000, row_sketch=100, sketch_size=10_000)
    assert bytes_held(layers, settings, 7, itemsize) == table_2(layers, settings, 7, itemsize)


def test_without_memory_nothing_changes():
    settings = Settings(damping=1.0)
    assert within_memory(SHAPES, settings, 4) is settings


def test_much_memory_changes_nothing_but_leaves_all_samples():
    chosen = within_memory(SHAPES, Settings(damping=1.0, memory="100GB"), 4)
    assert (chosen.rank, chosen.explicit_threshold) == (16, 700_000)
    assert chosen.subsample > 1024


def test_large_layers_give_up_u_first_then_rank_then_samples():
    """As the budget shrinks: fewer layers with U itself, at rank 16; then the rank; then the samples."""
    order = []
    for memory in (200_000_000, 60_000_000, 20_000_000, 8_000_000, 2_000_000):
        chosen = within_memory(SHAPES, Settings(damping=1.0, memory=memory), 4)
        explicit = sum(not plan_layer(shape, chosen).implicit for shape in SHAPES)
        order.append((explicit, chosen.rank, min(chosen.subsample, 64)))
    assert order == sorted(order, reverse=True)
    assert order[0][1:] == (16, 64)
    assert order[-1][1:] < (16, 64)


def test_a_chosen_subsample_is_kept():
    chosen = within_memory(SHAPES, Settings(damping=1.0, memory="1GB", subsample=10), 4)
    assert (chosen.subsample, chosen.rank, chosen.explicit_threshold) == (10, 16, 700_000)


def test_half_precision_takes_half_of_u():
    settings = [Settings(damping=1.0, memory="20MB", curvature_dtype=dtype) for dtype in (None, "bfloat16")]
    whole, half = (within_memory(SHAPES, one, 4) for one in settings)
    assert (half.rank, half.subsample) > (whole.rank, whole.subsample)


def test_too_little_says_how_much():
    with pytest.raises(ValueError, match=r"at least [\d,]+ bytes, one sample's curvature") as said:
        within_memory(SHAPES, Settings(damping=1.0, memory=1000), 4)
    least = int(str(said.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert within_memory(SHAPES, Settings(damping=1.0, memory=least), 4).subsample == 1
    with pytest.raises(ValueError, match="memory must be"):
        within_memory(SHAPES, Settings(damping=1.0, memory=least - 1), 4)


def test_the_sentence():
    chosen = within_memory(SHAPES, Settings(damping=1.0, memory="20MB"), 4)
    text = memory_text(chosen, [plan_layer(shape, chosen) for shape in SHAPES])
    assert "memory='20MB'" in text
    assert f"rank {chosen.rank} for" in text
    assert f"at most {chosen.subsample} samples" in text
