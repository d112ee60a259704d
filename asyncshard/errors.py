"""Every error that asyncshard raises, in families that say whose fault it is and whether a retry helps.

``AsyncShardError``
    ``FormatError``        a file is not valid: write or fetch the file again
    ``CheckpointError``    each file is valid, but the files together are not the checkpoint that was asked for
    ``DestinationError``   the caller's arrays or state dict cannot take the tensors of the checkpoint
    ``BudgetError``        the memory budget is too small for the call
    ``StreamClosedError``  a stream was used after it had been closed
    ``StoreError``         the bytes could not be read or written; ``retryable`` says whether a retry may help

Each error also inherits from the built-in exception that a caller would otherwise catch. All errors can be pickled.
"""

from __future__ import annotations

from typing import Any


class AsyncShardError(Exception):
    """Base of every error raised by asyncshard.

    Attributes
    ----------
    path : str or None
        The file, object or directory that the error is about.
    tensor : str or None
        The name of the tensor that the error is about, if it is about one.
    filled, torn : tuple of str
        After a failed load into the caller's own memory: the names of the tensors that are completely written, and of
        those that are partly written.
    """

    retryable: bool = False
    """Whether the same call may succeed when it is repeated."""

    def __init__(self, message: str, *, path: str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.tensor = tensor
        self.filled: tuple[str, ...] = ()
        self.torn: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message  # KeyError would show the repr of the message, OSError its errno

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        if isinstance(self, OSError):
            state["errno"] = self.errno  # OSError stores it outside of __dict__
        return _rebuild, (type(self), self.args, state)


def _rebuild(cls: type[AsyncShardError], args: tuple[Any, ...], state: dict[str, Any]) -> AsyncShardError:
    error = cls.__new__(cls, *args)
    error.args = args
    for name, value in state.items():
        setattr(error, name, value)
    return error


class FormatError(AsyncShardError, ValueError):
    """A file breaks a rule of its format.

    Attributes
    ----------
    offset : int or None
        The byte of the file at which the rule is broken, if it is known.
    """

    def __init__(
        self, message: str, *, path: str | None = None, tensor: str | None = None, offset: int | None = None
    ) -> None:
        super().__init__(message, path=path, tensor=tensor)
        self.offset = offset


class UnsupportedTensorError(FormatError):
    """A tensor is legal in its file, but the array library has no way to represent it."""


class CheckpointError(AsyncShardError, ValueError):
    """The files of a checkpoint do not fit together: some are missing, or duplicate or contradict each other."""


class NamesError(CheckpointError, KeyError):
    """Tensors are missing from a checkpoint, or it has tensors that were not expected.

    Attributes
    ----------
    missing, unexpected : tuple of str
        The names of these tensors; for a ``tp_plan``, `missing` holds the rules that match no tensor.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, path=path)
        self.missing = missing
        self.unexpected = unexpected


class DestinationError(AsyncShardError, ValueError):
    """A destination cannot take its tensor: shape, dtype, layout, or memory shared with another destination."""


class BudgetError(AsyncShardError, ValueError):
    """The memory budget is smaller than the memory that the call needs at one time.

    Attributes
    ----------
    needed_bytes, budget_bytes : int
        The bytes that the call needs, and the bytes of the budget.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        tensor: str | None = None,
        needed_bytes: int = 0,
        budget_bytes: int = 0,
    ) -> None:
        super().__init__(message, path=path, tensor=tensor)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


class StreamClosedError(AsyncShardError, RuntimeError):
    """A stream was closed before its end, and then asked for another tensor."""


class StoreError(AsyncShardError, OSError):
    """Bytes could not be read from storage, or written to it.

    Attributes
    ----------
    start, stop : int or None
        The half-open byte range of the file that was requested.
    bucket, key : str or None
        The bucket and key of an object in S3.
    status : int or None
        The status code of the HTTP response.
    request_id : str or None
        The identifier that the server gave the request.
    attempts : int or None
        How many times the request was made.
    """

    bucket: str | None = None
    key: str | None = None
    status: int | None = None
    request_id: str | None = None
    attempts: int | None = None

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        tensor: str | None = None,
        start: int | None = None,
        stop: int | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message, path=path, tensor=tensor)
        self.start = start
        self.stop = stop
        self.errno = errno


class ObjectNotFoundError(StoreError, FileNotFoundError):
    """The file, object or directory does not exist."""


class TargetExistsError(StoreError, FileExistsError):
    """A file or directory exists at the place of a new checkpoint, and the caller did not ask to replace it."""


class AccessDeniedError(StoreError, PermissionError):
    """Access to the file or object is denied, or it lies outside of the directory that was named."""


class NotRegularFileError(StoreError):
    """The path of a regular file leads to a directory, FIFO, device or socket."""


class ObjectChangedError(StoreError):
    """The file or object was replaced or changed during a load; no bytes of the new version were delivered."""

    retryable = True


class TruncatedError(StoreError):
    """The file or object ended before the bytes that its header promises."""


class StoreTimeoutError(StoreError, TimeoutError):
    """The storage did not answer in time."""

    retryable = True


class ThrottledError(StoreError):
    """The storage asked for fewer requests, and still did so after pauses."""

    retryable = True


class ChecksumError(StoreError):
    """The bytes that were read do not match their checksum; ``retryable`` says whether another read may help."""
