"""The message of one bucket: a header, k indices and k values in one array of 32-bit words.

All ranks' messages for a bucket have the same length, also when fewer than k entries were chosen:
the rest is zero and not read. Equal lengths keep Horovod's response cache valid from step to step
and let a receiver find every rank's header without reading the messages one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
WORD = 4
HEADER_WORDS = 2  # the number of entries that follow, and k
MAX_NUMEL = 2**31 - 1


@dataclass(frozen=True)
class Layout:
    """Where things lie in a message for k entries whose values are of type ``values``.

    ``words[indices]`` are int32 positions in the flat bucket, rising; ``words[data]`` holds the
    values of type ``values``, packed, in the order of the indices.
    """

    k: int
    values: str

    @property
    def indices(self) -> slice:
        """The words of the indices, padded to an even number so that 8-byte values are aligned."""
        return slice(HEADER_WORDS, HEADER_WORDS + self.k + self.k % 2)

    @property
    def data(self) -> slice:
        """The words of the values, padded to an even number so that the next message is aligned."""
        start = self.indices.stop
        words = -(-self.k * VALUE_BYTES[self.values] // WORD)
        return slice(start, start + words + words % 2)

    @property
    def words(self) -> int:
        """Length of the message in 32-bit words."""
        return self.data.stop  # type: ignore[no-any-return]

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of one message by kind; the header is counted among the indices."""
        return {"indices": WORD * self.data.start, "values": WORD * (self.words - self.data.start)}


class MessageError(RuntimeError):
    """Ranks sent messages that do not belong together."""


def check_messages(words: int, headers: Sequence[Sequence[int]], layout: Layout,
                   what: str) -> list[int]:
    """The number of entries each rank sent, by rank.

    Args:
        words: length of all messages together.
        headers: each rank's (count, k).
        layout: of one message.
        what: the bucket's name, for the error.

    Raises:
        MessageError: the messages are not all of this layout.
    """
    ranks = len(headers)
    if words != ranks * layout.words or any(
            k != layout.k or not 0 <= count <= k for count, k in headers):
        raise MessageError(
            f"{what}: {ranks} ranks sent {words} words with (count, k) = "
            f"{[tuple(header) for header in headers]}; expected {layout.words} words and k = "
            f"{layout.k} from each. Give all ranks the same model and the same TopK settings, "
            "also where the ratio is a function of the step"
        )
    return [count for count, _ in headers]
