"""Any settings, shapes, orders and groups: what is accepted holds its promises, the rest is refused."""

from __future__ import annotations

import inspect
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_ext.async_ps import wire
from hvd_ext.async_ps.config import ServerSettings
from hvd_ext.async_ps.plan import Plan
from hvd_ext.checkpoint import files, protocol
from hvd_ext.consistency.wire import pack_row, unpack_rows
from hvd_ext.reducers.buckets import (
    BucketKey,
    TensorSpec,
    check_groups,
    plan_buckets,
    slice_sizes,
    split_groups,
)
from hvd_ext.reducers.delay_compensation import DelayCompensated
from hvd_ext.reducers.delay_compensation.engine import replay
from hvd_ext.reducers.delay_compensation.momentum import AutoMomentum
from hvd_ext.reducers.delay_compensation.sequences import Recorded
from hvd_ext.reducers.delay_compensation.update_rules import AsyncRule
from hvd_ext.reducers.powersgd import PowerSGD
from hvd_ext.reducers.topk import Layout, TopK
from hvd_ext.reducers.topk.wire import MessageError, check_messages
from hvd_ext.seng import Settings
from hvd_ext.sharding import owned_elements, plan_owners
from hvd_ext.sharding.ownership import EVERY_RANK
from tests.reference.async_sgd import trajectory

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=12)
KINDS = st.sampled_from([BucketKey("float32"), BucketKey("float64"), BucketKey("float16", group=1),
                         BucketKey("float32", route="topk"), BucketKey("float32", owner=2)])
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
            assert (slot.slice_of(flat) == -1).all()
            slot.slice_of(flat)[:] = slot.index
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
    assert sum(layout.bytes_by_kind().values()) == 4 * layout.words


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
    owned = plan_owners(server, numels, ranks)
    assert all(owner == EVERY_RANK or 0 <= owner < ranks for owner in owned)
    held = owned_elements(owned, numels, ranks)
    if server == "sharded" and numels:
        assert sum(held) == sum(numels)
        assert max(held) <= sum(numels) / ranks + max(numels)


@pytest.mark.parametrize(("settings", "given_first"), [
    (DelayCompensated, {}), (TopK, {}), (PowerSGD, {}), (Settings, {"damping": 0.1}),
])
@given(st.data())
def test_settings_are_taken_or_refused_at_construction(settings, given_first, data):
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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update-1" / "shard"
        mark = files.write_atomically(path, lambda file: file.write(content))
        files.check_digest(path, mark)
        data = bytearray(path.read_bytes())
        if data:
            data[at % len(data)] ^= change
        path.write_bytes(data or b"x")
        with pytest.raises(files.DamagedCheckpointError, match="shard"):
            files.check_digest(path, mark)


EXPECTED = {"front_end": "a", "optimizer": "b", "extensions": "c"}


def sealed(folder):
    """A checkpoint of two files."""
    there = files.checkpoint_dir(folder, 7)
    marks = {name: files.write_atomically(there / name, lambda file, name=name: file.write(name.encode() * 9))
             for name in ("model.pt", "rank0000.pt")}
    files.finalize_checkpoint(there, {**EXPECTED, "server": None, "format": 1, "step": 7, "ranks": 1}, marks,
                              run="r",
                              keep=1)
    return there


class Alone:
    """One rank."""

    rank, size = 0, 1

    def allgather_object(self, thing, name):
        return [thing]


def load(folder):
    """What a front end does: find, then read both files."""
    found = protocol.find_checkpoint(Alone(), folder, EXPECTED, reset_per_rank_state=False)
    return protocol.read_files(Alone(), found, ["model.pt", "rank0000.pt"],
                               lambda paths: [path.read_bytes() for path in paths.values()])


