"""Files of the repository that others read: they say the same as the Makefile and the package."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hvd_ext.cli.horovod_patches import ADVISORIES
from hvd_ext.versions import HVD_EXT

yaml = pytest.importorskip("yaml")  # comes with Horovod
ROOT = Path(__file__).parents[2]


def load(path: str) -> object:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_pre_commit_runs_what_make_lint_runs() -> None:
    hooks = load(".pre-commit-config.yaml")["repos"][0]["hooks"]  # type: ignore[index]
    commands = [" ".join([hook["entry"], *hook.get("args", [])]) for hook in hooks]
    done = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert commands == [line.split("/bin/")[-1] for line in done.stdout.splitlines()
                        if re.search(r"/bin/(ruff|mypy)", line)]


def test_the_workflow_runs_make_lint_and_make_test() -> None:
    steps = load(".github/workflows/test.yml")["jobs"]["test"]["steps"]  # type: ignore[index]
    assert [step["run"] for step in steps if "run" in step][-3:] == ["make setup", "make lint", "make test"]


def test_the_citation_is_of_this_version_and_has_the_papers_of_the_readme() -> None:
    citation = load("CITATION.cff")
    assert citation["version"] == HVD_EXT  # type: ignore[index]
    papers = (ROOT / "README.md").read_text().partition("## Papers")[2]
    titles = [re.sub(r"\s+", " ", title) for title in re.findall(r"\*([^*]+)\*", papers)]
    assert titles == [reference["title"] for reference in citation["references"]]  # type: ignore[index]


def test_security_names_the_advisories_that_doctor_names() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert all(advisory in text for advisory in ADVISORIES)


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT))
                                        for path in (ROOT / ".github").rglob("*.yml")))
def test_files_for_github_are_yaml(path: str) -> None:
    assert load(path)
