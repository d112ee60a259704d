"""Every error that asyncshard raises, in families that say whose fault it is and whether a retry helps.

``AsyncShardError``
    ``FormatError``        the bytes of a file are not a valid checkpoint: fix the file
    ``CheckpointError``    each file is valid, the set of them is not what was asked for
    ``DestinationError``   the caller's arrays or state dict cannot take what the checkpoint holds
    ``BudgetError``        the memory budget is too small for what was asked
    ``StreamClosedError``  a stream was used after it had been closed
    ``StoreError``         the bytes could not be got; ``retryable`` says whether trying again may help

Each also inherits the built-in exception that a caller would otherwise catch, and pickles.
"""

from __future__ import annotations

from typing import Any


class AsyncShardError(Exception):
    """Base of every error raised by asyncshard.

    Attributes
    ----------
    path : str or None
        The file, object or directory concerned.
    tensor : str or None
        The tensor concerned, where there is one.
    filled, torn : tuple of str
        After a failed load into the caller's own memory: the tensors that are whole, and those partly written.
    """

    retryable: bool = False
    """Whether the same call may succeed if it is made again."""

    def __init__(self, message: str, *, path: str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.tensor = tensor
        self.filled: tuple[str, ...] = ()
        self.torn: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message  # KeyError would show its repr, OSError its errno

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        if isinstance(self, OSError):
            state["errno"] = self.errno  # OSError keeps it outside of __dict__
        return _rebuild, (type(self), self.args, state)


def _rebuild(cls: type[AsyncShardError], args: tuple[Any, ...], state: dict[str, Any]) -> AsyncShardError:
    error = cls.__new__(cls, *args)
    error.args = args
    for name, value in state.items():
        setattr(error, name, value)
    return error


class FormatError(AsyncShardError, ValueError):
    """A file breaks a rule of its format; ``offset`` is the byte of the file where that shows, if known."""

    def __init__(
        self, message: str, *, path: str | None = None, tensor: str | None = None, offset: int | None = None
    ) -> None:
        super().__init__(message, path=path, tensor=tensor)
        self.offset = offset


class UnsupportedTensorError(FormatError):
    """A tensor is legal in its file, but the array library has no way to represent it."""


class CheckpointError(AsyncShardError, ValueError):
    """The files of a checkpoint do not make up a whole: a gap, a duplicate, a disagreement."""


class NamesError(CheckpointError, KeyError):
    """Names of tensors are missing from the checkpoint, or are there and were not expected.

    Attributes
    ----------
    missing, unexpected : tuple of str
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
    """The memory budget cannot hold what the call needs at once.

    Attributes
    ----------
    needed_bytes, budget_bytes : int
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
    """A stream was closed before its end, and then asked for more."""


class StoreError(AsyncShardError, OSError):
    """The bytes could not be read or written.

    Attributes
    ----------
    start, stop : int or None
        The byte range of the file that was asked for, half-open.
    bucket, key : str or None
        Of an object in S3.
    status : int or None
        Of the HTTP answer.
    request_id : str or None
        What the server calls the request.
    attempts : int or None
        How often it was made.
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
    """There is no such file, object or directory."""


class TargetExistsError(StoreError, FileExistsError):
    """Something stands where a checkpoint is to be written, and it was not asked to be replaced."""


class AccessDeniedError(StoreError, PermissionError):
    """The file or object may not be read, or lies outside the directory that was named."""


class NotRegularFileError(StoreError):
    """A directory, FIFO, device or socket stands where a regular file should be."""


class ObjectChangedError(StoreError):
    """The file or object is not the one that the load began with; nothing of the new one was delivered."""

    retryable = True


class TruncatedError(StoreError):
    """The file or object ended before the bytes that its header promises."""


class StoreTimeoutError(StoreError, TimeoutError):
    """The storage did not answer in time."""

    retryable = True


class ThrottledError(StoreError):
    """The storage asks for fewer requests, and went on doing so after pauses."""

    retryable = True


class ChecksumError(StoreError):
    """What was read does not match the checksum of the object; ``retryable`` says whether a new read may."""
