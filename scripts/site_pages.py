"""Pages that the build of the site adds (``hooks`` of mkdocs.yml): the start page, and one a public module.

README.md becomes the start page, SECURITY.md a page. Sources are read without being imported, from copies
under ``out/`` that have the packages' import names.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # mkdocs runs this file as one without a package

from scripts.public_names import FOLDERS, MODULES, find_definition, public_names  # noqa: E402

SOURCES = ROOT / "out" / "api_sources"
SOURCES.mkdir(parents=True, exist_ok=True)  # mkdocstrings leaves out paths that are not there yet
HOROVODS_API = "https://horovod.readthedocs.io/en/stable/api.html"
OWN = ("lightning", "schedules", "numpy")  # the last part of modules that Horovod does not have


def copy_sources() -> None:
    """Copy ``torch_ext`` to ``hvd_ext/torch`` and ``tf`` to ``hvd_ext/tensorflow``, beside ``hvd_ext``."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    for name, folder in reversed(FOLDERS.items()):
        shutil.copytree(ROOT / folder, SOURCES.joinpath(*name.split(".")), dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__"))


def top_page(name: str) -> str:
    """A page of the top folder with links as the site has them."""
    return re.sub(r"\]\(docs/", "](", (ROOT / name).read_text())


def api_page(module: str) -> str:
    """The page of a module: its public names, and a list of those that are Horovod's."""
    names = public_names(module)
    own = [name for name in names if find_definition(module, name)[1] is not None]
    lines = [f"# {module}", "", f"::: {module}", "    options:", "      members:",
             *(f"        - {name}" for name in own), ""]
    others = [name for name in names if name not in own]
    if others:
        lines += ["Handed on from Horovod: " + ", ".join(f"`{name}`" for name in others) + ".", ""]
    if module.split(".")[-1] not in OWN:
        counterpart = module.replace("hvd_ext", "horovod")
        lines += [f"All other names are those of `{counterpart}`: [Horovod's API]({HOROVODS_API}).", ""]
    return "\n".join(lines)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to those of ``docs/``."""
    copy_sources()
    pages = {"index.md": top_page("README.md"), "SECURITY.md": top_page("SECURITY.md"),
             **{f"api/{module}.md": api_page(module) for module in MODULES}}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files
