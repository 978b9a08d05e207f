"""The command's frame, and the folder-to-import mapping of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hvd_ext.cli import doctor
from hvd_ext.cli.console import CliError
from hvd_ext.cli.main import COMMANDS, main


def test_every_command_is_registered_and_explains_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    listed = capsys.readouterr().out
    for name in COMMANDS:
        command = name.replace("_", "-")
        assert command in listed
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        assert f"hvd-ext {command}" in capsys.readouterr().out


def test_without_a_command_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert "usage: hvd-ext" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (CliError("no [compiler]", "install g++"), 1, ["no [compiler]", "What to do: install g++"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
)
def test_failures_are_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    told: list[str],
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run_command", fail)
    assert main(["doctor"]) == status
    printed = capsys.readouterr().err
    assert all(text in printed for text in told)
    assert "Traceback" not in printed


def test_dry_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["install-horovod", "--dry-run", "--cache-dir", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    assert "key: " in printed
    assert '"frameworks"' in printed
    assert "would build into" in printed
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--source", "/no/such.tar.gz"], "--source /no/such.tar.gz is no file"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["install-horovod", *arguments]) == 1
    printed = capsys.readouterr().err
    assert message in " ".join(printed.split())
    assert "What to do:" in printed


def test_folders_are_mapped_to_import_names() -> None:
    code = (
        "import importlib.util as u\n"
        "for name in ('hvd_ext', 'hvd_ext.torch', 'hvd_ext.tensorflow'):\n"
        "    spec = u.find_spec(name)\n"
        "    print(spec.origin if spec else 'missing')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True
    )
    # In development mode the checkout's folders, after a plain installation the import names.
    found = [Path(line).parent.name for line in done.stdout.splitlines()]
    assert found in (["hvd_ext", "torch_ext", "tf"], ["hvd_ext", "torch", "tensorflow"])
