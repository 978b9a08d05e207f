"""An exchange as the simulator runs it: messages in stages, with what is computed around them."""

from __future__ import annotations

from dataclasses import dataclass

from hvd_ext.planning.links import Cluster
from hvd_ext.planning.messages import collective_traffic


@dataclass(frozen=True)
class Message:
    """One collective.

    Attributes:
        collective: its name in ``links.COLLECTIVES``.
        size: bytes that a rank hands over; see ``messages.py``.
        needs: the tensor, by its place in the backward pass, whose gradient must be there; in the first
            stage only.
        before: seconds that a rank computes before it can be sent.
        after: seconds that a rank computes with what has arrived.
        fuses: Horovod sends it together with others of its kind that wait.
        counted: it carries gradients or weights, and not the ranks' agreement.
    """

    collective: str
    size: float
    needs: int = 0
    before: float = 0.0
    after: float = 0.0
    fuses: bool = False
    counted: bool = True


@dataclass(frozen=True)
class Stage:
    """Messages that can be sent once all of the stage before have arrived.

    Attributes:
        messages: in their order.
        work: seconds that a rank computes first.
    """

    messages: tuple[Message, ...]
    work: float = 0.0


@dataclass(frozen=True)
class Exchange:
    """All that a step does beside forward and backward pass.

    Attributes:
        name: of the row.
        stages: the first one during the backward pass.
        end: seconds of computing at the end, the update among it.
        beside: messages of the step before that travel during this step's compute.
        delayed: the first stage's messages are sent when the step ends and waited for at the end of the
            next one.
        goes_on: with ``delayed``, further stages run beside the next step's backward pass, and not after it.
        refresh: messages of every ``update_freq``-th step, of which each step has its share.
    """

    name: str
    stages: tuple[Stage, ...]
    end: float = 0.0
    beside: tuple[Message, ...] = ()
    delayed: bool = False
    goes_on: bool = False
    refresh: tuple[Message, ...] = ()
    update_freq: int = 1

    def all_messages(self) -> tuple[Message, ...]:
        """Of all stages."""
        return (*(one for stage in self.stages for one in stage.messages), *self.beside)

    def rank_bytes(self, cluster: Cluster) -> float:
        """Bytes in (and out) of each rank in a step, without those by which ranks agree."""
        each = sum(collective_traffic(one.collective, one.size, cluster).rank
                   for one in self.all_messages() if one.counted)
        return each + sum(collective_traffic(one.collective, one.size, cluster).rank
                          for one in self.refresh) / self.update_freq

    def link_bytes(self, cluster: Cluster) -> float:
        """Bytes in (and out) of each host's link in a step."""
        each = sum(collective_traffic(one.collective, one.size, cluster).outer
                   for one in self.all_messages() if one.counted)
        return each + sum(collective_traffic(one.collective, one.size, cluster).outer
                          for one in self.refresh) / self.update_freq
