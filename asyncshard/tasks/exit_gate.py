"""The end of the interpreter waits for calls that would not survive it.

A daemon thread that wants the GIL back after the interpreter has begun to end is unwound where it stands. Code of other
languages below it (Rust, C++) may answer that by aborting the whole process.
"""

from __future__ import annotations

import atexit
import os
import threading
from types import TracebackType
from typing import Self


class ExitGate:
    """``with gate:`` lets calls in until it is shut; shutting it waits for those that are inside. Thread-safe.

    Entering a gate that is shut raises RuntimeError.
    """

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._is_shut = False

    def __enter__(self) -> Self:
        with self._changed:
            if self._is_shut:
                raise RuntimeError("the interpreter is ending: nothing more is begun")
            self._inside += 1
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def shut(self) -> None:
        """Let nobody in any more, and wait until nobody is inside."""
        with self._changed:
            self._is_shut = True
            self._changed.wait_for(lambda: not self._inside)

    def forget(self) -> None:
        """Open it anew, for a child process, which has none of the threads that were inside."""
        self._open()


EXIT_GATE = ExitGate()
"""The one of this interpreter, which has one end. It is no state of any load or save."""

atexit.register(EXIT_GATE.shut)
os.register_at_fork(after_in_child=EXIT_GATE.forget)
