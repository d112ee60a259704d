"""Ranks saved at different steps. Over real files it is tested in ``tests/pipeline/writing/test_save.py``."""

import json

from asyncshard.format.header import parse_header
from asyncshard.format.save_id import SAVE_KEY, STEP_KEY, SaveId
from asyncshard.plan.check.file_facts import facts_of
from asyncshard.plan.check.saves import save_problems
from asyncshard.plan.files.survey import Group


def facts(name, metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    header = parse_header(len(text).to_bytes(8, "little") + text)
    return facts_of(name, header, header)


def rank(number, *metadata):
    files = [facts(f"{number}-{part}", each) for part, each in enumerate(metadata)]
    return Group(f"rank {number}", tuple(file.name for file in files), 0, number), files


def test_facts_hold_the_save_and_the_step():
    save = SaveId("0" * 32, 1)
    found = facts("x", {SAVE_KEY: str(save), STEP_KEY: "7"})
    assert (found.save, found.step) == (save, "7")
    assert facts("x", {}).save is facts("x", {}).step is None


def test_equal_steps_and_files_that_tell_none_are_right():
    assert (
        list(save_problems([rank(0, {STEP_KEY: "7"}, {STEP_KEY: "7"}), rank(1, {STEP_KEY: "7"}), rank(2, {})], "p"))
        == []
    )


def test_different_steps_are_one_sentence_even_within_a_rank():
    (problem,) = save_problems([rank(0, {STEP_KEY: "7"}, {STEP_KEY: "8"}), rank(1, {STEP_KEY: "8"})], "p")
    assert "'7' of rank 0, '8' of rank 0, rank 1" in problem
    assert problem.endswith(".")


def test_each_rank_of_two_saves_is_told():
    one, two = ({SAVE_KEY: str(SaveId(digit * 32, 2))} for digit in "12")
    problems = list(save_problems([rank(0, one, two), rank(1, two, two), rank(2, two, one)], "p"))
    assert len(problems) == 2
