"""The report on a checkpoint, from the names and the headers of its files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from asyncshard.errors import AsyncShardError, CheckpointError, FormatError, NamesError, ObjectNotFoundError
from asyncshard.format.dtypes import DTYPES
from asyncshard.format.pattern import ShardPattern
from asyncshard.plan.check.file_facts import MOST, FileFacts, Tensors
from asyncshard.plan.check.report import CheckpointReport, DamagedFile, DtypeUse, RankFiles, Tie
from asyncshard.plan.check.saves import save_problems
from asyncshard.plan.files.layout import INDEX_NAME
from asyncshard.plan.files.survey import Group, Survey
from asyncshard.plan.text import LISTED, count_of, enumerate_names
from asyncshard.plan.ties import EMBEDDING, OUTPUT, config_tie, tie_word

CheckedFile = FileFacts | AsyncShardError
"""The facts about a valid file, or the error of a file that is not valid."""


class Problem(NamedTuple):
    """One thing that is wrong with a checkpoint."""

    text: str
    """A sentence that says what is wrong, where, and what to do."""
    is_fatal: bool
    """Whether the problem makes the checkpoint incomplete."""


@dataclass(frozen=True, slots=True)
class CheckInput:
    """Everything that was read of a checkpoint to check it."""

    path: str
    """The path that the user gave, for messages."""
    survey: Survey
    """The files of the checkpoint, by their names."""
    files: Mapping[str, CheckedFile]
    """The checked files by name: those of the checkpoint, and others in its directory."""
    config: Mapping[str, Any] | None = None
    """The content of ``config.json``; None if the checkpoint has none."""
    pattern: ShardPattern | None = None
    """The pattern that the user gave."""
    problems: tuple[Problem, ...] = ()
    """Problems found while the index and ``config.json`` were read."""

    def valid(self, group: Group) -> list[FileFacts]:
        """Return the facts about the valid files of a group."""
        return [facts for name in group.files if isinstance(facts := self.files.get(name), FileFacts)]

    def is_whole(self, group: Group) -> bool:
        """Return whether all files of a group are valid."""
        return len(self.valid(group)) == len(group.files)


def report_on(check: CheckInput) -> CheckpointReport:
    """Return the report on a checkpoint. This is slow for many tensors: call it in a thread."""
    survey = check.survey
    valid = [facts for group in survey.groups for facts in check.valid(group)]
    gone = [name for name in survey.files if isinstance(check.files.get(name), ObjectNotFoundError)]
    ties = _ties(check, valid)
    problems = [
        *check.problems,
        *(Problem(text, True) for text in survey.problems),
        *_file_problems(check),
        *_index_problems(check),
        *_duplicate_problems(check),
        *_rank_problems(check),
        *_save_problems(check),
        *_output_problems(check, valid),
        *_other_problems(check),
    ]
    return CheckpointReport(
        path=check.path,
        layout=survey.kind,
        is_complete=not any(problem.is_fatal for problem in problems),
        problems=tuple(problem.text for problem in problems),
        world_size=survey.world_size,
        parts=tuple(RankFiles(group.pp_rank, group.rank, len(group.files)) for group in survey.groups if group.label),
        num_files=len(survey.files) - len(gone),
        num_tensors=sum(map(len, valid)),
        nbytes=sum(facts.nbytes for facts in valid),
        dtypes=_dtypes(valid),
        missing_files=(*survey.missing, *gone),
        num_missing_files=survey.num_missing + len(gone),
        extra_files=survey.others,
        copies=survey.copies,
        damaged=tuple(
            DamagedFile(name, str(result))
            for name, result in check.files.items()
            if not isinstance(result, FileFacts | ObjectNotFoundError)
        ),
        ties=ties,
    )


def index_disagreement(path: str, missing: Sequence[str], unexpected: Sequence[str]) -> NamesError | None:
    """Return the error for a file whose header disagrees with the index, or None if they agree.

    Parameters
    ----------
    path : str
        The path of the file.
    missing : sequence of str
        The first names that the index maps to the file, although the file lacks them.
    unexpected : sequence of str
        The first names in the file that the index does not map to it.
    """
    parts = []
    if missing:
        parts.append(f"weight_map places {_names(missing)} in it, but its header does not")
    if unexpected:
        parts.append(f"it holds {_names(unexpected)}, which weight_map does not place there")
    if not parts:
        return None
    return NamesError(
        f"{path}: the index and the file disagree: {'; '.join(parts)}",
        path=path,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
    )


def _file_problems(check: CheckInput) -> Iterator[Problem]:
    names = set(check.survey.files)
    for name, result in check.files.items():
        if isinstance(result, AsyncShardError):
            text = str(result).rstrip(".")
            if isinstance(result, FormatError) and ";" not in text:  # a broken rule of the header, without a remedy
                text += "; fetch or write it again"
            yield Problem(f"{text}.", name in names)


def _index_problems(check: CheckInput) -> Iterator[Problem]:
    if check.survey.kind != "index":
        return
    for group in check.survey.groups:
        for facts in check.valid(group):
            error = index_disagreement(_join(check.path, facts.name), facts.absent, facts.unexpected)
            if error is not None:
                yield Problem(f"{error}. Fetch both again, or write the index anew.", True)


def _duplicate_problems(check: CheckInput) -> Iterator[Problem]:
    for group in check.survey.groups:
        twice, total = Tensors(check.valid(group)).duplicates()
        if total:
            listed = enumerate_names(
                [f"{name!r} in {first} and {second}" for name, first, second in twice], total=total
            )
            stand = "1 tensor stands" if total == 1 else f"{total} tensors stand"
            yield Problem(f"{check.path}: {stand} in two files: {listed}. Remove the file that is too many.", True)


def _rank_problems(check: CheckInput) -> Iterator[Problem]:
    """Yield a problem for each rank whose tensors differ from those of the first whole rank of its pipeline stage."""
    references: dict[tuple[str, int], tuple[Group, Tensors]] = {}
    for group in check.survey.groups:
        if not group.label or not check.is_whole(group):
            continue
        tensors = Tensors(check.valid(group))
        reference, expected = references.setdefault((group.template, group.pp_rank), (group, tensors))
        if reference is group:
            continue
        difference = expected.difference(tensors)
        texts = []
        for what, (names, total) in zip(
            ("it lacks {}", "it has {} that the other lacks", "{} of another dtype"), difference, strict=True
        ):
            if total:
                texts.append(
                    what.format(f"{count_of(total, 'tensor')} ({enumerate_names(names, total=total, is_quoted=True)})")
                )
        if not texts:
            continue
        if len(group.files) != len(reference.files):
            texts.append(f"it has {count_of(len(group.files), 'part')}, the other {len(reference.files)}")
        yield Problem(
            f"{check.path}: {group.label} differs from {reference.label}: {'; '.join(texts)}. Ranks hold the same "
            "names: write or fetch the one that is wrong again.",
            bool(difference.lacks[1] or difference.adds[1]),
        )


def _save_problems(check: CheckInput) -> Iterator[Problem]:
    """Yield a problem for each rank whose files come from several saves, and one if the ranks' steps differ."""
    ranks = [group for group in check.survey.groups if group.label and check.is_whole(group)]
    for text in save_problems([(group, check.valid(group)) for group in ranks], check.path):
        yield Problem(text, True)


