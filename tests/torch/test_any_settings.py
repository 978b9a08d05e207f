"""Settings that are accepted, drawn at random: what the kernels compute with them is the oracle's."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_ext.reducers.buckets import BucketKey, TensorSpec, plan_buckets
from hvd_ext.reducers.delay_compensation import DelayCompensated
from hvd_ext.reducers.topk import Layout, TopK
from hvd_ext.reducers.topk.plan import plan_segments
from hvd_ext.torch.reducers.kernels.delay_compensation import Recursion, compensated_sum
from hvd_ext.torch.reducers.kernels.topk import add_up, pack_message, read_headers, select_entries, wire_dtype
from tests.reference.delay_compensation import DelayOracle


@settings(max_examples=60)
@given(st.floats(0, 3), st.booleans(), st.floats(0, 0.99), st.floats(1e-4, 1), st.booleans(),
       st.integers(1, 5), st.integers(0, 300), st.floats(1e-3, 0.5))
def test_delay_compensation(lam, adaptive, decay, eps, cumulative, workers, length, lr):
    made = DelayCompensated(lam, adaptive=adaptive, decay=decay, eps=eps, order="rank",
                            displacement="cumulative" if cumulative else "local")
    oracle = DelayOracle(lam=lam, adaptive=adaptive, decay=decay, eps=eps, order="rank",
                         displacement=made.displacement)
    rule = Recursion(step=lr / workers, lam=made.lam, adaptive=made.keeps_mean_square, decay=made.decay,
                     eps=made.eps, cumulative=made.displacement == "cumulative")
    rng = np.random.default_rng(length)
    square = torch.zeros(length, dtype=torch.float64) if made.keeps_mean_square else None
    for _ in range(2):
        rows = [rng.normal(size=length) for _ in range(workers)]
        if workers == 1:
            continue  # one worker is plain SGD, and the kernel is not called
        out = torch.empty(length, dtype=torch.float64)
        compensated_sum([torch.from_numpy(row) for row in rows], rule, square, out)
        np.testing.assert_allclose(out.numpy() / workers, oracle.reduce(rows, lr), rtol=1e-9, atol=1e-12)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.floats(1e-4, 1), st.booleans(),
       st.sampled_from(["float32", "float64", "bfloat16", "float16"]), st.integers(1, 4), st.integers(0, 3))
def test_topk(sizes, ratio, per_tensor, values, ranks, zeros):
    """Each rank's largest entries, rounded as they travel; equals by lowest position, zeros never."""
    made = TopK(ratio, per_tensor=per_tensor, values=values, min_size=0)
    tensors = [TensorSpec(f"p{n}", (size,), 8, BucketKey("float64")) for n, size in enumerate(sizes)]
    bucket = plan_buckets(tensors, bucket_bytes=1 << 20)[0]
    if not bucket.numel:
        return
    rng = np.random.default_rng(sum(sizes))
    messages, expected = [], np.zeros(bucket.numel)
    parts = plan_segments(bucket, made.ratio_at(0), per_tensor=made.per_tensor)
    layout = Layout(sum(part.k for part in parts), values)
    for _ in range(ranks):
        flat = rng.integers(-9, 10, size=bucket.numel) / 8  # many equals and zeros, exact in every dtype
        flat[: zeros * 4] = 0.0
        tensor = torch.from_numpy(flat)
        chosen = select_entries(tensor, parts, made, (0,))
        wanted = [part.offset + int(position) for part in parts
                  for position in sorted(np.lexsort((
                      np.arange(part.numel), -abs(flat[part.offset:part.offset + part.numel])))[:part.k])
                  if flat[part.offset + position] != 0]
        assert chosen.tolist() == sorted(wanted)
        messages.append(pack_message(chosen, tensor[chosen].to(wire_dtype(made)), layout))
        expected[wanted] += flat[wanted]
    together = torch.cat(messages)
    counts = [int(row[0]) for row in read_headers(together, ranks)]
    total = torch.zeros(bucket.numel, dtype=torch.float64)
    add_up(together, counts, layout, wire_dtype(made), total)
    np.testing.assert_array_equal(total.numpy(), expected)
