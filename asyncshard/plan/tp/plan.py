"""Plans of tensor parallelism: rules that give each tensor of a checkpoint a placement by its name."""

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

YieldingGil = Callable[[Iterable[int]], Iterable[int]]
"""A function that yields numbers unchanged, and releases the GIL now and then; ``iter`` never releases it."""

_UNMATCHED = ("replicate", "error")
_WHOLE = Replicate()


class TpMatch(NamedTuple):
    """The rules without a name, and the names without a rule."""

    unused: tuple[str, ...]
    """Rules that match no name, as they are written in the plan."""
    unmatched: tuple[str, ...]
    """Names that no rule matches, in their order."""


class TpPlan:
    """Rules that say by name how the tensors of a checkpoint are divided among ranks.

    A plan is immutable, is compared by its rules, and can be pickled.

    Parameters
    ----------
    rules : mapping of str to str or placement
        A key is the name of a parameter (``model.embed_tokens.weight``) or of a module (``layers.*.self_attn.q_proj``).
        In a key, ``*`` stands for a number and nothing else; a rule with the layer's number takes precedence over one
        with ``*``. A value is a `Shard`, `PackedShard` or `Replicate`, a ``Shard`` or ``Replicate`` of
        ``torch.distributed.tensor``, or a word of transformers:

        - ``colwise`` cuts a weight along dimension -2, and a bias along its only dimension;
        - ``rowwise`` cuts a weight along the last dimension, and leaves a bias whole;
        - ``packed_colwise`` and ``packed_rowwise`` cut two tensors of equal size, fused along that dimension;
        - ``replicate``, and words that place nothing, such as ``replicated_with_grad_allreduce``, cut nothing.
    unmatched : {"replicate", "error"}
        For a tensor that no rule matches: "replicate" gives every rank the whole tensor, "error" refuses the load.

    Raises
    ------
    ValueError
        A word is unknown or refused, no file can hold a placement, two rules for the same names differ, or `unmatched`
        has another value.
    TypeError
        The rules are not a mapping, a key is not a text, or a value is neither a word nor a placement.
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
        """The rules of the plan, with torch's placements replaced by those of this library."""
        return self._rules

    @property
    def unmatched(self) -> str:
        """How a tensor without a rule is treated: "replicate" or "error"."""
        return self._unmatched

    def placement_of(self, name: str, shape: tuple[int, ...]) -> Placement:
        """Return the placement of one tensor.

        Raises
        ------
        NamesError
            No rule matches, and `unmatched` is "error".
        CheckpointError
            The word of the rule cannot place a tensor of this shape.
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
        """Number the kinds of tensors of a file: tensors of one kind have the same dtype, shape and placement."""
        return self._index.kinds(tensors)[0]

    def samples(self, tables: Iterable[HeaderTable | WeightMap], yielding_gil: YieldingGil = iter) -> Iterator[str]:
        """Yield one name of each kind of tensors in the tables."""
        for table in tables:
            yield from map(table.name, yielding_gil(self._index.kinds(table)[1].tolist()))

    def match(self, names: Iterable[str]) -> TpMatch:
        """Return the rules that match none of the names, and the names that no rule matches.

        `names` are the names of the whole checkpoint, not only of the shards that one rank opens. A rule counts as used
        even if a more exact rule takes precedence over it.
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
        yielding_gil: YieldingGil = iter,
    ) -> None:
        """Check the plan against the names of the whole checkpoint.

        One name of each kind is checked; all names are read only to list them in an error. `others` are further names
        that a rule may match, although no table has them.

        Raises
        ------
        NamesError
            Rules match no name: the error's `missing` holds these rules. Or names have no rule and `unmatched` is
            "error": the error's `unexpected` holds these names.
        """
        unused, unmatched = self.match(chain(self.samples(tables, yielding_gil), others))
        if unused:
            raise NamesError(
                f"{_of(path)}the tp_plan has rules that match no tensor of the checkpoint: "
                f"{enumerate_names(unused, is_quoted=True)}. Mend or remove them: '*' stands for a number, and the "
                "name is a parameter's or its module's.",
                path=path,
                missing=unused,
            )
        if unmatched and self._unmatched == "error":
            names = (table.name(index) for table in tables for index in yielding_gil(range(len(table))))
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


def plan_of(tp_plan: object, unmatched: str = "replicate") -> TpPlan | Literal["auto"] | None:
    """Return the plan for a value of the option `tp_plan`: a mapping of rules, a plan, "auto" or None.

    Raises
    ------
    ValueError, TypeError
        The option has another value, or a rule is wrong; or `unmatched` is given and `tp_plan` is not a mapping.
    """
    if tp_plan is None or isinstance(tp_plan, TpPlan) or tp_plan == "auto":
        if unmatched != "replicate":
            raise ValueError("unmatched goes with a tp_plan that is a mapping; a TpPlan has its own")
        return "auto" if isinstance(tp_plan, str) else tp_plan
    if isinstance(tp_plan, str):
        raise ValueError(f'tp_plan must be "auto", or a mapping of names to placements, not {tp_plan!r}')
    return TpPlan(tp_plan, unmatched=unmatched)  # type: ignore[arg-type]  # TpPlan checks the type


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
    # The class is compared by its name, so that this module works without torch.
    kind = type(value).__name__
    if kind == "Shard":
        return Shard(value.dim)
    if kind == "Replicate":
        return _WHOLE
    raise ValueError(f"tp_plan: {key!r}: torch's {kind} is not how a file can hold a tensor; give Shard or Replicate")


def _check_conflicts(rules: Mapping[str, str | Placement]) -> None:
    """Raise ValueError for two rules with different values whose keys differ only in a leading ``model.``."""
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