def _output_problems(check: CheckInput, valid: Sequence[FileFacts]) -> Iterator[Problem]:
    """Yield a problem if no file holds the output layer, although config.json says that it is not tied."""
    config = check.config
    if config is None or check.survey.kind not in ("index", "single", "shards"):
        return
    names = config.get("architectures")
    is_causal = isinstance(names, list) and any(
        isinstance(name, str) and name.endswith("ForCausalLM") for name in names
    )
    if not is_causal or _word_of(config) is not False or any(file.ties for file in valid):
        return
    if _ending(valid, EMBEDDING) and not _ending(valid, OUTPUT) and all(map(check.is_whole, check.survey.groups)):
        yield Problem(
            f"{check.path}: no file holds {OUTPUT}, and config.json says tie_word_embeddings is false. The "
            "checkpoint is incomplete.",
            True,
        )


def _other_problems(check: CheckInput) -> Iterator[Problem]:
    survey = check.survey
    if survey.kind is None or check.pattern is not None:  # a user who gives a pattern knows of the other files
        return
    if survey.copies:
        yield Problem(
            f"{check.path} holds weights more than once: beside {_called(survey)} there "
            f"{'is' if len(survey.copies) == 1 else 'are'} {enumerate_names(survey.copies)}. Programs that read every "
            ".safetensors file load both: keep one of them, or move the other to a folder of its own.",
            False,
        )
    copies = set(survey.copies)
    rest = [name for name in survey.others if name not in copies]
    if rest:
        yield Problem(
            f"{check.path} holds {count_of(len(rest), 'file')} that the checkpoint does not need: "
            f"{enumerate_names(rest)}. Programs that read every .safetensors file load them too: move them to a folder "
            "of their own.",
            False,
        )


def _called(survey: Survey) -> str:
    files = survey.files or survey.missing
    text = files[0] if len(files) == 1 else f"{files[0]} and the others of its set" if files else "it"
    return f"{text} ({INDEX_NAME})" if survey.kind == "index" else text


def _ties(check: CheckInput, valid: Sequence[FileFacts]) -> tuple[Tie, ...]:
    """Return the ties that a load of all tensors restores."""
    told = [tie for file in valid for tie in file.ties]
    hashes = np.concatenate([np.empty(0, np.int64), *(file.names.hashes for file in valid if told)])
    is_stored = np.isin(np.array([hash(name) for name, _ in told], np.int64), hashes).tolist()
    ties = dict(tie for tie, is_there in zip(told, is_stored, strict=True) if not is_there)
    is_one_stage = len({group.pp_rank for group in check.survey.groups}) == 1
    if check.config is not None and is_one_stage:
        with contextlib.suppress(CheckpointError):
            found = config_tie(check.config, (name for file in valid for name in file.embeddings))
            ties.update({} if found is None or found[0] in ties else [found])
    return tuple(Tie(name, stored_name) for name, stored_name in ties.items())


def _word_of(config: Mapping[str, Any]) -> bool | None:
    """Return the value of ``tie_word_embeddings``; None if config.json has no value that is true or false."""
    try:
        return tie_word(config)
    except CheckpointError:
        return None


def _ending(valid: Sequence[FileFacts], end: str) -> list[str]:
    return [name for file in valid for name in file.embeddings if name.endswith(end)]


def _dtypes(valid: Sequence[FileFacts]) -> tuple[DtypeUse, ...]:
    nbytes = sum((facts.dtype_bytes for facts in valid), np.zeros(len(DTYPES), np.int64))
    counts = sum(
        (np.bincount(facts.dtype_codes, minlength=len(DTYPES)) for facts in valid), np.zeros(len(DTYPES), np.int64)
    )
    uses = [
        DtypeUse(dtype.name, int(count), int(size))
        for dtype, count, size in zip(DTYPES, counts, nbytes, strict=True)
        if count
    ]
    return tuple(sorted(uses, key=lambda use: (-use.nbytes, use.dtype)))


def _names(names: Sequence[str]) -> str:
    if len(names) < MOST:
        return enumerate_names(names, is_quoted=True)
    return f"{enumerate_names(names[:LISTED], is_quoted=True)} and at least {MOST - LISTED} more"


def _join(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}"
