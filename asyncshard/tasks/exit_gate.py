"""A gate that makes the interpreter's exit wait for calls which the exit must not interrupt.

When the interpreter exits, a daemon thread that tries to take the GIL is ended where it is. If it was called from code
in another language, such as Rust or C++, that code may abort the whole process.
"""

from __future__ import annotations

import atexit
import os
import threading
from types import TracebackType
from typing import Self


class ExitGate:
    """A context manager for calls: ``with gate:`` enters it, and `shut` waits until all calls have left. Thread-safe.

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
        """Refuse further calls, and wait until all calls have left."""
        with self._changed:
            self._is_shut = True
            self._changed.wait_for(lambda: not self._inside)

    def forget(self) -> None:
        """Open the gate again, in a forked child process: it has none of the threads that had entered the gate."""
        self._open()


EXIT_GATE = ExitGate()
"""The gate of this interpreter, shut when it exits. It holds no state of a load or a save."""

atexit.register(EXIT_GATE.shut)
os.register_at_fork(after_in_child=EXIT_GATE.forget)
