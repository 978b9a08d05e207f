"""What SENG says: each cause of a warning once, with the layers that have it."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence

from hvd_ext.seng.coverage_report import format_names, normalize_reason
from hvd_ext.seng.memory import memory_text
from hvd_ext.seng.plan import LayerPlan
from hvd_ext.seng.settings import Settings

MAX_NAMES = 12  # names in one warning; report() has them all


class OnceWarnings:
    """Warnings that were given. Layers go by their names."""

    def __init__(self, settings: Settings) -> None:
        self._other = settings.fallback_text
        self._given: set[tuple[str, ...]] = set()

    def _warn_once(self, key: tuple[str, ...], message: str) -> None:
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=4)

    def without_rule(self, names: Sequence[str]) -> None:
        """Modules that no rule is for."""
        if names:
            self._warn_once(("rule", *names),
                            f"SENG has no rule for {format_names(names, MAX_NAMES)}; their weights get "
                            f"{self._other}. Teach it one with hvd.register_seng_rule, or name them in "
                            "exclude= to agree")

    def warn_refused(self, reasons: Mapping[str, str]) -> None:
        """Layers that get no curvature, as the gradient check refuses them or they cannot be captured."""
        if reasons:
            said = "; ".join(f"{names}: {reason}" for _, reason, names in _group_reasons(reasons))
            self._warn_once(("refused", *sorted(map(normalize_reason, reasons.values()))),
                            f"SENG gives some layers no curvature, they get {self._other}. {said}. Name them "
                            "in exclude= to agree")

    def by_rows(self, names: Sequence[str], trouble: str) -> None:
        """Layers in which each row counts as a sample."""
        if names:
            why = f" (its passes to find out ended in {trouble})" if trouble else ""
            self._warn_once(("rows",),
                            f"SENG cannot tell which rows of {format_names(names, MAX_NAMES)} belong to "
                            "which "
                            f"sample{why}: each row counts as a sample of its own, which is another "
                            'curvature. Say where the samples are with samples={name: ...}; {name: "rows"} '
                            'agrees, '
                            "strict=True refuses")

    def warn_failed(self, failures: Mapping[str, str], kept: Container[str]) -> None:
        """Layers whose curvature could not be taken; ``kept`` go on with what they had."""
        for keeps in (True, False):
            these = {name: reason for name, reason in failures.items() if (name in kept) == keeps}
            left = "keeps its previous curvature" if keeps else f"gets {self._other} until then"
            for cause, reason, names in _group_reasons(these):
                self._warn_once((cause, left), f"SENG could not refresh {names}: {reason}. A layer like that "
                                f"{left}; further failures are counted in report()")

    def print_memory(self, settings: Settings, plans: Sequence[LayerPlan], *, rank: int) -> None:
        """What ``memory=`` came to: printed, by one rank."""
        if settings.memory is not None:
            text = memory_text(settings, plans)
            if ("memory", text) not in self._given and rank == 0:
                print(text)
            self._given.add(("memory", text))

    def warn_diverged(self, step: int, lam: float) -> None:
        """Weights are not finite any more."""
        self._warn_once(("diverged",),
                        f"SENG: parameters are not finite any more at step {step}, although every "
                        f"gradient before was: the steps are too long for damping={lam:g}. Start again "
                        "from a checkpoint with a larger damping, a smaller learning rate, or a smaller "
                        "update_freq")


def _group_reasons(reasons: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Each cause, the first reason it was given as, and the layers that have it."""
    groups: dict[str, tuple[str, list[str]]] = {}
    for name, reason in reasons.items():
        groups.setdefault(normalize_reason(reason), (reason, []))[1].append(name)
    return [(cause, reason, format_names(names, MAX_NAMES)) for cause, (reason, names) in groups.items()]
