"""Files as the local store's threads handle them. Through a store, the same is tested in test_store.py: links that lead
out, files that change, and what is no regular file.
"""

import errno
import os

import pytest

from asyncshard.errors import (
    AccessDeniedError,
    NotRegularFileError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    StoreTimeoutError,
)
from asyncshard.stores.local.files import (
    OpenFiles,
    confine,
    open_regular,
    require_unchanged,
    translate,
    translated,
    version_of,
)


@pytest.fixture
def paths(tmp_path):
    """Five files of one byte each."""
    paths = [tmp_path / name for name in "abcde"]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def version_at(path):
    return version_of(os.stat(path))


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def borrow_once(files, path):
    with files.borrow(str(path), version_at(path)) as fd:
        assert os.pread(fd, 1, 0) == path.name.encode()
        return fd


def test_a_file_that_was_read_stays_open_for_the_next_read(paths):
    files = OpenFiles(2)
    fd = borrow_once(files, paths[0])
    assert is_open(fd)
    assert borrow_once(files, paths[0]) == fd
    files.close()
    assert not is_open(fd)


def test_the_least_recently_used_file_is_closed_when_there_are_too_many(paths):
    files = OpenFiles(2)
    a, b = borrow_once(files, paths[0]), borrow_once(files, paths[1])
    borrow_once(files, paths[0])
    borrow_once(files, paths[2])
    assert (is_open(a), is_open(b)) == (True, False)
    files.close()


def test_two_borrowers_of_one_file_get_a_descriptor_each(paths):
    files = OpenFiles(1)
    path, version = str(paths[0]), version_at(paths[0])
    with files.borrow(path, version) as one, files.borrow(path, version) as other:
        assert one != other
    assert [is_open(one), is_open(other)].count(True) == 1
    files.close()


def test_a_descriptor_that_is_lent_while_all_are_closed_is_closed_when_it_comes_back(paths):
    files = OpenFiles(2)
    with files.borrow(str(paths[0]), version_at(paths[0])) as fd:
        files.close()
        assert is_open(fd)
    assert not is_open(fd)


def test_a_borrower_that_fails_leaves_no_descriptor_open(paths):
    files = OpenFiles(2)
    with pytest.raises(ValueError, match="failed"), files.borrow(str(paths[0]), version_at(paths[0])) as fd:
        raise ValueError("failed")
    assert not is_open(fd)


def test_another_file_in_the_place_of_one_is_not_lent(paths):
    files = OpenFiles(2)
    version = version_at(paths[0])
    paths[1].replace(paths[0])
    with pytest.raises(ObjectChangedError, match="was replaced"), files.borrow(str(paths[0]), version):
        pass


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda path: path.write_bytes(b"longer"), "changed in size from 1 to 6 bytes"),
        (lambda path: path.chmod(0o600), "was changed, replaced or removed"),
        (lambda path: path.unlink(), "was changed, replaced or removed"),
    ],
)
def test_a_file_that_is_no_longer_what_it_was_says_how_it_changed(paths, change, text):
    fd = os.open(paths[0], os.O_RDONLY)
    try:
        version = version_of(os.fstat(fd))
        require_unchanged(fd, str(paths[0]), version)
        change(paths[0])
        with pytest.raises(ObjectChangedError, match=text):
            require_unchanged(fd, str(paths[0]), version)
    finally:
        os.close(fd)


def test_a_directory_is_refused_and_a_file_opened_for_reading_alone(tmp_path, paths):
    with pytest.raises(NotRegularFileError, match="a directory"):
        open_regular(str(tmp_path))
    fd = open_regular(str(paths[0]))
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOENT, ObjectNotFoundError, "no such file"),
        (errno.ENOTDIR, ObjectNotFoundError, "no such file"),
        (errno.EACCES, AccessDeniedError, "check the mode"),
        (errno.ELOOP, StoreError, "form a loop"),
        (errno.EMFILE, StoreError, "ulimit -n"),
        (errno.ETIMEDOUT, StoreTimeoutError, "at offset 1,000"),
        (errno.EIO, StoreError, "at offset 1,000"),
    ],
)
def test_an_error_of_the_system_becomes_one_that_says_what_to_do(number, kind, text):
    error = translate(OSError(number, os.strerror(number)), "/a", start=1000, stop=2000)
    assert type(error) is kind
    assert text in str(error)
    assert (error.path, error.start, error.stop, error.errno) == ("/a", 1000, 2000, number)


def test_an_error_that_is_translated_already_is_left_alone():
    first = ObjectNotFoundError("/a: gone", path="/a")
    with pytest.raises(ObjectNotFoundError) as caught, translated("/b"):
        raise first
    assert caught.value is first


def test_a_name_is_confined_to_the_root_unless_links_are_allowed(tmp_path, paths):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(paths[0])
    (root / "inside").write_bytes(b"x")
    assert confine(str(root), "inside", allow_symlinks=False) == str(root / "inside")
    assert confine(str(root), "link", allow_symlinks=True) == str(root / "link")
    for name in ("link", "../a", str(paths[0])):
        with pytest.raises(AccessDeniedError, match="allow_symlinks"):
            confine(str(root), name, allow_symlinks=False)
