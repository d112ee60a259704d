"""Which store a path or URL gets (stores/__init__.py)."""

from pathlib import Path

import pytest

from asyncshard.errors import AccessDeniedError
from asyncshard.stores import LocalStore, from_url


@pytest.mark.parametrize("make", [str, Path, "file://{}".format, lambda path: f"file://localhost{path}"])
async def test_local_paths_in_every_form_give_a_local_store(tmp_path, make):
    (tmp_path / "a.bin").write_bytes(b"a")
    async with from_url(make(tmp_path)) as store:
        assert isinstance(store, LocalStore)
        assert store.url == str(tmp_path)
        assert await store.read("a.bin") == b"a"


async def test_a_relative_path_is_taken_from_the_working_directory_of_the_call(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"a")
    monkeypatch.chdir(tmp_path.parent)
    async with from_url(tmp_path.name) as store:
        monkeypatch.chdir("/")
        assert await store.read("a.bin") == b"a"


async def test_percent_signs_are_decoded_in_urls_alone(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a%20b").mkdir()
    for url, folder in ((f"file://{tmp_path}/a%20b", "a b"), (f"{tmp_path}/a%20b", "a%20b")):
        async with from_url(url) as store:
            assert store.url == str(tmp_path / folder)


def test_making_a_store_touches_nothing(tmp_path):
    from_url(tmp_path / "absent")


@pytest.mark.parametrize("url", ["gs://bucket/key", "ftp://host/path", "S4://bucket"])
def test_a_scheme_that_no_store_serves_is_an_error_that_names_it(url):
    with pytest.raises(ValueError, match="no store serves"):
        from_url(url)


def test_a_file_url_that_names_a_host_is_an_error():
    with pytest.raises(ValueError, match="file:///models/llama"):
        from_url("file://models/llama")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path_is_an_error(path):
    with pytest.raises(ValueError, match="not a path"):
        from_url(path)


@pytest.mark.parametrize("path", [b"bytes", 7, None])
def test_what_is_no_text_is_an_error(path):
    with pytest.raises(TypeError):
        from_url(path)


def test_an_unknown_storage_option_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        TypeError, match=r"unknown storage option endpoint; this store knows allow_symlinks, max_gap_bytes$"
    ):
        from_url("/tmp", endpoint="x")
    with pytest.raises(TypeError, match=r"unknown storage options a, b;"):
        from_url("/tmp", b=1, a=2)


async def test_storage_options_reach_the_store(tmp_path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "b.bin"
    outside.write_bytes(b"b")
    (tmp_path / "link.bin").symlink_to(outside)
    async with from_url(tmp_path) as store:
        with pytest.raises(AccessDeniedError):
            await store.read("link.bin")
    async with from_url(tmp_path, allow_symlinks=True) as store:
        assert await store.read("link.bin") == b"b"
