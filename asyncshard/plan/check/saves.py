"""Whether the files of each rank come from one save, and all ranks from one training step, by their metadata."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from asyncshard.format.save_id import STEP_KEY
from asyncshard.plan.check.file_facts import FileFacts
from asyncshard.plan.files.saves import save_problem
from asyncshard.plan.files.survey import Group
from asyncshard.plan.text import enumerate_names


def save_problems(ranks: Sequence[tuple[Group, Sequence[FileFacts]]], path: str) -> Iterator[str]:
    """Yield a sentence for each rank whose files come from several saves, and one if the ranks' steps differ.

    Parameters
    ----------
    ranks : sequence of (Group, sequence of FileFacts)
        The files of each rank, all of which are valid.
    path : str
        The path that the user gave, for messages.
    """
    for _, files in ranks:
        problem = save_problem([(facts.name, facts.save) for facts in files], path)
        if problem is not None:
            yield str(problem)
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
