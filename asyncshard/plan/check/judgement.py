"""Judge a checkpoint by what its names and its headers say."""

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
from asyncshard.plan.check.saves import save_faults
from asyncshard.plan.files.layout import INDEX_NAME
from asyncshard.plan.files.survey import Group, Survey
from asyncshard.plan.text import LISTED, count_of, enumerate_names
from asyncshard.plan.ties import EMBEDDING, OUTPUT, config_tie, tie_word

Finding = FileFacts | AsyncShardError
"""What a file turned out to be: valid, or why not."""


class Problem(NamedTuple):
    """One thing that is wrong."""

    text: str
    is_fatal: bool
    """Whether the checkpoint is not complete."""


@dataclass(frozen=True, slots=True)
class CheckInput:
    """All that is known of a checkpoint."""

    path: str
    survey: Survey
    files: Mapping[str, Finding]
    """By name, of the checkpoint and of others."""
    config: Mapping[str, Any] | None = None
    """Of ``config.json``; None where there is none."""
    pattern: ShardPattern | None = None
    """What the user asked for."""
    problems: tuple[Problem, ...] = ()
    """The index or ``config.json`` cannot be read."""

    def valid(self, group: Group) -> list[FileFacts]:
        """Return what is known of a group's valid files."""
        return [facts for name in group.files if isinstance(facts := self.files.get(name), FileFacts)]

    def is_whole(self, group: Group) -> bool:
        """Return whether all files of a group are valid."""
        return len(self.valid(group)) == len(group.files)


def report_on(evidence: CheckInput) -> CheckpointReport:
    """Return the report on a checkpoint. Slow for many tensors: call it in a thread."""
    survey = evidence.survey
    valid = [facts for group in survey.groups for facts in evidence.valid(group)]
    gone = [name for name in survey.files if isinstance(evidence.files.get(name), ObjectNotFoundError)]
    ties = _ties(evidence, valid)
    problems = [
        *evidence.problems,
        *(Problem(text, True) for text in survey.faults),
        *_file_problems(evidence),
        *_index_problems(evidence),
        *_duplicate_problems(evidence),
        *_rank_problems(evidence),
        *_save_problems(evidence),
        *_output_problems(evidence, valid),
        *_other_problems(evidence),
    ]
    return CheckpointReport(
        path=evidence.path,
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
            DamagedFile(name, str(finding))
            for name, finding in evidence.files.items()
            if not isinstance(finding, FileFacts | ObjectNotFoundError)
        ),
        ties=ties,
    )


