"""The checked patch: it edits exactly the source it was made for, and nothing else."""

from __future__ import annotations

import difflib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_ext.cli import horovod_source
from hvd_ext.cli.console import CliError
from hvd_ext.cli.horovod_patches import EDITS, Diff, Patch, WholeFile, kinds
from hvd_ext.cli.horovod_patches.kinds import apply_diff
from hvd_ext.cli.horovod_source import apply_patches, patch_id, sha256_of, unpack_source

BEFORE = {"a.txt": "one\ntwo\n", "deep/b.txt": "three\n"}
AFTER = {"a.txt": "one\n2\n", "deep/b.txt": "3\n"}
CHANGES = {"a.txt": ("two", "2"), "deep/b.txt": ("three", "3")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, text in BEFORE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def edits() -> tuple[Patch, ...]:
    return tuple(
        Patch(name, sha256_of(BEFORE[name].encode()), sha256_of(AFTER[name].encode()), (change,), "test")
        for name, change in CHANGES.items()
    )


def contents(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in BEFORE}


def test_recognised_source_is_edited(source: Path, edits: tuple[Patch, ...]) -> None:
    apply_patches(source, edits)
    assert contents(source) == AFTER


@pytest.mark.parametrize("name", sorted(BEFORE))
def test_one_changed_byte_is_refused_and_nothing_is_edited(
    source: Path, edits: tuple[Patch, ...], name: str
) -> None:
    (source / name).write_text(BEFORE[name] + " ")
    found = contents(source)
    with pytest.raises(CliError, match=f"not recognised: {name} differs") as failure:
        apply_patches(source, edits)
    assert contents(source) == found
    assert sha256_of((BEFORE[name] + " ").encode()) in str(failure.value)
    assert "unchanged source archive" in failure.value.remedy


def test_missing_file_is_refused(source: Path, edits: tuple[Patch, ...]) -> None:
    (source / "deep/b.txt").unlink()
    with pytest.raises(CliError, match=r"deep/b\.txt cannot be read"):
        apply_patches(source, edits)
    assert (source / "a.txt").read_text() == BEFORE["a.txt"]


def test_a_second_application_is_refused(source: Path, edits: tuple[Patch, ...]) -> None:
    apply_patches(source, edits)
    with pytest.raises(CliError, match="not recognised"):
        apply_patches(source, edits)
    assert contents(source) == AFTER


def test_result_other_than_recorded_is_an_error(source: Path) -> None:
    wrong = Patch("a.txt", sha256_of(BEFORE["a.txt"].encode()), "0" * 64, (("two", "2"),), "test")
    with pytest.raises(AssertionError, match="expected 000"):
        apply_patches(source, (wrong,))


def test_every_edit_names_another_file_with_real_checksums_and_a_reason() -> None:
    assert len({edit.path for edit in EDITS}) == len(EDITS)
    sums = [value for edit in EDITS for value in (edit.before, edit.after) if value is not None]
    assert all(len(bytes.fromhex(value)) == 32 for value in sums)
    assert len(set(sums)) == len(sums)
    assert all(old != new for edit in EDITS if isinstance(edit, Patch) for old, new in edit.replacements)
    assert all(edit.why for edit in EDITS)


def test_every_kept_file_belongs_to_an_edit() -> None:
    kept = {str(path.relative_to(kinds.FOLDER)) for folder in ("diffs", "files")
            for path in (kinds.FOLDER / folder).rglob("*") if path.suffix in (".diff", ".in")}
    assert kept == {f"diffs/{edit.path}.diff" for edit in EDITS if isinstance(edit, Diff)} | {
        f"files/{edit.path}.in" for edit in EDITS if isinstance(edit, WholeFile)}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the package's, for diffs and whole files."""
    monkeypatch.setattr(kinds, "FOLDER", tmp_path / "kept")
    for folder in ("diffs", "files"):
        (tmp_path / "kept" / folder).mkdir(parents=True)
    return tmp_path / "kept"


def test_a_whole_file_is_added_or_replaces_the_released_one(source: Path, kept: Path) -> None:
    (kept / "files" / "new.txt.in").write_text("new\n")
    (kept / "files" / "a.txt.in").write_text("other\n")
    new = WholeFile("new.txt", None, "test")
    apply_patches(source, (new, WholeFile("a.txt", sha256_of(BEFORE["a.txt"].encode()), "test")))
    assert (source / "new.txt").read_text() == "new\n"
    assert (source / "a.txt").read_text() == "other\n"
    with pytest.raises(CliError, match=r"it has new\.txt already"):
        apply_patches(source, (new,))


def test_the_identity_counts_whole_files(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod_source, "EDITS", (WholeFile("new.txt", None, "test"),))
    seen = set()
    for text in ("one\n", "two\n"):
        (kept / "files" / "new.txt.in").write_text(text)
        seen.add(patch_id())
    assert len(seen) == 2


def diff_of(old: str, new: str, context: int) -> list[str]:
    return list(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "a/x", "b/x", n=context))


@given(st.lists(st.sampled_from(["a\n", "b\n", "-- c\n", "+ d\n", "\n"]), max_size=12),
       st.lists(st.sampled_from(["a\n", "b\n", "-- c\n", "+ d\n", "\n"]), max_size=12),
       st.integers(0, 3))
def test_a_diff_gives_the_new_text(old: list[str], new: list[str], context: int) -> None:
    before, after = "".join(old), "".join(new)
    assert apply_diff(before, diff_of(before, after, context), "x") == after


def test_a_diff_of_another_text_is_an_error(source: Path, kept: Path) -> None:
    (kept / "diffs" / "a.txt.diff").write_text("".join(diff_of("one\n2\n", "one\n3\n", 3)))
    edit = Diff("a.txt", sha256_of(BEFORE["a.txt"].encode()), "0" * 64, "test")
    with pytest.raises(AssertionError, match=r"a\.txt: line 2 is 'two\\n', not '2\\n'"):
        apply_patches(source, (edit,))


def test_another_number_of_occurrences_is_an_error(source: Path) -> None:
    (source / "a.txt").write_text("two two\n")
    once = Patch("a.txt", sha256_of(b"two two\n"), sha256_of(b"2 2\n"), (("two", "2"),), "test")
    with pytest.raises(AssertionError, match="occurs 2 times, not 1"):
        apply_patches(source, (once,))
    apply_patches(source, (replace(once, times=2),))
    assert (source / "a.txt").read_text() == "2 2\n"


def test_patch_id_follows_the_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    before = patch_id()
    monkeypatch.setattr(horovod_source, "EDITS", EDITS[:2])
    assert patch_id() != before


def archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    return path


def test_unpack_finds_the_source_folder(tmp_path: Path) -> None:
    packed = archive(tmp_path / "horovod.tar.gz", ["horovod-1/setup.py", "horovod-1/x/y.txt"])
    assert unpack_source(packed, tmp_path / "out") == tmp_path / "out" / "horovod-1"


def test_unpack_refuses_another_archive(tmp_path: Path) -> None:
    packed = archive(tmp_path / "other.tar.gz", ["other/readme"])
    with pytest.raises(CliError, match="not a source archive of Horovod"):
        unpack_source(packed, tmp_path / "out")


def test_unpack_refuses_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "page.tar.gz").write_text("<html>404</html>")
    with pytest.raises(CliError, match="cannot be unpacked"):
        unpack_source(tmp_path / "page.tar.gz", tmp_path / "out")
