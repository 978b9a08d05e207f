"""What SENG warns about: each cause once, with the layers that have it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from hvd_ext.seng import Settings
from hvd_ext.seng.coverage import some
from hvd_ext.tensorflow.seng.inventory import Layer

MOST = 12  # names in one warning; report() has them all


class Notices:
    """Warnings that were given."""

    def __init__(self, settings: Settings) -> None:
        self._other = settings.other_text
        self._given: set[tuple[str, ...]] = set()

    def _once(self, key: tuple[str, ...], message: str) -> None:
        if key not in self._given:
            self._given.add(key)
            warnings.warn(message, stacklevel=4)

    def without_rule(self, names: Sequence[str]) -> None:
        """Layers that no rule is for."""
        if names:
            self._once(("rule", *names), f"SENG has no rule for {some(names, MOST)}; their weights get "
                       f"{self._other}. Teach it one with hvd.register_seng_rule, or name them in exclude= "
                       "to agree")

    def refused(self, reasons: Mapping[Layer, str]) -> None:
        """Layers that a refresh leaves without curvature."""
        groups: dict[str, list[str]] = {}
        for layer, reason in reasons.items():
            groups.setdefault(reason, []).append(layer.name)
        said = "; ".join(f"{some(names, MOST)}: {reason}" for reason, names in groups.items())
        if said:
            self._once(("refused", said), f"SENG gives some layers no curvature, they get {self._other}. "
                       f"{said}. Name them in exclude= to agree")

    def by_rows(self, names: Sequence[str], trouble: str) -> None:
        """Layers in which each row counts as a sample."""
        if names:
            why = f" (its passes to find out ended in {trouble})" if trouble else ""
            self._once(("rows",), f"SENG cannot tell which rows of {some(names, MOST)} belong to which "
                       f"sample{why}: each row counts as a sample of its own, which is another curvature. "
                       'Say where the samples are with samples={name: ...}; {name: "rows"} agrees, '
                       "strict=True refuses")
