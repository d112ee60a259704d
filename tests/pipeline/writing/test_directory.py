"""One writer of a directory, and its commit: stopped or failing at each of its steps, it leaves one version whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from asyncshard.errors import StoreError, TargetExistsError
from asyncshard.pipeline.writing.directory import DirectoryWriter, Role, is_held

ROLE = Role(".folder.tmp", "mark", "It has not ended.", "another one is writing there")
STEPS = ("open", "fsync", "replace", "unlink", "makedirs", "rmdir", "listdir")
OLD = ("a", "b", "c")
SETS = [("a", "b", "c"), ("a", "b"), ("a", "b", "c", "d"), ("a",), ("x", "y")]


@pytest.fixture(autouse=True)
def disk_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: os.fstat(fd))


class Killed(BaseException):
    """The process would be gone from here on."""


def names_in(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def fill(path: Path, names: tuple[str, ...], text: str) -> None:
    for name in names:
        (path / name).write_text(text)


def version_of(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir() if file.is_file()}


def write(path: Path, names: tuple[str, ...], text: str = "new", *, is_resuming: bool = True) -> None:
    """Replace all files of a directory, as a save does."""
    writer = DirectoryWriter(str(path), ROLE)
    try:
        writer.begin()
        if is_resuming:
            writer.resume()
        if not (path / ROLE.mark).exists():
            writer.remove_leftovers()
        for name in names:
            Path(writer.path_of(name)).write_text(text)
            writer.flush(name)
        writer.commit(names, [name for name in names_in(path) if len(name) == 1])
    finally:
        writer.clean_up()


@contextmanager
def at_step(last: int, act: Callable[[int], object]) -> Iterator[list[int]]:
    """Call ``act(step)`` before each call that changes files, from step `last` on; yield the steps."""
    steps: list[int] = []
    opened: list[int] = []

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            steps.append(len(steps))
            if len(steps) > last:
                act(len(steps) - 1)
            result = real(*args, **options)
            if real is real_open:
                opened.append(result)
            return result

        return call

    real_open = os.open
    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, watched(getattr(os, name)))
        yield steps
    for fd in opened:  # a process that is gone has no files open, and no locks
        with suppress(OSError):
            if ROLE.folder in os.readlink(f"/proc/self/fd/{fd}"):
                os.close(fd)


def kill(_: int) -> None:
    raise Killed


def fail(_: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def fail_once(last: int) -> Callable[[int], None]:
    def act(step: int) -> None:
        if step == last:
            fail(step)

    return act


def outcomes(tmp_path: Path, names: tuple[str, ...], act: Callable[[int], Callable[[int], object]]) -> list[str]:
    """Return what a directory holds after a write that was stopped before each of its steps."""
    found: list[str] = []
    for last in range(1000):
        path = tmp_path / str(last)
        path.mkdir()
        fill(path, OLD, "old")
        with at_step(last, act(last)) as steps, suppress(Killed, OSError):
            write(path, names)
        if len(steps) <= last:
            break
        found.append(outcome(path, names))
        require_recovery(path, names, found[-1])
        shutil.rmtree(path)
    return found


def outcome(path: Path, names: tuple[str, ...]) -> str:
    if (path / ROLE.mark).exists():
        return "refused"
    version = version_of(path)
    assert version in (dict.fromkeys(OLD, "old"), dict.fromkeys(names, "new"))
    return "old" if version == dict.fromkeys(OLD, "old") else "new"


def require_recovery(path: Path, names: tuple[str, ...], before: str) -> None:
    """Begin another write, and give up: one version is whole. Then write: nothing else is left."""
    writer = DirectoryWriter(str(path), ROLE)
    writer.begin()
    writer.resume()
    writer.clean_up()
    after = outcome(path, names)
    assert after == before or before == "refused" != after
    write(path, ("a", "z"), "newer")
    assert version_of(path) == {"a": "newer", "z": "newer"}
    assert names_in(path) == ["a", "z"]


@pytest.mark.parametrize("names", SETS, ids="".join)
def test_a_write_killed_before_any_step_leaves_a_whole_version_or_a_mark(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    found = outcomes(tmp_path, names, lambda _: kill)
    assert found == sorted(found, key=["old", "refused", "new"].index)
    assert set(found) == {"old", "refused", "new"}


@pytest.mark.parametrize("names", SETS, ids="".join)
def test_a_step_that_fails_leaves_the_old_version_or_the_new_one_and_no_mark(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    found = outcomes(tmp_path, names, fail_once)
    assert set(found) == {"old", "new"}


@pytest.mark.parametrize("names", SETS, ids="".join)
def test_a_disk_that_fails_from_some_step_on_loses_nothing(tmp_path: Path, names: tuple[str, ...]) -> None:
    found = outcomes(tmp_path, names, lambda _: fail)
    assert set(found) == {"old", "refused", "new"}


def test_one_file_in_place_of_itself_needs_no_mark(tmp_path: Path) -> None:
    seen = []
    real = os.replace

    def replace(source: str, target: str) -> None:
        seen.append(os.path.basename(target))
        real(source, target)

    fill(tmp_path, ("a",), "old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        write(tmp_path, ("a",))
    assert seen == ["a"]
    assert version_of(tmp_path) == {"a": "new"}


def test_a_failed_write_leaves_no_folder_that_it_has_made(tmp_path: Path) -> None:
    writer = DirectoryWriter(str(tmp_path / "x" / "y"), ROLE)
    writer.begin()
    Path(writer.path_of("a")).write_text("new")
    writer.clean_up()
    assert names_in(tmp_path) == []


def test_a_second_writer_is_refused_and_may_come_again(tmp_path: Path) -> None:
    first = DirectoryWriter(str(tmp_path), ROLE)
    first.begin()
    assert is_held(str(tmp_path / ROLE.folder))
    second = DirectoryWriter(str(tmp_path), ROLE)
    with pytest.raises(StoreError, match="another one is writing there") as caught:
        second.begin()
    assert caught.value.retryable
    second.clean_up()
    Path(first.path_of("a")).write_text("new")
    first.commit(["a"], [])
    first.clean_up()
    write(tmp_path, ("a",), "newer")
    assert version_of(tmp_path) == {"a": "newer"}
    assert not is_held(str(tmp_path / ROLE.folder))


def test_a_file_system_without_locks_is_an_error_where_a_lock_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    writer = DirectoryWriter(str(tmp_path), ROLE)
    with pytest.raises(StoreError, match="not implemented"):
        writer.begin()
    writer.clean_up()


def test_without_locks_a_writer_leaves_the_files_of_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = (DirectoryWriter(str(tmp_path), ROLE, requires_lock=False) for _ in range(2))
    for writer in (first, second):
        writer.begin()
        Path(writer.path_of("a")).write_text(writer.id)
    second.remove_leftovers()
    for writer in (second, first):
        writer.commit(["a"], [])
        writer.clean_up()
    assert version_of(tmp_path) == {"a": first.id}
    assert names_in(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        "\xff",
        json.dumps({"id": "../..", "files": ["a"], "replaced": []}),
        json.dumps({"id": "0" * 32, "files": ["../a"], "replaced": []}),
        json.dumps({"id": "0" * 32, "files": ["a"], "replaced": ["/a"]}),
        json.dumps({"id": "0" * 32, "files": [1], "replaced": []}),
        json.dumps({"id": "0" * 32, "files": 3, "replaced": []}),
    ],
    ids=lambda text: text[:20],
)
def test_a_mark_that_tells_nothing_stays_until_a_commit(tmp_path: Path, text: str) -> None:
    (tmp_path / ROLE.mark).write_text(text, "latin-1")
    fill(tmp_path, OLD, "old")
    writer = DirectoryWriter(str(tmp_path), ROLE)
    writer.begin()
    writer.resume()
    writer.clean_up()
    assert names_in(tmp_path) == [*OLD, ROLE.mark]
    write(tmp_path, ("a", "b"))
    assert version_of(tmp_path) == {"a": "new", "b": "new"}


def test_a_commit_whose_files_are_gone_is_not_resumed(tmp_path: Path) -> None:
    steps = 0
    while not (tmp_path / ROLE.mark).exists():
        fill(tmp_path, OLD, "old")
        with at_step(steps, kill), suppress(Killed):
            write(tmp_path, OLD)
        steps += 1
    staged = tmp_path / ROLE.folder / json.loads((tmp_path / ROLE.mark).read_text())["id"]
    shutil.rmtree(staged)
    aside = staged.with_suffix(".old")
    aside.mkdir(exist_ok=True)
    (tmp_path / "c").rename(aside / "c")
    before = names_in(tmp_path)
    writer = DirectoryWriter(str(tmp_path), ROLE)
    writer.begin()
    writer.resume()
    writer.clean_up()
    assert names_in(tmp_path) == before
    write(tmp_path, ("a",))
    assert names_in(tmp_path) == ["a"]


def test_a_folder_in_the_place_of_a_file_is_found_before_anything_goes(tmp_path: Path) -> None:
    fill(tmp_path, ("b",), "old")
    (tmp_path / "a").mkdir()
    with pytest.raises(TargetExistsError, match="a: this is a folder"):
        write(tmp_path, ("a", "b"))
    assert names_in(tmp_path) == ["a", "b"]
    assert version_of(tmp_path) == {"b": "old"}


def test_a_link_in_the_place_of_the_hidden_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / ROLE.folder).symlink_to(tmp_path / "other")
    writer = DirectoryWriter(str(tmp_path), ROLE)
    with pytest.raises(StoreError, match="remove it"):
        writer.begin()
    writer.clean_up()
    assert names_in(tmp_path / "other") == []
