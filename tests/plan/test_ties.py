"""Which names are tied: what metadata tells, and what a config says or its model's default is."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.errors import CheckpointError
from asyncshard.plan.ties import (
    TIED_MODEL_TYPES,
    config_tie,
    may_need,
    only_embedding,
    output_names,
    tie_metadata,
    tie_word,
    ties_embeddings,
    told_ties,
)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SILENT, TRUE, FALSE = {}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def told(metadata, stored, asked=()):
    return dict(told_ties(metadata, set(stored).__contains__, set(asked).__contains__))


# What metadata tells


@pytest.mark.parametrize("ties", [{HEAD: EMBED}, {EMBED: HEAD}, {"a": "b"}, {"a b": "c d", "é": "c d"}])
def test_what_is_written_is_told_by_whatever_name(ties):
    assert told(tie_metadata(ties), ties.values()) == ties


@pytest.mark.parametrize(
    "metadata", [{"format": "pt"}, {"type": "embeddings"}, {"a": "b"}, {"a.weight": "b"}, {"a.x": "b.y"}, {"a": "b.a"}]
)
def test_text_that_is_the_name_of_a_tensor_ties_only_a_name_that_is_asked_for(metadata):
    ((key, value),) = metadata.items()
    assert told(metadata, [value]) == {}
    assert told(metadata, [value], asked=["other"]) == {}
    assert told(metadata, [value], asked=[key]) == metadata


@pytest.mark.parametrize("text", ["see model.weight", ".weight", "weight", "model\n.weight"])
def test_text_that_only_ends_like_a_parameter_is_none(text):
    assert told({text: EMBED}, [EMBED]) == {}


def test_the_pairs_that_safetensors_writes_are_ties():
    assert told({"format": "pt", HEAD: EMBED}, [EMBED]) == {HEAD: EMBED}
    assert told({"decoder.embed.weight": "encoder.embed.weight"}, ["encoder.embed.weight"]) != {}


def test_a_tie_needs_the_one_tensor_and_is_none_beside_the_other():
    metadata = tie_metadata({HEAD: EMBED})
    assert told(metadata, []) == {}
    assert told(metadata, [HEAD]) == {}
    assert told(metadata, [HEAD, EMBED], asked=[HEAD]) == {}
    assert told({HEAD: HEAD}, [HEAD], asked=[HEAD]) == {}


# What a config says


@pytest.mark.parametrize(
    ("outer", "inner", "word"),
    [
        (SILENT, SILENT, None),
        (TRUE, SILENT, True),
        (FALSE, SILENT, False),
        (SILENT, TRUE, True),
        (SILENT, FALSE, False),
        (TRUE, FALSE, True),
        (FALSE, TRUE, True),
        (FALSE, FALSE, False),
        ({"tie_word_embeddings": None}, TRUE, True),
    ],
)
@pytest.mark.parametrize("model_type", [None, "llava", "gemma3"])
def test_the_word_stands_in_the_config_or_in_its_text_config(outer, inner, word, model_type):
    config = {**outer, "text_config": inner, "model_type": model_type}
    assert tie_word(config) is word
    assert ties_embeddings(config) is (model_type == "gemma3" if word is None else word)


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        ({}, False),
        ({"model_type": "llama"}, False),
        ({"model_type": "qwen2", "tie_word_embeddings": None}, False),
        ({"model_type": "gemma"}, True),
        ({"model_type": "gemma", "tie_word_embeddings": False}, False),
        ({"model_type": "cohere2"}, True),
        ({"model_type": "gemma3", "text_config": {}}, True),
        ({"model_type": "llava", "text_config": {"model_type": "gemma"}}, True),
        ({"model_type": "llava", "text_config": {"model_type": "gemma", "tie_word_embeddings": False}}, False),
        ({"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}, False),
        ({"model_type": ["gemma"]}, False),
        ({"text_config": ["gemma"]}, False),
    ],
)
def test_a_silent_config_has_the_default_of_its_model_type(config, is_tied):
    assert tie_word(config) is config.get("tie_word_embeddings", tie_word(config))
    assert ties_embeddings(config) is is_tied


def test_the_defaults_are_those_of_transformers():
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    for model_type in ("gemma", "gemma2", "gemma3_text", "cohere", "starcoder2", "smollm3", "opt", "zamba2"):
        assert model_type in TIED_MODEL_TYPES
        assert auto.CONFIG_MAPPING[model_type]().tie_word_embeddings is True
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "phi3", "llava"):
        assert model_type not in TIED_MODEL_TYPES
        assert auto.CONFIG_MAPPING[model_type]().tie_word_embeddings is False


@pytest.mark.parametrize("value", [1, 0, "true", [], {}])
@pytest.mark.parametrize("nest", [lambda config: config, lambda config: {"text_config": config}])
def test_the_word_is_true_or_false(value, nest):
    with pytest.raises(
        CheckpointError, match=r"^/ckpt/config.json: tie_word_embeddings must be true or false"
    ) as caught:
        ties_embeddings(nest({"tie_word_embeddings": value}), path="/ckpt/config.json")
    assert caught.value.path == "/ckpt/config.json"


@pytest.mark.parametrize("config", [None, [], "llama", 3])
def test_a_config_is_an_object(config):
    with pytest.raises(CheckpointError, match=r"config\.json must hold an object"):
        ties_embeddings(config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["model_type", "tie_word_embeddings", "text_config", "architectures"]), inner)
    ),
    max_leaves=6,
)


@given(JSON)
def test_whatever_a_config_says_it_is_an_answer_or_a_checkpoint_error(config):
    with contextlib.suppress(CheckpointError):
        assert ties_embeddings(config) in (True, False)
    with contextlib.suppress(CheckpointError):
        assert config_tie(config, [EMBED]) in (None, (HEAD, EMBED))


# The output layer that nobody asks for by its name


@pytest.mark.parametrize(
    ("embedding", "output"),
    [
        (EMBED, HEAD),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", HEAD),
        ("model.decoder.embed_tokens.weight", HEAD),
        ("embed_tokens.weight", None),
        ("transformer.embed_tokens.weight", None),
    ],
)
def test_the_output_layer_is_beside_the_model_of_the_embedding(embedding, output):
    assert config_tie(TRUE, [embedding, "model.norm.weight"]) == (None if output is None else (output, embedding))


@pytest.mark.parametrize("names", [[], [EMBED, HEAD], [EMBED, "talker.lm_head.weight"], [EMBED, f"other.{EMBED}"]])
def test_an_output_layer_that_is_there_or_two_embeddings_make_no_tie(names):
    assert config_tie(TRUE, names) is None


@pytest.mark.parametrize(
    ("architectures", "has_one"),
    [
        (["LlamaForCausalLM"], True),
        (["LlavaForConditionalGeneration"], True),
        (["GPT2LMHeadModel"], True),
        ([], True),
        (3, True),
        (["LlamaModel"], False),
        (["LlamaForSequenceClassification"], False),
        ([3], False),
    ],
)
def test_a_model_without_an_output_layer_gets_none(architectures, has_one):
    tie = config_tie({**TRUE, "architectures": architectures}, [EMBED])
    assert tie == ((HEAD, EMBED) if has_one else None)


def test_a_config_that_ties_nothing_makes_no_tie():
    assert config_tie(FALSE, [EMBED]) is None
    assert config_tie({"model_type": "llama"}, [EMBED]) is None


# Names


def test_the_embedding_is_the_one_that_there_is():
    assert only_embedding([EMBED, HEAD, EMBED]) == EMBED
    assert only_embedding([EMBED, f"a.{EMBED}"]) is None
    assert only_embedding([HEAD]) is None


def test_an_output_layer_may_stand_in_each_module_above_the_embedding():
    assert output_names("a.b.embed_tokens.weight") == (HEAD, f"a.{HEAD}", f"a.b.{HEAD}")


def test_an_embedding_may_be_needed_for_an_output_layer_that_is_wanted_and_missing():
    assert may_need(EMBED, HEAD.__eq__, EMBED.__eq__)
    assert not may_need(EMBED, HEAD.__eq__, HEAD.__eq__)
    assert not may_need(EMBED, EMBED.__eq__, EMBED.__eq__)
    assert not may_need("model.norm.weight", HEAD.__eq__, EMBED.__eq__)
