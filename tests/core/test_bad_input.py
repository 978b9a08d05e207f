"""Any settings, shapes, orders and groups: what is accepted holds its promises, the rest is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_ext import checkpoints
from hvd_ext.buckets import Kind, TensorSpec, check_groups, plan_buckets, slice_sizes, split_groups
from hvd_ext.delay import DelayCompensated
from hvd_ext.header import pack_row, unpack_rows
from hvd_ext.powersgd import PowerSGD
from hvd_ext.seng import Settings
from hvd_ext.servers import owners, shares
from hvd_ext.servers.ownership import EVERY_RANK
from hvd_ext.topk import Layout, TopK
from hvd_ext.topk.wire import MessageError, check_messages

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=12)
KINDS = st.sampled_from([Kind("float32"), Kind("float64"), Kind("float16", group=1),
                         Kind("float32", route="topk"), Kind("float32", owner=2)])
ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.text(max_size=5),
                     st.floats(allow_nan=True), st.floats(0, 1), st.just([]), st.just(object()),
                     st.sampled_from(["exact", "sampled", "norm", "rank", "float32", "bfloat16"]))


@st.composite
def tensors(draw):
    return [TensorSpec(f"p{number}", shape, draw(st.sampled_from([2, 4, 8])), draw(KINDS))
            for number, shape in enumerate(draw(SHAPES))]


@st.composite
def grouped(draw):
    specs = draw(tensors())
    order = draw(st.permutations(range(len(specs))))
    cuts = sorted(draw(st.lists(st.integers(0, len(specs)), max_size=3)))
    groups = [list(order[a:b]) for a, b in zip([0, *cuts], cuts, strict=False)]
    return specs, draw(st.sampled_from([None, groups]))


@given(grouped(), st.integers(1, 4000))
def test_every_element_has_one_place(case, limit):
    specs, groups = case
    plan = plan_buckets(specs, bucket_bytes=limit, groups=groups)
    assert sorted(slot.index for bucket in plan for slot in bucket.slots) == list(range(len(specs)))
    for number, bucket in enumerate(plan):
        assert bucket.index == number
        assert {specs[slot.index].kind for slot in bucket.slots} == {bucket.kind}
        flat = np.full(bucket.numel, -1)
        for slot in bucket.slots:
            assert slot.numel == specs[slot.index].numel
            assert (slot.of(flat) == -1).all()
            slot.of(flat)[:] = slot.index
        assert (flat >= 0).all()
        if groups is None and len(bucket.slots) > 1:
            last = specs[bucket.slots[-1].index]
            assert bucket.numel * last.itemsize <= limit


@given(st.integers(0, 10**6), st.integers(1, 1024))
def test_slices_are_equal_but_for_one(count, parts):
    sizes = slice_sizes(count, parts)
    assert sum(sizes) == count
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(-2, 12), st.integers(0, 9))
def test_numbers_of_groups(groups, count):
    things = [object() for _ in range(count)]
    if groups < 0:
        with pytest.raises(ValueError, match="non-negative integer"):
            check_groups(groups, member=object, what="tensor")
        return
    check_groups(groups, member=object, what="tensor")
    found = split_groups(groups, things)
    if groups == 0:
        assert found is None
    else:
        assert [number for group in found for number in group] == list(range(count))
        assert len(found) == min(groups, count)


@given(st.lists(st.tuples(st.integers(0, 2**62 - 1), st.lists(st.floats(allow_nan=True), max_size=6)),
                min_size=1, max_size=8))
def test_rows_come_back_bit_for_bit(rows):
    digests, values = unpack_rows(np.concatenate([pack_row(*row) for row in rows]))
    assert digests == [digest for digest, _ in rows]
    for got, (_, sent) in zip(values, rows, strict=True):
        np.testing.assert_array_equal(np.array(got).view(np.int64), np.array(sent).view(np.int64))


@given(st.integers(1, 10**6), st.sampled_from(["float32", "float16", "bfloat16", "float64"]))
def test_messages_are_aligned_and_do_not_overlap(k, values):
    layout = Layout(k, values)
    size = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}[values]
    assert layout.indices.stop - layout.indices.start >= k
    assert layout.data.start >= layout.indices.stop
    assert layout.data.start % 2 == layout.words % 2 == 0
    assert 4 * (layout.data.stop - layout.data.start) >= k * size
    assert sum(layout.parts().values()) == 4 * layout.words


@given(st.lists(st.tuples(st.integers(-2, 9), st.integers(-2, 9)), min_size=1, max_size=4),
       st.integers(0, 200))
def test_messages_of_another_layout_are_refused(headers, words):
    layout = Layout(5, "float32")
    fine = words == len(headers) * layout.words and all(k == 5 and 0 <= n <= 5 for n, k in headers)
    if fine:
        assert check_messages(words, headers, layout, "b") == [n for n, _ in headers]
    else:
        with pytest.raises(MessageError, match="Give all ranks the same"):
            check_messages(words, headers, layout, "b")


@given(st.sampled_from(["replicated", "rank0", "sharded"]), st.lists(st.integers(0, 10**9), max_size=30),
       st.integers(1, 16))
def test_every_parameter_has_an_owner_and_none_has_too_much(server, numels, ranks):
    owned = owners(server, numels, ranks)
    assert all(owner == EVERY_RANK or 0 <= owner < ranks for owner in owned)
    held = shares(owned, numels, ranks)
    if server == "sharded" and numels:
        assert sum(held) == sum(numels)
        assert max(held) <= sum(numels) / ranks + max(numels)


@pytest.mark.parametrize(("settings", "given_first"), [
    (DelayCompensated, {}), (TopK, {}), (PowerSGD, {}), (Settings, {"damping": 0.1}),
])
@given(st.data())
def test_settings_are_taken_or_refused_at_construction(settings, given_first, data):
    from dataclasses import fields

    names = [one.name for one in fields(settings) if one.init]
    changes = data.draw(st.dictionaries(st.sampled_from(names), ANYTHING, max_size=3))
    refused = ""
    try:
        made = settings(**{**given_first, **changes})
    except (ValueError, TypeError) as error:
        refused = str(error)
    if refused:
        assert any(name in refused for name in changes), (changes, refused)
        return
    again = settings(**{one.name: getattr(made, one.name) for one in fields(made) if one.init})
    assert again == made


@given(st.binary(max_size=3000), st.integers(0, 2999), st.integers(1, 255))
def test_damage_to_a_file_is_seen(content, at, change):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update-1" / "shard"
        mark = checkpoints.write(path, lambda file: file.write(content))
        checkpoints.check(path, mark)
        data = bytearray(path.read_bytes())
        if data:
            data[at % len(data)] ^= change
        path.write_bytes(data or b"x")
        with pytest.raises(checkpoints.DamagedCheckpointError, match="shard"):
            checkpoints.check(path, mark)
