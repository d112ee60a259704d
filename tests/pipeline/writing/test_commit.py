"""The mark of a commit, and whether one can be ended. Commits stopped at each step: ``test_directory.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncshard.pipeline.writing.commit import Commit, folders_of, is_folder, write_mark

WRITER = "0123456789abcdef" * 2


@pytest.fixture
def commit(tmp_path: Path) -> Commit:
    """One of new files a and b over old ones a and c, of which nothing has been done."""
    folder = tmp_path / "folder"
    staged, _ = folders_of(str(folder), WRITER)
    Path(staged).mkdir(parents=True)
    for name, text in (("a", "new"), ("b", "new")):
        (Path(staged) / name).write_text(text)
    for name in "ac":
        (tmp_path / name).write_text("old")
    return Commit.of(str(tmp_path), str(folder), WRITER, ["a", "b"], ["a", "c"])


def texts(commit: Commit) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(commit.directory).iterdir() if path.is_file()}


def test_a_mark_tells_of_its_commit(commit: Commit, tmp_path: Path) -> None:
    write_mark(str(tmp_path / "mark"), "a note", WRITER, commit.names, commit.going)
    assert Commit.read(str(tmp_path / "mark"), str(tmp_path), str(tmp_path / "folder")) == commit


def test_where_there_is_no_mark_there_is_no_commit(tmp_path: Path) -> None:
    assert Commit.read(str(tmp_path / "mark"), str(tmp_path), str(tmp_path / "folder")) is None


@pytest.mark.parametrize("steps", range(5))
def test_a_commit_may_be_begun_twice(commit: Commit, steps: int) -> None:
    moves = iter(commit.run())
    for _ in range(steps):
        next(moves)
    assert commit.has_begun == (steps > 0)
    assert commit.can_run
    rest = list(commit.run())
    assert len(rest) == 4 - steps
    assert texts(commit) == {"a": "new", "b": "new"}
    assert list(commit.run()) == []


def test_a_commit_that_lacks_a_file_cannot_be_run(commit: Commit) -> None:
    (Path(commit.staged) / "a").unlink()
    assert not commit.can_run  # the one in the directory is the old one


def test_a_link_to_a_folder_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert is_folder(str(tmp_path))
    assert not is_folder(str(tmp_path / "link"))
    assert not is_folder(str(tmp_path / "nothing"))
