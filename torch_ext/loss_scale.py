"""The factor that mixed precision puts into the loss, and with it into every gradient."""

from __future__ import annotations

from typing import Any


def loss_scale(scaler: Any) -> float:
    """The present scale of a ``torch.amp.GradScaler``; 1 for None and for one that is disabled."""
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
