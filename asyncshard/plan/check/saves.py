"""What the files' metadata says of when they were saved: a rank's files in one save, all ranks at one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from asyncshard.format.save_id import STEP_KEY
from asyncshard.plan.check.file_facts import FileFacts
from asyncshard.plan.files.saves import save_fault
from asyncshard.plan.files.survey import Group
from asyncshard.plan.text import enumerate_names


def save_faults(ranks: Sequence[tuple[Group, Sequence[FileFacts]]], path: str) -> Iterator[str]:
    """Yield a sentence for each rank whose files come from several saves, and one where the steps differ.

    Parameters
    ----------
    ranks : sequence of (Group, sequence of FileFacts)
        The files of each rank, all of them valid.
    path : str
        The path that the user gave, for messages.
    """
    for _, files in ranks:
        fault = save_fault([(facts.name, facts.save) for facts in files], path)
        if fault is not None:
            yield str(fault)
    steps: dict[str, list[str]] = {}
    for group, files in ranks:
        for step in dict.fromkeys(facts.step for facts in files if facts.step is not None):
            steps.setdefault(step, []).append(group.label)
    if len(steps) > 1:
        found = [f"{step!r} of {enumerate_names(labels)}" for step, labels in steps.items()]
        yield (
            f"{path}: by the metadata {STEP_KEY!r} the ranks were saved at different steps: {enumerate_names(found)}. "
            "Save or fetch the ranks that are behind again."
        )
