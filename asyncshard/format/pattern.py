"""The names of rank shards: ``model-rank-{rank}-part-{part}.safetensors`` and its kin.

A template is literal text with one ``{rank}`` (or ``{tp_rank}``, its other name), one ``{part}`` and at most one
``{pp_rank}``. Each stands for 1 to 18 ASCII digits, leading zeros allowed. A name matches whole or not at all.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field
from typing import NamedTuple, SupportsIndex

DEFAULT_TEMPLATE = "model-rank-{rank}-part-{part}.safetensors"
"""What vLLM's sharded state uses without pipeline parallelism."""

PP_TEMPLATE = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"
"""What it uses with pipeline parallelism."""

_FIELDS = {"rank": "rank", "tp_rank": "rank", "part": "part", "pp_rank": "pp_rank"}
_MAX_DIGITS = 18  # such numbers fit int64, and int() of them is quick


class ShardName(NamedTuple):
    """What the name of a rank shard says; ``pp_rank`` is 0 where the template has none."""

    pp_rank: int
    rank: int
    part: int


@dataclass(frozen=True, slots=True)
class ShardPattern:
    """How the files of a sharded checkpoint are named.

    Parameters
    ----------
    template : str
        A file name with ``{rank}`` (or ``{tp_rank}``) and ``{part}``, each once, and ``{pp_rank}`` at most once. All
        other text stands for itself. Two placeholders must have something other than digits between them.

    Raises
    ------
    ValueError
        The template breaks one of these rules or holds a path separator.
    """

    template: str = DEFAULT_TEMPLATE
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_regex", _compile(self.template))

    @property
    def has_pp_rank(self) -> bool:
        """Whether names carry a pipeline rank."""
        return "pp_rank" in self._regex.groupindex

    def format_for_rank(self, rank: int, part: int | str = "*", pp_rank: int = 0) -> str:
        """Name the file of one rank and part, or with ``part="*"`` write the glob of all its parts.

        Raises
        ------
        ValueError
            A number is negative or too long, ``part`` is a text other than ``"*"``, or ``pp_rank`` is not 0 and the
            template has no place for it.
        """
        if isinstance(part, str) and part != "*":
            raise ValueError(f"part must be a number or '*', got {part!r}")
        texts = {
            "rank": _digits(rank, "rank"),
            "part": part if isinstance(part, str) else _digits(part, "part"),
            "pp_rank": _digits(pp_rank, "pp_rank"),
        }
        if texts["pp_rank"] != "0" and not self.has_pp_rank:
            raise ValueError(f"pp_rank is {pp_rank}, but the template {self.template!r} has no {{pp_rank}}")
        return re.sub(r"\{(\w+)\}", lambda match: texts[_FIELDS[match[1]]], self.template)

    def parse(self, name: str) -> ShardName | None:
        """Read the numbers out of a file name; None if it does not match from its first to its last character."""
        match = self._regex.fullmatch(name)
        if match is None:
            return None
        return ShardName(int(match["pp_rank"]) if self.has_pp_rank else 0, int(match["rank"]), int(match["part"]))

    def parse_filename(self, name: str) -> tuple[int, int] | None:
        """Read ``(rank, part)`` out of a file name; None if it does not match from its first to its last character."""
        parsed = self.parse(name)
        return None if parsed is None else (parsed.rank, parsed.part)


def _compile(template: str) -> re.Pattern[str]:
    if not isinstance(template, str):
        raise ValueError(f"a template is a str, got {type(template).__name__}")
    if any(separator in template for separator in "/\\\0"):
        raise ValueError(f"template {template!r}: a file name holds no path separator and no NUL")
    # Odd places hold the placeholders' names, even ones the text between them.
    pieces = re.split(r"\{([^{}]*)\}", template)
    if any("{" in text or "}" in text for text in pieces[::2]):
        raise ValueError(f"template {template!r}: a brace is not part of a placeholder; write {{rank}}, {{part}}")
    names = pieces[1::2]
    _check_placeholders(template, names)
    if any(re.fullmatch("[0-9]*", text) for text in pieces[2:-1:2]):
        raise ValueError(f"template {template!r}: put text other than digits between two placeholders")
    regex = re.escape(pieces[0])
    for name, text in zip(names, pieces[2::2], strict=True):
        regex += f"(?P<{_FIELDS[name]}>[0-9]{{1,{_MAX_DIGITS}}})" + re.escape(text)
    return re.compile(regex)


def _check_placeholders(template: str, names: list[str]) -> None:
    unknown = [name for name in names if name not in _FIELDS]
    if unknown:
        raise ValueError(
            f"template {template!r}: unknown placeholder {{{unknown[0]}}}; "
            "there are {rank} (or {tp_rank}), {part} and {pp_rank}"
        )
    if "rank" in names and "tp_rank" in names:
        raise ValueError(f"template {template!r}: {{rank}} and {{tp_rank}} are the same thing, use one of them")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"template {template!r}: {{{name}}} appears more than once")
    if not {"rank", "tp_rank"} & set(names):
        raise ValueError(f"template {template!r}: {{rank}} is missing")
    if "part" not in names:
        raise ValueError(f"template {template!r}: {{part}} is missing")


def _digits(value: SupportsIndex, what: str) -> str:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{what} must be a whole number, got {value!r}") from None
    if not 0 <= number < 10**_MAX_DIGITS:
        raise ValueError(f"{what} must be at least 0 and below 10**{_MAX_DIGITS}, got {number}")
    return str(number)
