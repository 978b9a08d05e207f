"""``hvd-ext doctor`` tells a Horovod without the security edits from one with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvd_ext.cli import environment
from hvd_ext.cli.environment import unpatched_parts
from hvd_ext.cli.horovod_patches import SECURITY_EDITS
from hvd_ext.cli.main import main
from hvd_ext.versions import HOROVOD, TORCH

FILES = {edit.path for edit in SECURITY_EDITS if edit.path.endswith(".py")}


def test_files_are_recognised(sources: dict[str, Path]) -> None:
    assert FILES.issubset(unpatched_parts(sources["released"] / "horovod"))
    assert unpatched_parts(sources["edited"] / "horovod") == ["the compiled library"]


@pytest.mark.parametrize("kind", ["released", "edited"])
def test_doctor_names_an_unedited_horovod_as_a_security_problem(
        sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        kind: str) -> None:
    monkeypatch.setattr(environment, "horovod_folder", lambda: sources[kind] / "horovod")
    monkeypatch.setattr(environment, "read_metadata", lambda folder: {"torch": TORCH})
    monkeypatch.setattr(environment, "_inspect_framework", lambda name, *_: environment.Framework(
        name, TORCH if name == "torch" else None, horovod={"gloo": 1} if name == "torch" else None))
    monkeypatch.setattr(environment, "find_program", lambda name: f"/env/bin/{name}")
    monkeypatch.setattr(environment.toolchain, "distribution_version", lambda name: HOROVOD)
    assert main(["doctor", "--json", "--no-selftest"]) == (1 if kind == "released" else 0)
    findings = {row["subject"]: row for row in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["Horovod"]["level"] == ("problem" if kind == "released" else "note")
    assert ("CVE-2024-10190" in findings["Horovod"]["value"]) is (kind == "released")
