"""Which rules of a plan match a name, as transformers matches them.

A number stands as ``*``; the name of the parameter goes before the name of its module; and either side may leave a
leading ``model.`` out:

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

_DIGITS = re.compile("[0-9]+")
_NUMBER = r"(?:[0-9]+|\*)"
"""What a ``*`` of a rule stands for: a name may hold one itself, and then its own rule still matches it."""
_WITHIN_WORD = re.compile(r"[^.]\*|\*[^.]")


class Rule(NamedTuple):
    """One rule, under one of the spellings of its names."""

    key: str
    """As it stands in the plan."""
    value: str | Placement
    pattern: re.Pattern[str] | None
    """Of the names that it matches; None for all that are alike but for their numbers."""


class RuleIndex:
    """The rules of a plan, found by name."""

    def __init__(self, rules: Mapping[str, str | Placement]) -> None:
        is_within_word = any(map(_WITHIN_WORD.search, rules))
        self._spelling: Literal["parts", "digits"] = "digits" if is_within_word else "parts"
        """How the core is told of `_alike`."""
        self._alike = _without_digits if is_within_word else _without_numbers
        self._rules = _indexed(rules, self._alike)
        self._has_numbers = any(
            self._alike(spelling) != spelling or any(rule.pattern for rule in found)
            for spelling, found in self._rules.items()
        )

    def find(self, name: str) -> tuple[Rule, ...]:
        """Return the rules that match a name, the most exact first."""
        alike = self._alike(name)
        alike_module = alike.rpartition(".")[0]
        if not self._has_numbers:
            return self._rules.get(alike, ()) + self._rules.get(alike_module, ())
        return self._matching(name, alike) + self._matching(name.rpartition(".")[0], alike_module)

    def kinds(self, tensors: HeaderTable | WeightMap) -> tuple[NDArray[np.int32], Int64Array]:
        """Number the tensors by kinds: those of a kind have one dtype and shape, and are matched by the same rules.

        Returns the kind of each tensor, and the index of the first tensor of each kind. A weight map knows names alone.
        """
        if not self._has_numbers:
            return tensors.kinds(self._spelling)
        return np.arange(len(tensors), dtype=np.int32), np.arange(len(tensors), dtype=np.int64)

    def _matching(self, name: str, alike: str) -> tuple[Rule, ...]:
        numbered = self._rules.get(name, ()) if name != alike else ()
        others = self._rules.get(alike, ())
        return numbered + tuple(rule for rule in others if rule.pattern is None or rule.pattern.fullmatch(name))


def _without_numbers(name: str) -> str:
    """Return a name with ``*`` for each number that is a layer's or an expert's: ``w1`` stays."""
    return ".".join(["*" if part.isascii() and part.isdecimal() else part for part in name.split(".")])


def _without_digits(name: str) -> str:
    """Return a name with ``*`` for each number, as transformers did before 5: ``w*`` was how to say ``w1``."""
    return _DIGITS.sub("*", name)


def _indexed(rules: Mapping[str, str | Placement], alike_of: Callable[[str], str]) -> Mapping[str, tuple[Rule, ...]]:
    """Return the rules by the names they match, with ``*`` for numbers where the rule has one; the most exact first."""
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
