"""The text of a report, and what it says of ranks."""

from asyncshard.plan.check.report import CheckpointReport, DtypeUse, RankFiles, Tie

WHOLE = CheckpointReport(
    path="/ckpt",
    layout="single",
    is_complete=True,
    num_files=1,
    num_tensors=3,
    nbytes=1_234_567,
    dtypes=(DtypeUse("BF16", 2, 1_234_560), DtypeUse("U8", 1, 7)),
)


def test_a_whole_checkpoint_is_complete_in_a_line_for_files_and_one_for_each_dtype():
    assert WHOLE.is_ok
    assert str(WHOLE).splitlines() == [
        "/ckpt: one file, complete",
        "  1 file, 3 tensors, 1,234,567 bytes",
        "  BF16: 2 tensors, 1,234,560 bytes",
        "  U8: 1 tensor, 7 bytes",
    ]


def test_a_complete_checkpoint_may_have_problems():
    report = CheckpointReport("/ckpt", "index", True, problems=("/ckpt holds weights more than once.",))
    assert not report.is_ok
    first, *_, last = str(report).splitlines()
    assert first == "/ckpt: a Hugging Face checkpoint with an index, complete, but with 1 problem"
    assert last == "  - /ckpt holds weights more than once."


def test_problems_of_an_incomplete_checkpoint_are_counted_and_listed():
    report = CheckpointReport("/ckpt", None, False, problems=("One.", "Two."))
    lines = str(report).splitlines()
    assert lines[0] == "/ckpt: no checkpoint, not complete: 2 problems"
    assert lines[-2:] == ["  - One.", "  - Two."]


def test_ranks_and_stages_are_those_that_have_files_once_each():
    parts = (RankFiles(0, 0, 2), RankFiles(0, 3, 2), RankFiles(1, 0, 1))
    report = CheckpointReport("/ckpt", "ranks", False, world_size=4, parts=parts)
    assert (report.ranks, report.pp_ranks) == ((0, 3), (0, 1))
    assert str(report).splitlines()[1] == "  ranks 0, 3 of a world of 4, 2 pipeline stages; 1 to 2 parts each"


def test_parts_are_one_number_where_all_ranks_have_as_many():
    report = CheckpointReport("/ckpt", "ranks", True, world_size=1, parts=(RankFiles(0, 0, 1),))
    assert str(report).splitlines()[1] == "  rank 0 of a world of 1; 1 part each"


def test_ties_are_told_by_both_names():
    report = CheckpointReport("/ckpt", "single", True, ties=(Tie("lm_head.weight", "embed_tokens.weight"),))
    assert "  tied: lm_head.weight is embed_tokens.weight" in str(report).splitlines()
