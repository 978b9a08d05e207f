"""The extensions that the suite tests, as either front end is given them, each with its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hvd_ext.reducers.topk import warm_up
from tests.conformance import references as ref
from tests.conformance.references import Tensors
from tests.reference.delay_compensation import DelayOracle

Options = Callable[[Any], dict[str, Any]]  # the front end's module -> arguments of DistributedOptimizer
Reference = Callable[[int, Tensors], ref.Reduce]  # ranks, tensors -> the reduction of a step
FALLING = warm_up(0.05, 6, 0.5)
SKIPPED, SPREADS, ERROR = "skipped", "spreads", "error"


@dataclass(frozen=True)
class Method:
    """An extension.

    Attributes:
        options: the arguments, from the front end's module.
        reference: its reduction in float64; None where the step cannot be told from the gradients alone.
        other: arguments that disagree with ``options``.
        optimizer: the wrapped one: "sgd" (without momentum), "momentum" or "amsgrad".
        late: whether updates come one step late.
        bad: what a gradient that is not finite does: the step is ``SKIPPED`` by all ranks, it ``SPREADS`` to
            the weights of all ranks as under an allreduce, or all ranks get an ``ERROR``.
        network: whether it needs layers: SENG.
        tolerance: of weights against the reference, relative and absolute. In TensorFlow Keras has eps, and
            Horovod the factor 1/M, in single precision.
        bytes: kind -> bytes that one rank sends at a step of float32, from ranks and tensors.
    """

    options: Options
    reference: Reference | None
    other: Options | None = None
    optimizer: str = "momentum"
    late: bool = False
    bad: str = SPREADS
    network: bool = False
    tolerance: float = 1e-7
    bytes: Callable[[int, Tensors], dict[str, float]] | None = None


def _topk(ratio: Any = 0.1, **settings: Any) -> Options:
    return lambda hvd: {"compression": hvd.Compression.topk(
        ratio, **{"min_size": 0, "values": "float64", **settings})}


def _powersgd(rank: int = 2, **settings: Any) -> Options:
    return lambda hvd: {"compression": hvd.Compression.powersgd(
        rank=rank, **{"min_compression": 1.0, **settings})}


def _delay(**settings: Any) -> Options:
    return lambda hvd: {"op": hvd.DelayCompensated(**settings)}


def _both(*options: Options) -> Options:
    return lambda hvd: {key: value for one in options for key, value in one(hvd).items()}


def _server(kind: str, downlink: Options | None = None) -> Options:
    return lambda hvd: {"server": kind if downlink is None else hvd.Server(
        kind, downlink=downlink(hvd)["compression"])}


def _overlap(*settings: Any, **more: Any) -> Options:
    return lambda hvd: {"overlap": hvd.DelayedUpdate(*settings, **more)}


def _sign(scale: float) -> Options:
    return lambda hvd: {"compression": hvd.Compression.sign(scale)}


def _seng(**settings: Any) -> Options:
    return lambda hvd: {"seng": {"damping": 0.2, "update_freq": 3, **settings}}


def _fp16(hvd: Any) -> dict[str, Any]:
    return {"compression": hvd.Compression.fp16}


def _delay_method(**settings: Any) -> Method:
    return Method(_delay(**settings), lambda ranks, tensors: ref.delay(DelayOracle(**settings)),
                  other=_delay(**{**settings, "lam": 0.123}), optimizer="sgd", bytes=ref.gradient_bytes)


METHODS = {
    "plain": Method(lambda hvd: {}, lambda ranks, tensors: ref.mean, bytes=ref.gradient_bytes),
    "sum": Method(lambda hvd: {"op": hvd.Sum}, lambda ranks, tensors: ref.total),
    "groups": Method(lambda hvd: {"groups": 2}, lambda ranks, tensors: ref.mean),
    # Each sum of M halves is rounded M times, of numbers below 8.
    "fp16": Method(_fp16, lambda ranks, tensors: ref.mean, tolerance=8 * 4 * 2.0**-11),
    "delay": _delay_method(),
    "delay constant": _delay_method(adaptive=False, lam=0.7),
    "delay by rank": _delay_method(order="rank"),
    "delay local": _delay_method(displacement="local"),
    "delay local constant": _delay_method(displacement="local", adaptive=False, lam=0.7),
    "delay forgetful": _delay_method(decay=0.0),
    "topk": Method(_topk(), ref.top_k(0.1), other=_topk(0.2), optimizer="amsgrad", bad=SKIPPED,
                   bytes=ref.entry_bytes(0.1)),
    "topk by tensor": Method(_topk(per_tensor=True), ref.top_k(0.1, per_tensor=True), bad=SKIPPED),
    "topk without feedback": Method(_topk(error_feedback=False), ref.top_k(0.1, feedback=False), bad=SKIPPED),
    "topk warm-up": Method(_topk(FALLING), ref.top_k(FALLING), bad=SKIPPED),
    "topk partly": Method(_topk(exclude=["*p3"], min_size=10), ref.top_k(0.1, whole=(1, 3, 4)), bad=SKIPPED),
    "topk sampled": Method(_topk(selection="sampled", bucket_bytes=1000), None, bad=SKIPPED),
    "topk in halves": Method(_topk(values="float16"), None, bad=SKIPPED),
    "topk sparse": Method(_topk(exchange="sparse_allreduce"), None, other=_topk(exchange="allgather"),
                          bad=SKIPPED),
    "powersgd": Method(_powersgd(), ref.powersgd(2), other=_powersgd(1), bad=SKIPPED,
                       bytes=ref.factor_bytes(2)),
    "powersgd rank 1": Method(_powersgd(1), ref.powersgd(1), bad=SKIPPED),
    "powersgd cold": Method(_powersgd(warm_start=False), ref.powersgd(2, warm_start=False), bad=SKIPPED),
    "powersgd without feedback": Method(_powersgd(error_feedback=False), ref.powersgd(2, feedback=False),
                                        bad=SKIPPED),
    "sign": Method(_sign(0.25), ref.sign(0.25), bad=SKIPPED, other=_sign(0.5), bytes=ref.gradient_bytes),
    "replicated": Method(_server("replicated"), lambda ranks, tensors: ref.mean, optimizer="amsgrad"),
    "rank0": Method(_server("rank0"), lambda ranks, tensors: ref.mean, other=_server("replicated"),
                    optimizer="amsgrad"),
    "sharded": Method(_server("sharded"), lambda ranks, tensors: ref.mean, other=_server("rank0"),
                      optimizer="amsgrad"),
    "topk sharded": Method(_both(_topk(), _server("sharded")), ref.top_k(0.1), optimizer="amsgrad",
                           bad=SKIPPED),
    "downlink": Method(_server("sharded", _topk(0.2)), None, bad=ERROR, other=_server("sharded", _topk(0.3))),
    "downlink in halves": Method(_both(_topk(), _server("rank0", _fp16)), None, bad=SKIPPED),
    "overlap": Method(_overlap(0.0), lambda ranks, tensors: ref.mean, late=True,
                      other=_overlap(0.3)),
    "overlap compensated": Method(_overlap(0.4, adaptive=False), lambda ranks, tensors: ref.mean, late=True),
    "overlap topk": Method(_both(_topk(), _overlap(0.0)), ref.top_k(0.1), late=True, bad=SKIPPED),
    "seng": Method(_seng(), None, network=True, other=_seng(damping=0.3)),
    "seng lagged": Method(_seng(coupling="lagged"), None, network=True),
}
# Methods of which another one has the same state and messages: make test-long has most of their tests.
VARIANTS = {
    "sum", "groups", "delay constant", "delay by rank", "delay local", "delay local constant",
    "delay forgetful", "topk by tensor", "topk without feedback", "topk warm-up", "topk partly",
    "topk sampled", "topk in halves", "powersgd rank 1", "powersgd cold", "powersgd without feedback",
    "replicated", "downlink in halves", "overlap compensated"}
LATE = {name: replace(method, options=_both(method.options, _overlap(0.0)), late=True)
        for name, method in METHODS.items() if not method.late and not method.network}
COMPENSATION = {"overlap compensated": 0.4}  # lam of delayed updates that are compensated