@given(st.sampled_from(["model.pt", "rank0000.pt", "manifest.json"]), st.data())
def test_any_changed_byte_or_cut_of_any_file_is_refused_by_its_name(name, data):
    with tempfile.TemporaryDirectory() as parent:
        path = sealed(Path(parent)) / name
        assert load(parent) == [b"model.pt" * 9, b"rank0000.pt" * 9]
        whole = path.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        changed = bytearray(whole)
        changed[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(data.draw(st.sampled_from([bytes(changed), whole[:at], whole + whole[: at + 1]])))
        with pytest.raises(files.DamagedCheckpointError, match=name):
            load(parent)
        path.write_bytes(whole)
        assert len(load(parent)) == 2


@given(ANYTHING, ANYTHING)
def test_steps_and_numbers_of_checkpoints_are_taken_or_refused(step, keep):
    with tempfile.TemporaryDirectory() as parent:
        def save():
            protocol.save_together(Alone(), parent, step, keep=keep,
                                   contents=lambda: protocol.CheckpointFiles(
                {"rank0000.pt": lambda file: file.write(b"x")}, {}))

        fine = all(type(one) is int for one in (step, keep)) and 0 <= step < 10**12 and keep >= 1
        if fine:
            save()
            assert files.latest_checkpoint(Path(parent)) == files.checkpoint_dir(Path(parent), step)
            return
        with pytest.raises((ValueError, TypeError), match=r"(step|keep) must be .*got"):
            save()
        assert not list(Path(parent).iterdir())


@given(st.integers(-1, 9), st.integers(-1, 9), st.integers(-1, 40))
def test_every_entry_has_one_server(size, servers, numel):
    if size < 2 or not 1 <= servers < size or numel < max(1, servers):
        with pytest.raises(ValueError, match="; "):  # what to do comes after it
            Plan(size, servers, numel)
        return
    plan = Plan(size, servers, numel)
    counts = np.zeros(numel, int)
    for part in plan.slices:
        counts[part] += 1
    assert (counts == 1).all()
    sizes = [part.stop - part.start for part in plan.slices]
    assert max(sizes) - min(sizes) <= 1
    assert [plan.rank(plan.worker_number(rank))
            for rank in range(servers, size)] == list(range(servers, size))


@given(st.dictionaries(st.sampled_from(wire.HEADER.names), st.integers(-2**63, 2**63 - 1)))
def test_headers_come_back(values):
    kind = values.pop("kind", 3)
    sent = wire.make_header(kind, **values)
    got = np.frombuffer(wire.header_bytes(sent).tobytes(), wire.HEADER)[0]
    assert got["kind"] == kind
    for name in set(wire.HEADER.names) - {"kind"}:
        assert got[name] == np.zeros(1, wire.HEADER)[name].dtype.type(values.get(name, 0))


@pytest.mark.parametrize(("settings", "given_first"), [
    (AsyncRule, {}), (ServerSettings, {"rule": AsyncRule(), "lr": 0.1}), (AutoMomentum, {}),
    (DelayCompensated, {}), (TopK, {}), (PowerSGD, {}), (Settings, {"damping": 0.1}),
])
@given(st.data())
def test_one_bad_setting_is_refused_with_its_value(settings, given_first, data):
    names = list(inspect.signature(settings).parameters)
    name = data.draw(st.sampled_from(names))
    value = data.draw(ANYTHING)
    try:
        made = settings(**{**given_first, name: value})
    except (ValueError, TypeError) as error:
        said = str(error)
        assert name in said or "rule" in said or "function" in said, (name, value, said)
        assert repr(value) in said or str(value) in said or f"{value:g}" in said, (name, value, said)
        assert any(word in said for word in ("must be", "needs", "pass", "give")), (name, value, said)
        return
    again = settings(**{name: getattr(made, name) for name in names})
    assert all(getattr(again, name) == getattr(made, name) for name in names)


@given(st.sampled_from(["asgd", "dc-asgd-c", "dc-asgd-a"]), st.floats(0, 4), st.floats(0, 0.99),
       st.floats(1e-3, 1.0), st.floats(0, 0.9), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_accepted_rules_reach_the_oracles_weights(name, lam, decay, eps, momentum, delays):
    taus = [min(tau, k) for k, tau in enumerate(delays)]
    rule = AsyncRule(name=name, lam=0.0 if name == "asgd" else lam, decay=decay, eps=eps)
    start = np.random.default_rng(0).normal(size=7)

    def gradient(w, k):
        return w * 0.5 + np.random.default_rng(k).normal(size=7)

    recorded = Recorded(taus, senders=[0] * len(taus), batches=list(range(len(taus))))
    reached = replay(gradient, start, steps=len(taus), delays=recorded, lr=0.05, momentum=momentum, rule=rule)
    expected = trajectory(gradient, start, taus, lr=0.05, momentum=momentum, rule=name, lam=rule.lam,
                          decay=decay, eps=eps)
    np.testing.assert_allclose(reached.weights, expected[-1], rtol=1e-10, atol=1e-12)


def test_a_window_longer_than_any_memory():
    with pytest.raises(ValueError, match="window must be in"):
        AutoMomentum(window=2**63)
