"""The version of a checkpoint: what tells its shards, and its tensors where they have digests, from those of another.

Its text is one JSON value a line, so that no single call parses all of a large one:

    {"asyncshard_version": 1, "shards": 2}
    {"path": "s3://m/a.safetensors", "fingerprint": "etag:...", "tensors": 2}
    {"embed.weight": "BF16 32000,4096 0a1b...", "norm.weight": "F32 4096 9f3c..."}
    {"path": "s3://m/b.safetensors", "fingerprint": null, "tensors": null}

Below a shard are its tensors, if they have digests, at most 512 a line: dtype, shape, and xxh3-128.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from asyncshard.errors import FormatError
from asyncshard.format.digests import digests_of, has_digests
from asyncshard.format.dtypes import DTYPES
from asyncshard.format.header import Header
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.stores.base import ETAG
from asyncshard.tasks.yielding import yielding_gil

Facts = Mapping[str, str]
"""Dtype, shape and digest of each tensor by name, as text: tensors with equal facts are equal."""

_FORMAT = 1
_BLOCK = 512
"""Tensors in a line."""
_CONTENT = re.compile(rf'{ETAG}"?[0-9a-f]{{32}}(-[0-9]+)?"? [0-9]+')
"""A fingerprint that says what is in an object: its ETag is an MD5, or that of the MD5s of its parts."""
_FACT = re.compile(r"[A-Z0-9_]+ ([0-9]+(,[0-9]+)*)? [0-9a-f]{32}")


class ShardVersion:
    """One shard of a version. Immutable; its facts are made from the header when they are first asked for."""

    __slots__ = ("_facts", "_header", "fingerprint", "path")

    def __init__(self, path: str, fingerprint: str | None, facts: Facts | None, header: Header | None = None) -> None:
        self.path = path
        """Its full path or URL."""
        self.fingerprint = fingerprint
        """The fingerprint that the store gave of the object; None if the store has none."""
        self._facts = facts
        self._header = header

    @property
    def facts(self) -> Facts | None:
        """The facts of its tensors; None where they have no digests."""
        header = self._header  # another thread may be doing the same
        if header is not None:
            self._facts = _facts_of(header)
            self._header = None
        return self._facts

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardVersion):
            return NotImplemented
        return (self.path, self.fingerprint) == (other.path, other.fingerprint) and self.facts == other.facts

    def __hash__(self) -> int:
        return hash((self.path, self.fingerprint))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardVersion, (self.path, self.fingerprint, self.facts)


class CheckpointVersion:
    """The state of a checkpoint when it was opened: an immutable value, for `prepare_refresh` to take as `since`.

    ``str(version)`` and `parse` are inverses, in any process; it pickles. Both, and comparing, take about 3 µs for each
    tensor with a digest: with very many, call them in a thread. It keeps the headers of shards with digests.

    Loaders make it: `Stream.version`, ``loader.last_report.version`` and `Update.version`.
    """

    __slots__ = ("_shards",)

    def __init__(self, shards: Iterable[ShardVersion]) -> None:
        self._shards = tuple(shards)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the version whose ``str`` this is.

        Raises
        ------
        ValueError
            It is not one, or one of a later format.
        """
        if not isinstance(text, str):
            raise TypeError(f"the text of a version is a str, not {text!r}")
        lines = (_parse_line(number, line) for number, line in enumerate(text.splitlines(), 1))
        return cls(_parse_shards(lines))

    @property
    def shards(self) -> tuple[ShardVersion, ...]:
        """In delivery order."""
        return self._shards

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def __repr__(self) -> str:
        return f"<CheckpointVersion of {len(self._shards)} shards>"

    def __eq__(self, other: object) -> bool:
        return self._shards == other._shards if isinstance(other, CheckpointVersion) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckpointVersion, (self._shards,)


def version_of(checkpoint: Checkpoint) -> CheckpointVersion:
    """Return the version of an open checkpoint. It looks at metadata only: for a thread all the same."""
    fingerprint = checkpoint.reader.fingerprint
    return CheckpointVersion(
        ShardVersion(file.path, fingerprint(file), None, file.header if has_digests(file.header) else None)
        for file in checkpoint.shards
    )


