"""`read_header`: the header of one file, and of nothing else."""

import pytest

from asyncshard import read_header
from asyncshard.errors import FormatError, NotRegularFileError, ObjectNotFoundError


@pytest.fixture
def file(tmp_path, checkpoints):
    return checkpoints.write_file(tmp_path / "a.safetensors", checkpoints.tensors(3), metadata={"by": "a test"})


async def test_a_header_has_the_tensors_and_the_metadata_of_its_file(file):
    header = await read_header(file)
    assert (list(header), dict(header.metadata)) == (["layer.0", "layer.1", "layer.2"], {"by": "a test"})
    assert header.file_size == file.stat().st_size


async def test_a_url_names_a_file_too(file):
    assert len(await read_header(f"file://{file}")) == 3


async def test_a_directory_is_an_error_that_asks_for_a_file(file):
    with pytest.raises(NotRegularFileError, match="name one file"):
        await read_header(file.parent)


async def test_a_file_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ObjectNotFoundError, match="absent"):
        await read_header(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("limits", [{"max_header_bytes": 100}, {"max_tensors": 2}])
async def test_a_header_above_a_limit_is_an_error(file, limits):
    with pytest.raises(FormatError):
        await read_header(file, **limits)


async def test_options_of_the_store_are_passed_on(file):
    with pytest.raises(TypeError, match="nonsense"):
        await read_header(file, storage_options={"nonsense": 1})
