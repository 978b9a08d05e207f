"""Names, arguments, files and links in README.md and docs/*.md exist."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import LEFT_OUT
from tests.docs.blocks import PAGES, ROOT, find_prose
from tests.docs.references import find_references
from tests.ranks import command_of, environment_of_ranks

MODULES = {"torch": "hvd_ext.torch", "tensorflow": "hvd_ext.tensorflow.keras,hvd_ext.tensorflow"}
# Arguments and names that are not this package's, and whose they are.
OTHERS = {
    "devices=": "Lightning", "epochs=": "Keras", "scaled=": "hvd_ext.state.Part",
    "jit_compile=": "Keras", "weights_only=": "PyTorch", "find_unused_parameters=": "PyTorch",
    "hvd_ext.exchange": "a collective's name", "hvd_ext.rejoin": "a collective's name",
    "hvd.Compression.sign": "the reader's own reducer", "hvd.Compression.sign(scale=0.01)": "the same",
    "hvd_ext.ray": "needs ray", "hvd_ext.spark": "needs pyspark",
}
REFERENCES = list(find_references())
FILES = (r"`((?:tests|docs|examples|benchmarks|scripts)/[\w/.*-]+|(?:hvd_ext|torch_ext|tf)/[\w/.*-]+\.py"
         r"|test_\w+\.py)`")


@cache
def problems(front_end: str) -> dict[str, str | None]:
    """What is wrong with each expression where ``hvd`` is this front end."""
    sources = sorted({source for _, source in REFERENCES})
    environment = environment_of_ranks()
    command = command_of(front_end, "tests.docs.references", MODULES[front_end], environment=environment)
    done = subprocess.run(command, cwd=ROOT, env=environment, input=json.dumps(sources), capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(sources, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.distributed
@pytest.mark.skipif(bool(LEFT_OUT), reason="a name may be of the front end that is left out")
def test_names_and_arguments_exist_in_a_front_end():
    torchs, tensorflows = problems("torch"), problems("tensorflow")
    wrong = {source: problem for source, problem in torchs.items()
             if problem is not None and tensorflows[source] is not None}
    assert [(place, wrong[source]) for place, source in REFERENCES
            if source in wrong and source not in OTHERS] == []
    assert OTHERS.keys() - wrong.keys() == set()  # no longer others', or no longer named


def test_files_exist():
    missing = []
    for page in PAGES:
        prose = find_prose(page)
        for found in re.finditer(FILES, prose):
            place = f"{page}:{prose[:found.start()].count(chr(10)) + 1}"
            pattern = found.group(1) if "/" in found.group(1) else f"tests/*/{found.group(1)}"
            if not list(ROOT.glob(pattern.rstrip("/"))):
                missing.append((place, found.group(1)))
    assert missing == []


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", find_prose(str(page.relative_to(ROOT))), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", find_prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.resolve())):
            wrong.append(target)
    assert wrong == []
