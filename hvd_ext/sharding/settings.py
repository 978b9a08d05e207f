"""``hvd.Server``: where the update runs, and how the weights come back from there."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from hvd_ext import checks
from hvd_ext.consistency.fingerprint import describe_settings
from hvd_ext.horovod_api.signatures import refuse_old_names
from hvd_ext.reducers.registry import SERVERS
from hvd_ext.reducers.topk.config import TopK, fusion_threshold

HALF = "FP16Compressor"  # the name of hvd.Compression.fp16 in every front end


@dataclass(frozen=True)
class Server:
    """Where the update runs, with a reply that may be compressed. ``server="sharded"`` is
    ``server=Server("sharded")``.

    With a reply an owner keeps the exact weights w; all ranks hold w^, at which gradients are taken. After
    an update the owner sends ``compress(w - w^)``, and all ranks add to w^ what was sent; what is left of
    w - w^ is part of what is sent next. Replicas stay identical. That is error feedback on the way
    back too (DoubleSqueeze, arXiv 1905.05957), in the space of the weights ("EF21-P and Friends").

    Args:
        kind: "replicated", "rank0" or "sharded".
        downlink: None: the new weights themselves. ``hvd.Compression.fp16``: all of w - w^ in 16 bits.
            ``hvd.Compression.topk(ratio, ...)``: of what an owner has of a bucket the
            ``max(1, round(ratio * n))`` largest of w - w^; with ``per_tensor`` of what it has of a tensor.
            Tensors below ``min_size`` and those of ``exclude`` come back whole.

    Raises:
        TypeError: ``downlink`` is something else.
        ValueError: an unknown kind, or a reply that cannot be.
    """

    kind: str
    _: KW_ONLY
    downlink: Any = None

    def __post_init__(self) -> None:
        checks.check_choice("server", self.kind, SERVERS)
        if self.downlink is None:
            return
        if not (self.half or isinstance(self.downlink, TopK)):
            raise TypeError("downlink must be None, hvd.Compression.fp16 or hvd.Compression.topk(...), got "
                            f"{self.downlink!r}")
        if self.kind == "replicated":
            raise ValueError("downlink= cannot be used with 'replicated': every rank makes the update itself "
                             "and nothing is sent back; leave it out, or use 'sharded' or 'rank0'")
        if isinstance(self.downlink, TopK):
            _check_topk(self.downlink)

    @property
    def half(self) -> bool:
        """Whether the reply is ``hvd.Compression.fp16``."""
        return getattr(self.downlink, "__name__", None) == HALF

    def fingerprint_lines(self) -> list[str]:
        """What ranks must have in common, as lines of text."""
        lines = [f"server: {self.kind!r}"]
        if self.half:
            lines.append("server's reply: Compression.fp16")
        elif self.downlink is not None:
            lines += [f"server's reply: Compression.topk {line}" for line in describe_settings(self.downlink)]
        return lines


Server.__init__ = refuse_old_names(reply="downlink=")(Server.__init__)  # type: ignore[method-assign]


def _check_topk(reply: TopK) -> None:
    if not reply.error_feedback:
        raise ValueError("downlink=Compression.topk(error_feedback=False) cannot be: what is not sent stays "
                         "in w - w^ and is fed back by itself; leave error_feedback out")
    if reply.exchange != "allgather":
        raise ValueError(f"downlink=Compression.topk(exchange={reply.exchange!r}) cannot be: a reply goes "
                         "from "
                         "an owner to all ranks and nothing is added up on its way; leave exchange out")
    if reply.bucket_bytes != fusion_threshold():
        raise ValueError(f"downlink=Compression.topk(bucket_bytes={reply.bucket_bytes}) cannot be: replies "
                         "travel in the server's buckets; leave bucket_bytes out")


def settings_of(server: Any) -> Server:
    """The settings of a ``server=`` argument: a name, or a :class:`Server`.

    Raises:
        ValueError: it is neither.
    """
    return server if isinstance(server, Server) else Server(server)
