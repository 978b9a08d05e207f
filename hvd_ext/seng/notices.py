"""What SENG says: each cause of a warning once, with the layers that have it."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence

from hvd_ext.seng.coverage import cause_of, some
from hvd_ext.seng.memory import memory_text
from hvd_ext.seng.plan import LayerPlan
from hvd_ext.seng.settings import Settings

MOST = 12  # names in one warning; report() has them all


class Notices:
    """Warnings that were given. Layers go by their names."""

    def __init__(self, settings: Settings) -> None:
        self._other = settings.other_text
        self._given: set[tuple[str, ...]] = set()

    def _once(self, key: tuple[str, ...], message: str) -> None:
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=4)

    def without_rule(self, names: Sequence[str]) -> None:
        """Modules that no rule is for."""
        if names:
            self._once(("rule", *names), f"SENG has no rule for {some(names, MOST)}; their weights get "
                       f"{self._other}. Teach it one with hvd.register_seng_rule, or name them in exclude= "
                       "to agree")

    def refused(self, reasons: Mapping[str, str]) -> None:
        """Layers that get no curvature, as the gradient check refuses them or they cannot be captured."""
        if reasons:
            said = "; ".join(f"{names}: {reason}" for _, reason, names in _grouped(reasons))
            self._once(("refused", *sorted(map(cause_of, reasons.values()))),
                       f"SENG gives some layers no curvature, they get {self._other}. {said}. Name them "
                       "in exclude= to agree")

    def by_rows(self, names: Sequence[str], trouble: str) -> None:
        """Layers in which each row counts as a sample."""
        if names:
            why = f" (its passes to find out ended in {trouble})" if trouble else ""
            self._once(("rows",), f"SENG cannot tell which rows of {some(names, MOST)} belong to which "
                       f"sample{why}: each row counts as a sample of its own, which is another curvature. "
                       'Say where the samples are with samples={name: ...}; {name: "rows"} agrees, '
                       "strict=True refuses")

    def failed(self, failures: Mapping[str, str], kept: Container[str]) -> None:
        """Layers whose curvature could not be taken; ``kept`` go on with what they had."""
        for keeps in (True, False):
            these = {name: reason for name, reason in failures.items() if (name in kept) == keeps}
            left = "keeps its previous curvature" if keeps else f"gets {self._other} until then"
            for cause, reason, names in _grouped(these):
                self._once((cause, left), f"SENG could not refresh {names}: {reason}. A layer like that "
                           f"{left}; further failures are counted in report()")

    def memory(self, settings: Settings, plans: Sequence[LayerPlan], *, rank: int) -> None:
        """What ``memory=`` came to: printed, by one rank."""
        if settings.memory is not None:
            text = memory_text(settings, plans)
            if ("memory", text) not in self._given and rank == 0:
                print(text)
            self._given.add(("memory", text))

    def diverged(self, step: int, lam: float) -> None:
        """Weights are not finite any more."""
        self._once(("diverged",), f"SENG: parameters are not finite any more at step {step}, although every "
                   f"gradient before was: the steps are too long for damping={lam:g}. Start again from a "
                   "checkpoint with a larger damping, a smaller learning rate, or a smaller update_freq")


def _grouped(reasons: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Each cause, the first reason it was given as, and the layers that have it."""
    groups: dict[str, tuple[str, list[str]]] = {}
    for name, reason in reasons.items():
        groups.setdefault(cause_of(reason), (reason, []))[1].append(name)
    return [(cause, reason, some(names, MOST)) for cause, (reason, names) in groups.items()]