def index_disagreement(path: str, missing: Sequence[str], unexpected: Sequence[str]) -> NamesError | None:
    """Return the error for a file whose header is not what the index says, None where they agree.

    Parameters
    ----------
    path : str
        The file's.
    missing : sequence of str
        Names that the index places in it and that it lacks, or the first of them.
    unexpected : sequence of str
        Names that it has and the index does not place there.
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


def _file_problems(evidence: CheckInput) -> Iterator[Problem]:
    own = set(evidence.survey.files)
    for name, finding in evidence.files.items():
        if isinstance(finding, AsyncShardError):
            text = str(finding).rstrip(".")
            if isinstance(finding, FormatError) and ";" not in text:  # a rule of the header that is broken, no remedy
                text += "; fetch or write it again"
            yield Problem(f"{text}.", name in own)


def _index_problems(evidence: CheckInput) -> Iterator[Problem]:
    if evidence.survey.kind != "index":
        return
    for group in evidence.survey.groups:
        for facts in evidence.valid(group):
            error = index_disagreement(_join(evidence.path, facts.name), facts.absent, facts.unexpected)
            if error is not None:
                yield Problem(f"{error}. Fetch both again, or write the index anew.", True)


def _duplicate_problems(evidence: CheckInput) -> Iterator[Problem]:
    for group in evidence.survey.groups:
        twice, total = Tensors(evidence.valid(group)).duplicates()
        if total:
            listed = enumerate_names(
                [f"{name!r} in {first} and {second}" for name, first, second in twice], total=total
            )
            stand = "1 tensor stands" if total == 1 else f"{total} tensors stand"
            yield Problem(f"{evidence.path}: {stand} in two files: {listed}. Remove the file that is too many.", True)


def _rank_problems(evidence: CheckInput) -> Iterator[Problem]:
    """Compare the ranks of each pipeline stage with its first that is whole."""
    references: dict[tuple[str, int], tuple[Group, Tensors]] = {}
    for group in evidence.survey.groups:
        if not group.label or not evidence.is_whole(group):
            continue
        tensors = Tensors(evidence.valid(group))
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
            f"{evidence.path}: {group.label} differs from {reference.label}: {'; '.join(texts)}. Ranks hold the same "
            "names: write or fetch the one that is wrong again.",
            bool(difference.lacks[1] or difference.adds[1]),
        )


def _save_problems(evidence: CheckInput) -> Iterator[Problem]:
    """Tell ranks apart that were saved at different times."""
    ranks = [group for group in evidence.survey.groups if group.label and evidence.is_whole(group)]
    for text in save_faults([(group, evidence.valid(group)) for group in ranks], evidence.path):
        yield Problem(text, True)


def _output_problems(evidence: CheckInput, valid: Sequence[FileFacts]) -> Iterator[Problem]:
    """Tell a model without an output layer: config.json says that it is not tied, and it is nowhere."""
    config = evidence.config
    if config is None or evidence.survey.kind not in ("index", "single", "shards"):
        return
    names = config.get("architectures")
    is_causal = isinstance(names, list) and any(
        isinstance(name, str) and name.endswith("ForCausalLM") for name in names
    )
    if not is_causal or _word_of(config) is not False or any(file.ties for file in valid):
        return
    if _ending(valid, EMBEDDING) and not _ending(valid, OUTPUT) and all(map(evidence.is_whole, evidence.survey.groups)):
        yield Problem(
            f"{evidence.path}: no file holds {OUTPUT}, and config.json says tie_word_embeddings is false. The "
            "checkpoint is incomplete.",
            True,
        )


def _other_problems(evidence: CheckInput) -> Iterator[Problem]:
    survey = evidence.survey
    if survey.kind is None or evidence.pattern is not None:  # who asks for a pattern knows that there is more
        return
    if survey.copies:
        yield Problem(
            f"{evidence.path} holds weights more than once: beside {_called(survey)} there "
            f"{'is' if len(survey.copies) == 1 else 'are'} {enumerate_names(survey.copies)}. Programs that read every "
            ".safetensors file load both: keep one of them, or move the other to a folder of its own.",
            False,
        )
    copies = set(survey.copies)
    rest = [name for name in survey.others if name not in copies]
    if rest:
        yield Problem(
            f"{evidence.path} holds {count_of(len(rest), 'file')} that the checkpoint does not need: "
            f"{enumerate_names(rest)}. Programs that read every .safetensors file load them too: move them to a folder "
            "of their own.",
            False,
        )


def _called(survey: Survey) -> str:
    files = survey.files or survey.missing
    text = files[0] if len(files) == 1 else f"{files[0]} and the others of its set" if files else "it"
    return f"{text} ({INDEX_NAME})" if survey.kind == "index" else text


def _ties(evidence: CheckInput, valid: Sequence[FileFacts]) -> tuple[Tie, ...]:
    """Return the ties that a load restores where nobody asks for a tensor by its name."""
    told = [tie for file in valid for tie in file.ties]
    hashes = np.concatenate([np.empty(0, np.int64), *(file.names.hashes for file in valid if told)])
    is_stored = np.isin(np.array([hash(name) for name, _ in told], np.int64), hashes).tolist()
    ties = dict(tie for tie, is_there in zip(told, is_stored, strict=True) if not is_there)
    is_one_stage = len({group.pp_rank for group in evidence.survey.groups}) == 1
    if evidence.config is not None and is_one_stage:
        with contextlib.suppress(CheckpointError):
            found = config_tie(evidence.config, (name for file in valid for name in file.embeddings))
            ties.update({} if found is None or found[0] in ties else [found])
    return tuple(Tie(name, stored_name) for name, stored_name in ties.items())


def _word_of(config: Mapping[str, Any]) -> bool | None:
    """Return what config.json says of tied embeddings; None where that is nothing, or neither true nor false."""
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
