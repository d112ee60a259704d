"""Plans of tensor parallelism: which placement each tensor of a checkpoint has, by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from reprlib import repr as short_repr
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import HeaderTable, WeightMap
from asyncshard.errors import NamesError
from asyncshard.plan.division.placements import PackedShard, Placement, Replicate, Shard
from asyncshard.plan.text import enumerate_names
from asyncshard.plan.tp.rules import PREFIX, RuleIndex
from asyncshard.plan.tp.styles import check_word, placement_of_word

Paced = Callable[[Iterable[int]], Iterable[int]]
"""Passes numbers on, and lets others have their turn now and then."""

_UNMATCHED = ("replicate", "error")
_WHOLE = Replicate()


class TpMatch(NamedTuple):
    """How the rules of a plan and the names of a checkpoint meet."""

    unused: tuple[str, ...]
    """Rules that match no name, as they stand in the plan."""
    unmatched: tuple[str, ...]
    """Names that no rule matches, in their order."""


class TpPlan:
    """Say by name how the tensors of a checkpoint are divided among ranks.

    A plan is a value: it never changes, is compared by its rules, and pickles.

    Parameters
    ----------
    rules : mapping of str to str or placement
        By the name of a parameter (``model.embed_tokens.weight``) or of a module (``layers.*.self_attn.q_proj``), in
        which ``*`` stands for a number and nothing else. A layer's own number goes before ``*``. The placement is one
        of ours, ``torch.distributed.tensor``'s ``Shard`` or ``Replicate``, or a word of transformers:

        - ``colwise``: a weight along dimension -2, a bias along its only one;
        - ``rowwise``: a weight along the last dimension, a bias whole;
        - ``packed_colwise``, ``packed_rowwise``: the same for two tensors of one size fused along that dimension;
        - ``replicate`` and those which place nothing, such as ``replicated_with_grad_allreduce``: whole.
    unmatched : {"replicate", "error"}
        What becomes of a tensor that no rule matches: every rank has it whole, or the load is refused.

    Raises
    ------
    ValueError
        An unknown or refused word, a placement that no file can hold, two rules that mean the same names and
        differ, or an unknown value of `unmatched`.
    TypeError
        The rules are not a mapping, a key is not a text, or a value neither a word nor a placement.
    """

    __slots__ = ("_index", "_rules", "_unmatched")
    _index: RuleIndex
    _rules: Mapping[str, str | Placement]
    _unmatched: str

    def __init__(self, rules: Mapping[str, Any], *, unmatched: str = "replicate") -> None:
        if not isinstance(rules, Mapping):
            raise TypeError(f"tp_plan must be a mapping of names to placements, got {short_repr(rules)}")
        if unmatched not in _UNMATCHED:
            raise ValueError(f"unmatched must be 'replicate' or 'error', got {short_repr(unmatched)}")
        read = {_checked_key(key): _checked_value(key, value) for key, value in rules.items()}
        _check_conflicts(read)
        object.__setattr__(self, "_rules", MappingProxyType(read))
        object.__setattr__(self, "_unmatched", unmatched)
        object.__setattr__(self, "_index", RuleIndex(read))

    @property
    def rules(self) -> Mapping[str, str | Placement]:
        """The rules, torch's placements turned into ours."""
        return self._rules

    @property
    def unmatched(self) -> str:
        """What becomes of a tensor that no rule matches."""
        return self._unmatched

    def placement_of(self, name: str, shape: tuple[int, ...]) -> Placement:
        """Return the placement of one tensor.

        Raises
        ------
        NamesError
            No rule matches, and the plan says that this is an error.
        CheckpointError
            The shape is not one that the word of the rule can place.
        """
        found = self._index.find(name)
        if found:
            value = found[0].value
            return placement_of_word(value, name, shape) if isinstance(value, str) else value
        if self._unmatched == "error":
            raise _unmatched_error([name], None)
        return _WHOLE

    def has_rule(self, name: str) -> bool:
        """Return whether a rule matches the name."""
        return bool(self._index.find(name))

    def kinds(self, tensors: HeaderTable) -> NDArray[np.int32]:
        """Number the tensors of a file so that those of a number have one dtype, shape and placement."""
        return self._index.kinds(tensors)[0]

    def samples(self, tables: Iterable[HeaderTable | WeightMap], paced: Paced = iter) -> Iterator[str]:
        """Yield a name of each kind of tensor that the tables have."""
        for table in tables:
            yield from map(table.name, paced(self._index.kinds(table)[1].tolist()))

    def match(self, names: Iterable[str]) -> TpMatch:
        """Return which rules match none of the names, and which names no rule matches.

        `names` are those of the whole checkpoint, not of the shards that one rank opens. A rule counts as used too
        where a more exact one goes before it.
        """
        used: set[str] = set()
        unmatched = []
        for name in names:
            found = self._index.find(name)
            used.update(rule.key for rule in found)
            if not found:
                unmatched.append(name)
        return TpMatch(tuple(key for key in self._rules if key not in used), tuple(unmatched))

    def check(
        self,
        tables: Sequence[HeaderTable | WeightMap],
        others: Iterable[str] = (),
        *,
        path: str | None = None,
        paced: Paced = iter,
    ) -> None:
        """Check the plan against the names of the whole checkpoint.

        A name of each kind is looked at; all are read only where they are to be listed. `others` are names that a rule
        matches and no table has.

        Raises
        ------
        NamesError
            A rule matches nothing: its `missing` are the rules. Or, where the plan says so, a name is matched by no
            rule: its `unexpected` are the names.
        """
        unused, unmatched = self.match(chain(self.samples(tables, paced), others))
        if unused:
            raise NamesError(
                f"{_of(path)}the tp_plan has rules that match no tensor of the checkpoint: "
                f"{enumerate_names(unused, is_quoted=True)}. Mend or remove them: '*' stands for a number, and the "
                "name is a parameter's or its module's.",
                path=path,
                missing=unused,
            )
        if unmatched and self._unmatched == "error":
            names = (table.name(index) for table in tables for index in paced(range(len(table))))
            raise _unmatched_error(self.match(names).unmatched, path)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a TpPlan does not change: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a TpPlan does not change: cannot delete {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TpPlan):
            return NotImplemented
        return self._rules == other._rules and self._unmatched == other._unmatched

    def __hash__(self) -> int:
        return hash((frozenset(self._rules.items()), self._unmatched))

    def __repr__(self) -> str:
        return f"TpPlan({dict(self._rules)!r}, unmatched={self._unmatched!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (dict(self._rules), self._unmatched)


