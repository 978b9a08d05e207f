"""``hvd.register_reducer``: a way to reduce that comes from outside the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import hvd_ext.torch as hvd
from tests.torch.sign_reducer import SignReducer

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Impostor:
    slot: ClassVar[str] = "compression"
    label: ClassVar[str] = "topk"


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="'topk' is registered already, for TopK"):
        hvd.register_reducer(Impostor, SignReducer)
    with pytest.raises(TypeError, match="reducer must be a subclass of Reducer"):
        hvd.register_reducer(Impostor, Impostor)
    with pytest.raises(TypeError, match="settings must be a dataclass type"):
        hvd.register_reducer(SignReducer, SignReducer)


def test_the_page_shows_this_reducer():
    code = (ROOT / "tests" / "torch" / "sign_reducer.py").read_text()
    page = (ROOT / "docs" / "own_reducer.md").read_text().replace("import hvd_ext.torch as hvd\n", "", 1)
    assert code[code.index("from collections"):].rstrip() in page
