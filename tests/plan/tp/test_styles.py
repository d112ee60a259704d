"""The words of transformers for placements: which tensors they cut, and which words are refused."""

import pytest

from asyncshard.errors import CheckpointError
from asyncshard.plan.division.placements import PackedShard, Replicate, Shard
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.plan.tp.styles import KNOWN_WORDS, check_word, placement_of_word


@pytest.mark.parametrize(
    ("words", "scalar", "bias", "weight", "experts"),
    [
        ("colwise colwise_rep colwise_gather_output local_colwise", Replicate(), Shard(0), Shard(-2), Shard(-2)),
        ("rowwise rowwise_rep rowwise_split_input local_rowwise", Replicate(), Replicate(), Shard(-1), Shard(-1)),
        (
            "packed_colwise local_packed_colwise",
            Replicate(),
            PackedShard(0, (3, 3)),
            PackedShard(-2, (4, 4)),
            PackedShard(-2, (4, 4)),
        ),
        (
            "packed_rowwise local_packed_rowwise",
            Replicate(),
            Replicate(),
            PackedShard(-1, (3, 3)),
            PackedShard(-1, (3, 3)),
        ),
        (
            "replicate replicated_with_grad_allreduce sequence_parallel all_reduce gather local local_params "
            "mla_kv_a_proj",
            *[Replicate()] * 4,
        ),
    ],
)
def test_a_word_says_what_becomes_of_weight_and_bias(words, scalar, bias, weight, experts):
    for word in words.split():
        assert word in KNOWN_WORDS
        plan = TpPlan({"m": word})
        assert plan.placement_of("m.scale", ()) == scalar
        assert plan.placement_of("m.bias", (6,)) == bias
        assert plan.placement_of("m.weight", (8, 6)) == weight
        assert plan.placement_of("m.weight", (5, 8, 6)) == experts


def test_an_odd_size_is_not_two_tensors_of_one_size():
    plan = TpPlan({"m": "packed_colwise", "n": "packed_rowwise"})
    with pytest.raises(CheckpointError, match=r"'m\.weight' of shape \(7, 6\).*PackedShard") as caught:
        plan.placement_of("m.weight", (7, 6))
    assert caught.value.tensor == "m.weight"
    with pytest.raises(CheckpointError):
        plan.placement_of("n.weight", (6, 7))
    assert plan.placement_of("n.bias", (7,)) == Replicate()


@pytest.mark.parametrize(
    "word", ["moe_tp_experts", "ep_router", "ep_dispatch_experts", "grouped_gemm", "moe_identity_expert"]
)
def test_words_for_experts_are_refused_with_the_reason(word):
    with pytest.raises(ValueError, match=rf"'{word}' of 'layers.\*.mlp.experts' is refused: a mixture of experts"):
        TpPlan({"layers.*.mlp.experts": word})


@pytest.mark.parametrize(
    "word", ["embedding_rowwise", "embedding_colwise", "vocab_parallel_rowwise", "colwise", "rowwise"]
)
@pytest.mark.parametrize("key", ["model.embed_tokens", "embed_tokens.weight", "transformer.wte"])
def test_embeddings_are_split_only_by_an_explicit_placement(key, word):
    with pytest.raises(ValueError, match=r"refused: embeddings .*Shard\(0\)"):
        TpPlan({key: word})
    assert TpPlan({key: Shard(0)}).rules[key] == Shard(0)
    assert TpPlan({key: "replicate"}).placement_of(key, (8, 8)) == Replicate()


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("colwize", "did you mean 'colwise'"),
        ("Rowwise", "did you mean 'rowwise'"),
        ("x" * 10**6, "Known are"),
        ("", "placement. Known are"),
    ],
)
def test_an_unknown_word_is_refused_with_those_known(word, hint):
    with pytest.raises(ValueError, match=hint) as caught:
        TpPlan({"layers.*.q_proj": word})
    assert "layers.*.q_proj" in str(caught.value)
    assert ", ".join(KNOWN_WORDS) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("word", KNOWN_WORDS)
def test_a_scalar_is_whole_whatever_the_word(word):
    check_word("layers.*.q_proj", word)
    assert placement_of_word(word, "layers.0.q_proj.scale", ()) == Replicate()
