"""What the digits examples of both front ends print."""

from __future__ import annotations

import pytest

from examples.digits_run import describe, parse


@pytest.mark.parametrize(("options", "label"), [
    ([], "op=average, 2 workers"),
    (["--op", "delay"], "op=delay, 2 workers"),
    (["--op", "adasum", "--server", "replicated"], "op=adasum, server=replicated, 2 workers"),
    (["--compression", "fp16"], "op=average, compression=fp16, 2 workers"),
    (["--compression", "topk", "--ratio", "0.05"], "op=average, compression=topk(0.05), 2 workers"),
    (["--preconditioner", "seng"], "op=average, preconditioner=seng, 2 workers"),
    (["--compression", "topk", "--preconditioner", "seng", "--server", "sharded"],
     "op=average, compression=topk(0.01), preconditioner=seng, server=sharded, 2 workers"),
])
def test_the_title_tells_methods_apart(options: list[str], label: str) -> None:
    assert describe(parse("torch_digits", None, options), workers=2) == label