def changes_since(
    version: CheckpointVersion, checkpoint: Checkpoint, current: CheckpointVersion
) -> Iterator[NDArray[np.bool_]]:
    """Yield for each shard of a checkpoint, whose version is `current`, which tensors may differ from `version`.

    A shard is the same if its path and its fingerprint are, or if its fingerprint is that of its content; a tensor also
    if its digest, dtype and shape are. Slow for many tensors: not for the event loop.
    """
    same_place = {(shard.path, shard.fingerprint) for shard in version.shards if shard.fingerprint is not None}
    contents = {fingerprint for _, fingerprint in same_place if _CONTENT.fullmatch(fingerprint)}
    facts: dict[str, str] = {}
    for shard in version.shards:
        facts.update(shard.facts or {})
    for opened, now in zip(checkpoint.shards, current.shards, strict=True):
        changed = np.ones(len(opened.header), np.bool_)
        if (now.path, now.fingerprint) in same_place or now.fingerprint in contents:
            changed[:] = False
        elif facts and now.facts:
            for index, (name, fact) in enumerate(yielding_gil(now.facts.items())):
                changed[index] = facts.get(name) != fact
        yield changed


def _facts_of(header: Header) -> Facts | None:
    """Return the facts of a header's tensors; None where its digests cannot be read, as if it had none."""
    try:
        digests = digests_of(header)
    except FormatError:  # none of a load's business; `prepare_refresh` raises it
        return None
    if digests is None:
        return None
    facts = {}
    for index in yielding_gil(range(len(header))):
        name, code, shape, _, _ = header.table.row(index)
        facts[name] = f"{DTYPES[code].name} {','.join(map(str, shape))} {digests[index].tobytes().hex()}"
    return facts


def _lines(version: CheckpointVersion) -> Iterator[str]:
    yield json.dumps({"asyncshard_version": _FORMAT, "shards": len(version.shards)})
    for shard in version.shards:
        count = None if shard.facts is None else len(shard.facts)
        yield json.dumps({"path": shard.path, "fingerprint": shard.fingerprint, "tensors": count})
        facts = iter((shard.facts or {}).items())
        while block := dict(islice(facts, _BLOCK)):
            yield json.dumps(block)
            time.sleep(0)


def _parse_line(number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise _error(f"line {number} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise _error(f"line {number} is not a JSON object")
    time.sleep(0)
    return value


def _parse_shards(lines: Iterator[dict[str, Any]]) -> list[ShardVersion]:
    head = next(lines, {})
    if head.get("asyncshard_version") != _FORMAT or not _is_count(head.get("shards")):
        raise _error(f"its first line does not say asyncshard_version {_FORMAT} and how many shards")
    shards = [_parse_shard(lines) for _ in range(head["shards"])]
    if next(lines, None) is not None:
        raise _error("it goes on after its last shard")
    return shards


def _parse_shard(lines: Iterator[dict[str, Any]]) -> ShardVersion:
    head = next(lines, {})
    path, fingerprint, count = head.get("path"), head.get("fingerprint"), head.get("tensors")
    if not isinstance(path, str) or not isinstance(fingerprint, str | None) or not (count is None or _is_count(count)):
        raise _error("a shard lacks its path, its fingerprint or its number of tensors")
    if count is None:
        return ShardVersion(path, fingerprint, None)
    facts: dict[str, str] = {}
    while len(facts) < count:
        block = next(lines, {})
        if not block or not all(isinstance(fact, str) and _FACT.fullmatch(fact) for fact in block.values()):
            raise _error(f"the tensors of {path} lack a dtype, a shape or a digest")
        facts.update(block)
    if len(facts) > count:
        raise _error(f"{path} has more tensors than it says")
    return ShardVersion(path, fingerprint, facts)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _error(problem: str) -> ValueError:
    return ValueError(f"not the text of a version of a checkpoint: {problem}; pass what str(version) gave")
