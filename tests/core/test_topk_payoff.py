"""The bandwidth model against counting by hand, and the command that shows it."""

from __future__ import annotations

import json
import math

import pytest

from hvd_ext.cli.main import main
from hvd_ext.topk import payoff
from hvd_ext.topk.payoff import Link

FREE = Link(10.0, latency_us=0.0, select_ns=0.0)


def test_bytes_of_each_exchange():
    found = payoff.costs(25_000_000, 64, 0.01, FREE)
    assert found["dense"].moved == 2 * 63 * 25_000_000 * 4 // 64
    assert found["fp16"].moved == found["dense"].moved // 2
    assert found["topk"].moved == 63 * (8 + 8 * 250_000)
    assert found["dense"].seconds == pytest.approx(found["dense"].moved * 8 / 10e9)
    assert payoff.costs(1000, 1, 0.01, FREE)["topk"].moved == 0


def test_two_ranks_move_two_percent_of_dense():
    found = payoff.costs(11_200_000, 2, 0.01, FREE)
    assert found["topk"].moved / found["dense"].moved == pytest.approx(0.02, rel=1e-3)


def test_a_sparse_allreduce_does_not_grow_with_the_ranks():
    few, many = (payoff.costs(25_000_000, ranks, 0.001, FREE)[payoff.SPARSE].moved for ranks in (16, 64))
    entries = 4 * 2 * 25_000
    assert few == pytest.approx(2 * 15 / 16 * entries, rel=0.07)
    assert many == pytest.approx(2 * 63 / 64 * entries, rel=0.14)  # what owners tell grows with the ranks
    gather = payoff.costs(25_000_000, 64, 0.001, FREE)["topk"].moved
    assert many < gather / 20


def test_auto_takes_the_quicker_exchange():
    def chosen(ranks, k, exchange="auto"):
        return payoff.chosen_exchange(exchange, ranks, k, "float32")

    assert chosen(1, 10**6, "sparse_allreduce") == "allgather"
    assert chosen(2, 10**6) == "allgather"  # as many bytes, more hops
    assert chosen(16, 10**6) == "sparse_allreduce"
    assert chosen(16, 100) == "allgather"  # hops count
    assert chosen(16, 100, "sparse_allreduce") == "sparse_allreduce"


@pytest.mark.parametrize(("ratio", "values"), [(0.01, "float32"), (0.02, "float16"), (0.001, "float64")])
@pytest.mark.parametrize(("name", "itemsize"), [("dense", 4), ("fp16", 2)])
def test_break_even_is_where_the_bytes_cross(ratio, values, name, itemsize):
    numel = 10_000_000
    ranks = payoff.break_even_ranks(ratio, itemsize, values)

    def saves(ranks):
        found = payoff.costs(numel, ranks, ratio, FREE, values=values)
        return found["topk"].moved < found[name].moved

    assert saves(ranks - 1)
    assert not saves(ranks + 1)
    at = payoff.break_even_ratio(ranks, itemsize, values)
    assert at == pytest.approx(ratio, rel=1 / ranks + 1e-9)


def test_one_over_ratio():
    assert payoff.break_even_ranks(0.01, 4) == 100
    assert payoff.break_even_ranks(0.001, 4) == 1000


def test_break_even_speed_is_where_the_seconds_cross():
    link = Link(10.0)
    speed = payoff.break_even_gbps(25_000_000, 16, 0.01, link, "dense")
    slower, faster = (payoff.costs(25_000_000, 16, 0.01, Link(speed * f)) for f in (0.99, 1.01))
    assert slower["topk"].seconds < slower["dense"].seconds
    assert faster["topk"].seconds > faster["dense"].seconds
    assert payoff.break_even_gbps(25_000_000, 200, 0.01, link, "dense") == 0.0
    assert math.isinf(payoff.break_even_gbps(25_000_000, 16, 0.01, FREE, "dense"))


def test_servers():
    assert payoff.moment_elements(1000, 4, "sharded", 3) == 750
    assert payoff.moment_elements(1000, 4, "rank0", 3) == 3000
    assert payoff.weight_bytes(1000, 4, "replicated") == 0
    assert payoff.weight_bytes(1000, 4, "rank0") == 4000
    assert payoff.weight_bytes(1000, 4, "sharded") == 3000


@pytest.mark.parametrize(("arguments", "said"), [
    ({"numel": 0}, "params must be at least 1"), ({"ranks": 0}, "ranks must be at least 1"),
    ({"ratio": 0}, r"ratio must be in \(0, 1\]"), ({"values": "int8"}, "values must be one of"),
])
def test_bad_arguments(arguments, said):
    good = {"numel": 1000, "ranks": 2, "ratio": 0.1, "link": FREE}
    with pytest.raises(ValueError, match=said):
        payoff.costs(**{**good, **arguments})
    with pytest.raises(ValueError, match="gbps must be in"):
        Link(0)


COMMAND = ["plan", "--params", "25e6", "--ranks", "64", "--gbps", "10", "--ratio", "0.01"]


def test_command(capsys):
    assert main([*COMMAND, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["exchange"]["topk"]["bytes"] == 63 * (8 + 8 * 250_000)
    assert figures["break_even_ranks"] == {"dense": 100, "fp16": 50}
    assert figures["best"] == "fp16"
    assert main(COMMAND) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Quickest here: fp16." in said
    assert "TopK moves fewer bytes below 100 ranks" in said
    assert main([*COMMAND[:-1], "1.5"]) == 1
    assert "pass ratio=0.01" in " ".join(capsys.readouterr().err.split())
    assert main(["plan", "--params", "0", "--ranks", "2", "--gbps", "1"]) == 1
