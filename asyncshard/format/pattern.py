"""The file names of rank shards: ``model-rank-{rank}-part-{part}.safetensors`` and similar patterns.

A template is literal text with one ``{rank}`` (also spelled ``{tp_rank}``), one ``{part}`` and at most one
``{pp_rank}``. Each placeholder stands for 1 to 18 ASCII digits, with or without leading zeros. A file name matches only
as a whole.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field
from typing import NamedTuple, SupportsIndex

DEFAULT_TEMPLATE = "model-rank-{rank}-part-{part}.safetensors"
"""The template of vLLM's sharded state without pipeline parallelism."""

PP_TEMPLATE = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"
"""The template of vLLM's sharded state with pipeline parallelism."""

_FIELDS = {"rank": "rank", "tp_rank": "rank", "part": "part", "pp_rank": "pp_rank"}
_MAX_DIGITS = 18  # such numbers fit int64, and int() of them is quick


class ShardName(NamedTuple):
    """The numbers in the file name of a rank shard; ``pp_rank`` is 0 if the template has no ``{pp_rank}``."""

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
        other text stands for itself. Between two placeholders there must be a character that is no digit.

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
        """Whether the file names hold a pipeline rank."""
        return "pp_rank" in self._regex.groupindex

    def format_for_rank(self, rank: int, part: int | str = "*", pp_rank: int = 0) -> str:
        """Return the file name of one part of a rank, or with ``part="*"`` the glob that matches all its parts.

        Raises
        ------
        ValueError
            A number is negative or too long, ``part`` is a text other than ``"*"``, or the template has no
            ``{pp_rank}`` and ``pp_rank`` is not 0.
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
        """Return the numbers in a file name, or None if the whole name does not match."""
        match = self._regex.fullmatch(name)
        if match is None:
            return None
        return ShardName(int(match["pp_rank"]) if self.has_pp_rank else 0, int(match["rank"]), int(match["part"]))

    def parse_filename(self, name: str) -> tuple[int, int] | None:
        """Return ``(rank, part)`` from a file name, or None if the whole name does not match."""
        parsed = self.parse(name)
        return None if parsed is None else (parsed.rank, parsed.part)


def _compile(template: str) -> re.Pattern[str]:
    if not isinstance(template, str):
        raise ValueError(f"a template is a str, got {type(template).__name__}")
    if any(separator in template for separator in "/\\\0"):
        raise ValueError(f"template {template!r}: a file name holds no path separator and no NUL")
    # Pieces at odd indexes are the names of placeholders, those at even indexes the text between them.
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