def plan_of(given: object, unmatched: str = "replicate") -> TpPlan | Literal["auto"] | None:
    """Return the plan that the option `tp_plan` stands for: a mapping of rules, a plan, "auto" or None.

    Raises
    ------
    ValueError, TypeError
        It is something else, or a rule is wrong; or `unmatched` is given for what is no mapping.
    """
    if given is None or isinstance(given, TpPlan) or given == "auto":
        if unmatched != "replicate":
            raise ValueError("unmatched goes with a tp_plan that is a mapping; a TpPlan has its own")
        return "auto" if isinstance(given, str) else given
    if isinstance(given, str):
        raise ValueError(f'tp_plan must be "auto", or a mapping of names to placements, not {given!r}')
    return TpPlan(given, unmatched=unmatched)  # type: ignore[arg-type]  # which checks it


def _rebuild(rules: Mapping[str, str | Placement], unmatched: str) -> TpPlan:
    return TpPlan(rules, unmatched=unmatched)


def _checked_key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"tp_plan: a name must be a text, got {short_repr(key)}")
    if not key:
        raise ValueError("tp_plan: a name must not be empty")
    return key


def _checked_value(key: str, value: object) -> str | Placement:
    if isinstance(value, str):
        check_word(key, value)
        return value
    if isinstance(value, Shard | PackedShard | Replicate):
        return value
    if type(value).__module__.startswith("torch.distributed"):
        return _of_torch(key, value)
    raise TypeError(f"tp_plan: {key!r} needs a word or a placement, got {short_repr(value)}")


def _of_torch(key: str, value: Any) -> Placement:
    # By name: torch need not be there for those who do not use it.
    kind = type(value).__name__
    if kind == "Shard":
        return Shard(value.dim)
    if kind == "Replicate":
        return _WHOLE
    raise ValueError(f"tp_plan: {key!r}: torch's {kind} is not how a file can hold a tensor; give Shard or Replicate")


def _check_conflicts(rules: Mapping[str, str | Placement]) -> None:
    """Raise ValueError for two rules that differ in a leading ``model.`` and in what they say."""
    for key, value in rules.items():
        other = PREFIX + key
        if other in rules and rules[other] != value:
            raise ValueError(f"tp_plan: {key!r} and {other!r} mean the same names but differ; keep one of them")


def _unmatched_error(names: Sequence[str], path: str | None) -> NamesError:
    return NamesError(
        f"{_of(path)}no rule of the tp_plan matches {enumerate_names(names, is_quoted=True)}. Add rules for them, or "
        "pass unmatched='replicate' to have them whole on every rank.",
        path=path,
        unexpected=tuple(names),
    )


def _of(path: str | None) -> str:
    return "" if path is None else f"{path}: "
