"""Which rules of a plan match the name of a tensor, by the matching of transformers.

In a rule, ``*`` matches a number. A rule for the parameter takes precedence over a rule for its module. A leading
``model.`` may be missing in the rule or in the name. These rules match the name in the first line, the most exact rule
first:

    model.layers.7.self_attn.q_proj.weight
        model.layers.7.self_attn.q_proj.weight     the parameter
        model.layers.*.self_attn.q_proj.weight
        model.layers.7.self_attn.q_proj            its module
        model.layers.*.self_attn.q_proj
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import HeaderTable, WeightMap
from asyncshard._typing import Int64Array
from asyncshard.plan.division.placements import Placement

PREFIX = "model."
"""The prefix that may be missing in a rule or in a name."""

_DIGITS = re.compile("[0-9]+")
_NUMBER = r"(?:[0-9]+|\*)"
"""The texts that a ``*`` of a rule matches. A name that holds ``*`` itself is still matched by a rule of that name."""
_WITHIN_WORD = re.compile(r"[^.]\*|\*[^.]")


class Rule(NamedTuple):
    """One rule of a plan."""

    key: str
    """The key in the plan."""
    value: str | Placement
    """The word or the placement in the plan."""
    pattern: re.Pattern[str] | None
    """Pattern of the names that the rule matches; None if it matches all names that differ only in their numbers."""


class RuleIndex:
    """An index of the rules of a plan by the names that they match."""

    def __init__(self, rules: Mapping[str, str | Placement]) -> None:
        is_within_word = any(map(_WITHIN_WORD.search, rules))
        self._spelling: Literal["parts", "digits"] = "digits" if is_within_word else "parts"
        """The option of the compiled core that replaces numbers as `_alike` does."""
        self._alike = _without_digits if is_within_word else _without_numbers
        self._rules = _indexed(rules, self._alike)
        self._has_numbers = any(
            self._alike(spelling) != spelling or any(rule.pattern for rule in found)
            for spelling, found in self._rules.items()
        )

    def find(self, name: str) -> tuple[Rule, ...]:
        """Return the rules that match a name, the most exact rule first."""
        alike = self._alike(name)
        alike_module = alike.rpartition(".")[0]
        if not self._has_numbers:
            return self._rules.get(alike, ()) + self._rules.get(alike_module, ())
        return self._matching(name, alike) + self._matching(name.rpartition(".")[0], alike_module)

    def kinds(self, tensors: HeaderTable | WeightMap) -> tuple[NDArray[np.int32], Int64Array]:
        """Number the kinds of tensors: tensors of one kind have the same dtype and shape, and match the same rules.

        Returns the kind of each tensor, and the index of the first tensor of each kind. A weight map has no dtypes and
        shapes, so its kinds depend on the names alone.
        """
        if not self._has_numbers:
            return tensors.kinds(self._spelling)
        return np.arange(len(tensors), dtype=np.int32), np.arange(len(tensors), dtype=np.int64)

    def _matching(self, name: str, alike: str) -> tuple[Rule, ...]:
        numbered = self._rules.get(name, ()) if name != alike else ()
        others = self._rules.get(alike, ())
        return numbered + tuple(rule for rule in others if rule.pattern is None or rule.pattern.fullmatch(name))


def _without_numbers(name: str) -> str:
    """Return a name with ``*`` for each of its dot-separated parts that is a number; ``w1`` is not replaced."""
    return ".".join(["*" if part.isascii() and part.isdecimal() else part for part in name.split(".")])


def _without_digits(name: str) -> str:
    """Return a name with ``*`` for each run of digits. Before version 5, transformers wrote ``w*`` to match ``w1``."""
    return _DIGITS.sub("*", name)


def _indexed(rules: Mapping[str, str | Placement], alike_of: Callable[[str], str]) -> Mapping[str, tuple[Rule, ...]]:
    """Return the rules by the names they match, with ``*`` for numbers left open by the rule; exact rules first."""
    ranked: dict[str, list[tuple[tuple[int, bool, str], Rule]]] = {}
    for key, value in rules.items():
        for spelling in {key, PREFIX + key, key.removeprefix(PREFIX)} - {""}:
            alike = alike_of(spelling)
            order = (spelling.count("*"), spelling != key, key)
            if "*" in spelling and alike != spelling:
                literals = map(re.escape, spelling.split("*"))
                ranked.setdefault(alike, []).append((order, Rule(key, value, re.compile(_NUMBER.join(literals)))))
            else:
                ranked.setdefault(spelling, []).append((order, Rule(key, value, None)))
    return {
        alike: tuple(rule for _, rule in sorted(found, key=lambda item: item[0])) for alike, found in ranked.items()
    }
