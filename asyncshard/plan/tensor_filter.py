"""Which tensors of a checkpoint are wanted, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate

NameFilterSpec = str | Iterable[str] | Callable[[str], bool]
"""A name or glob, several of them, or a predicate of a name."""


class TensorFilter:
    """Tell of a name whether its tensor is wanted. Immutable.

    Parameters
    ----------
    wanted : str, iterable of str, or callable
        Names, and globs with ``*``, ``?`` and ``[...]`` (``*`` stands for dots too); or a predicate of a name.

    Raises
    ------
    TypeError
        Something else.
    ValueError
        No name at all.
    """

    __slots__ = ("_match", "_predicate", "names")

    def __init__(self, wanted: NameFilterSpec) -> None:
        self.names: frozenset[str] = frozenset()
        """Those of `wanted` that are no globs: each of them must be there."""
        self._predicate: Callable[[str], bool] | None = None
        self._match: re.Pattern[str] | None = None
        if callable(wanted):
            self._predicate = wanted
            return
        if not isinstance(wanted, str | Iterable):
            raise TypeError(f"tensor_filter must be a name, names, or a function of a name, not {wanted!r}")
        texts = [wanted] if isinstance(wanted, str) else list(wanted)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"tensor_filter must hold names alone, not {texts!r}")
        if not texts:
            raise ValueError("tensor_filter names no tensor")
        globs = [text for text in texts if any(sign in text for sign in "*?[")]
        self.names = frozenset(texts) - frozenset(globs)
        if globs:
            self._match = re.compile("|".join(map(translate, globs)))

    def __call__(self, name: str) -> bool:
        if self._predicate is not None:
            return bool(self._predicate(name))
        return name in self.names or (self._match is not None and self._match.match(name) is not None)
