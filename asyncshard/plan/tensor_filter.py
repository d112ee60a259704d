"""Filters that select tensors of a checkpoint by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate

NameFilterSpec = str | Iterable[str] | Callable[[str], bool]
"""A filter as a caller writes it: a name or glob, several of them, or a function that takes a name."""


class TensorFilter:
    """A function that returns for a name whether the tensor is wanted. Immutable.

    Parameters
    ----------
    wanted : str, iterable of str, or callable
        A name or a glob, or several of them; or a function that takes a name and returns whether it is wanted. In a
        glob, ``*``, ``?`` and ``[...]`` have their usual meaning; ``*`` matches dots too.

    Raises
    ------
    TypeError
        `wanted` has another type, or holds something that is not a text.
    ValueError
        `wanted` is empty.
    """

    __slots__ = ("_match", "_predicate", "names")

    def __init__(self, wanted: NameFilterSpec) -> None:
        self.names: frozenset[str] = frozenset()
        """The names in `wanted` that are not globs: the checkpoint must have a tensor for each of them."""
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
