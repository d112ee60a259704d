"""The families of errors: their built-in bases, their messages, and pickling."""

import builtins
import pickle

import pytest

from asyncshard import errors
from asyncshard.errors import AsyncShardError, NamesError, ObjectNotFoundError, StoreError

CLASSES = sorted(
    (
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, AsyncShardError) and value is not AsyncShardError
    ),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_is_also_the_built_in_that_a_caller_would_catch(kind):
    built_in = {base for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base}
    assert built_in - {object, BaseException, Exception}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_text_of_an_error_is_its_message(kind):
    error = kind("model.safetensors: it is damaged", path="model.safetensors")
    assert str(error) == error.message == "model.safetensors: it is damaged"


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_keeps_everything_when_it_is_pickled(kind):
    error = kind("the message", path="model.safetensors")
    error.filled, error.torn = ("a",), ("b",)
    error.__dict__["attempts"] = 3
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "the message"
    assert vars(copy) == vars(error)


def test_the_errno_of_a_store_error_survives_pickling():
    error = StoreError("no space left", path="/data", errno=28, start=0, stop=8)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.errno, copy.start, copy.stop) == (28, 0, 8)


def test_names_are_attributes_of_the_error_about_them():
    error = NamesError("2 names", missing=("a",), unexpected=("b",))
    assert (error.missing, error.unexpected, error.path) == (("a",), ("b",), None)


def test_only_errors_of_storage_that_may_pass_are_retryable():
    retryable = {kind.__name__ for kind in CLASSES if kind.retryable}
    assert retryable == {"ObjectChangedError", "StoreTimeoutError", "ThrottledError"}


def test_a_missing_file_is_caught_as_file_not_found_error():
    with pytest.raises(FileNotFoundError):
        raise ObjectNotFoundError("there is no such file", path="x")
