import contextlib
import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.errors import CheckpointError, NamesError
from asyncshard.format.header import format_header, parse_header
from asyncshard.plan.division.slices import slice_tensor
from asyncshard.plan.tp.models import auto_plan, require_known


def table_of(*names):
    return parse_header(format_header((name, "U8", (0,), 0) for name in names)).table


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "attention_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
MISTRAL_7B = {**LLAMA_8B, "model_type": "mistral", "vocab_size": 32000, "sliding_window": None}
QWEN2_7B = {
    **LLAMA_8B,
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "use_sliding_window": False,
}
QWEN3_8B = {**LLAMA_8B, "model_type": "qwen3", "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936}
GEMMA_7B = {
    "model_type": "gemma",
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "vocab_size": 256000,
}
GEMMA_2B = {**GEMMA_7B, "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8}
GEMMA_2B["num_key_value_heads"] = 1
GEMMA2_9B = {**GEMMA_7B, "model_type": "gemma2", "hidden_size": 3584, "num_key_value_heads": 8}
GEMMA3_1B = {**GEMMA_2B, "model_type": "gemma3_text", "num_attention_heads": 4, "hidden_size": 1152}
MODELS = {
    "llama 8B": (LLAMA_8B, 8),
    "llama 8B on 2": (LLAMA_8B, 2),
    "llama 8B on 1": (LLAMA_8B, 1),
    "llama 70B on 16": (LLAMA_70B, 16),
    "llama 70B on 64": (LLAMA_70B, 64),
    "mistral": (MISTRAL_7B, 8),
    "qwen2": (QWEN2_7B, 4),
    "qwen2 on 28": ({**QWEN2_7B, "intermediate_size": 28 * 677}, 28),
    "qwen3": (QWEN3_8B, 16),
    "gemma": (GEMMA_7B, 16),
    "gemma 2B": (GEMMA_2B, 8),
    "gemma2": (GEMMA2_9B, 8),
    "gemma3": (GEMMA3_1B, 4),
}


def shapes_of(config, layer=11):
    """Return the shapes of a layer's tensors and of those outside the layers, as Hugging Face's files have them."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    kind = config["model_type"]
    shapes = {
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if kind == "qwen2":
        shapes |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if kind in ("qwen3", "gemma3_text"):
        shapes |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    if kind in ("gemma2", "gemma3_text"):
        shapes |= {"pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,)}
    whole = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not kind.startswith("gemma"):
        whole["lm_head.weight"] = (vocab, hidden)
    return {**{f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}, **whole}


def local_shape(name, shape, config, world_size):
    """Return by arithmetic what a rank should have."""
    if ".q_proj." in name or ".gate_proj." in name or ".up_proj." in name:
        return (shape[0] // world_size, *shape[1:])
    if ".k_proj." in name or ".v_proj." in name:
        return (shape[0] // min(world_size, config["num_key_value_heads"]), *shape[1:])
    if ".o_proj." in name or ".down_proj." in name:
        return (shape[0], shape[1] // world_size)
    return shape


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("model", MODELS)
def test_each_rank_has_its_heads_and_its_part_of_the_mlp(model, prefix):
    config, world_size = MODELS[model]
    plan = auto_plan(config, world_size)
    shapes = {name.replace("model.", prefix, 1): shape for name, shape in shapes_of(config).items()}
    plan.check([table_of(*shapes)])
    for rank in range(world_size):
        for name, shape in shapes.items():
            part = slice_tensor(name, shape, 16, plan.placement_of(name, shape), rank=rank, world_size=world_size)
            assert part.shape == local_shape(name, shape, config, world_size), name


def test_heads_of_keys_and_values_are_repeated_on_neighbouring_ranks():
    plan = auto_plan(LLAMA_70B, 16)
    name, shape = "model.layers.79.self_attn.v_proj.weight", (1024, 8192)
    for rank in range(16):
        part = slice_tensor(name, shape, 16, plan.placement_of(name, shape), rank=rank, world_size=16)
        assert part.runs == ((rank // 2 * 128 * 8192 * 2, 128 * 8192 * 2),)


def test_biases_go_with_their_weights():
    plan = auto_plan({**LLAMA_8B, "attention_bias": True, "mlp_bias": True}, 16)
    layer = "model.layers.0."
    for name, size, rows, first in [
        ("self_attn.q_proj", 4096, 256, 5 * 256),
        ("self_attn.k_proj", 1024, 128, 2 * 128),
        ("self_attn.v_proj", 1024, 128, 2 * 128),
        ("self_attn.o_proj", 4096, 4096, 0),
        ("mlp.gate_proj", 14336, 896, 5 * 896),
        ("mlp.up_proj", 14336, 896, 5 * 896),
        ("mlp.down_proj", 4096, 4096, 0),
    ]:
        bias = f"{layer}{name}.bias"
        part = slice_tensor(bias, (size,), 16, plan.placement_of(bias, (size,)), rank=5, world_size=16)
        assert part.runs == ((first * 2, rows * 2),)


def test_an_inner_size_that_the_ranks_do_not_divide_is_cut_alike_in_all_three():
    plan = auto_plan({**LLAMA_8B, "intermediate_size": 11}, 4)
    rows = []
    for rank in range(4):
        shapes = {"gate_proj": (11, 4), "up_proj": (11, 4), "down_proj": (4, 11)}
        sizes = []
        for name, shape in shapes.items():
            tensor = f"model.layers.0.mlp.{name}.weight"
            part = slice_tensor(tensor, shape, 16, plan.placement_of(tensor, shape), rank=rank, world_size=4)
            sizes.append(part.shape[shape.index(11)])
        assert len(set(sizes)) == 1
        rows.append(sizes[0])
    assert rows == [3, 3, 3, 2]


def test_early_llama_and_null_have_as_many_heads_of_keys_as_of_queries():
    early = {key: value for key, value in LLAMA_8B.items() if key != "num_key_value_heads"}
    assert auto_plan(early, 32) == auto_plan({**LLAMA_8B, "num_key_value_heads": 32}, 32)
    assert auto_plan({**QWEN2_7B, "num_key_value_heads": None}, 28) == auto_plan(early, 32)


def test_a_checkpoint_with_other_names_is_not_loaded_whole():
    plan = auto_plan(LLAMA_8B, 2)
    with pytest.raises(NamesError, match="q_proj"):
        plan.check([table_of("layers.0.attention.wq.weight", "model.layers.0.self_attn.qkv_proj.weight")])


def test_the_plan_pickles_and_the_config_is_left_alone():
    config = copy.deepcopy(QWEN3_8B)
    plan = auto_plan(config, 16)
    assert pickle.loads(pickle.dumps(plan)) == plan == auto_plan(QWEN3_8B, 16)
    assert config == QWEN3_8B


# What is refused


@pytest.mark.parametrize(
    ("config", "world_size", "reason"),
    [
        (LLAMA_8B, 3, "32 attention heads cannot be divided among 3 ranks"),
        (LLAMA_8B, 64, "32 attention heads cannot be divided among 64 ranks"),
        ({**LLAMA_8B, "num_attention_heads": 24, "num_key_value_heads": 8}, 12, "8 heads of keys and values"),
        ({**LLAMA_8B, "num_attention_heads": 24, "num_key_value_heads": 6}, 4, "6 heads of keys and values"),
        ({**LLAMA_8B, "num_key_value_heads": 5}, 1, "no multiple of 5"),
        ({**LLAMA_8B, "num_local_experts": 8}, 2, "mixture of experts"),
        ({**LLAMA_8B, "model_type": "mixtral"}, 2, "mixture of experts"),
        ({**LLAMA_8B, "model_type": "qwen2_moe"}, 2, "mixture of experts"),
        ({**QWEN3_8B, "num_experts": 128}, 2, r"mixture of experts \(num_experts\)"),
        ({**QWEN3_8B, "num_experts": "many"}, 2, "mixture of experts"),
        ({**LLAMA_8B, "n_routed_experts": 64}, 2, "mixture of experts"),
        ({**LLAMA_8B, "quantization_config": {"quant_method": "fp8"}}, 2, "quantized"),
        ({**LLAMA_8B, "quantization_config": {}}, 2, "quantized"),
        ({**LLAMA_8B, "quantization_config": "int8"}, 2, "quantized"),
        ({**LLAMA_8B, "compression_config": {}}, 2, "quantized"),
        ({**LLAMA_8B, "text_config": LLAMA_8B}, 2, "several models"),
        ({"model_type": "gemma3", "text_config": GEMMA3_1B, "vision_config": {}}, 2, "several models"),
        ({**LLAMA_8B, "model_type": "gemma3"}, 2, "none of those known"),
        ({**LLAMA_8B, "model_type": "lama"}, 2, "nearest is llama"),
        ({**LLAMA_8B, "model_type": "bert"}, 2, "none of those known, gemma, gemma2"),
        ({**LLAMA_8B, "model_type": "x" * 10**6}, 2, "none of those known"),
        ({**LLAMA_8B, "model_type": ""}, 2, "none of those known"),
        ({**LLAMA_8B, "model_type": None}, 2, "no model_type"),
        ({}, 2, "no model_type"),
        ({**LLAMA_8B, "model_type": ["llama"]}, 2, "must be a text"),
        ({**LLAMA_8B, "model_type": 7}, 2, "must be a text"),
        ({"model_type": "llama"}, 2, "no num_attention_heads"),
        ({"model_type": "mistral", "num_attention_heads": 32}, 2, "no num_key_value_heads"),
        *[
            ({**LLAMA_8B, "num_attention_heads": wrong}, 1, "num_attention_heads must be")
            for wrong in (0, -8, 8.0, "8")
        ],
        *[({**LLAMA_8B, "num_key_value_heads": wrong}, 1, "num_key_value_heads must") for wrong in (0, True, [8], {})],
    ],
)
def test_what_the_table_cannot_do_is_refused_with_the_reason(config, world_size, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        auto_plan(config, world_size, path="/ckpt/config.json")
    message = str(caught.value)
    assert message.startswith("/ckpt/config.json: tp_plan='auto' cannot be used: ")
    assert message.endswith(
        "Pass a tp_plan of your own, with the name and the placement of each module that is to be split."
    )
    assert caught.value.path == "/ckpt/config.json"
    assert len(message) < 1000


def test_no_experts_and_no_quantization_said_in_so_many_words_are_no_reason():
    config = {**LLAMA_8B, "num_experts": 0, "num_local_experts": None, "quantization_config": None, "text_config": None}
    assert auto_plan(config, 2) == auto_plan(LLAMA_8B, 2)


@pytest.mark.parametrize("config", [None, [], "llama", 3])
def test_a_config_is_an_object(config):
    with pytest.raises(CheckpointError, match=r"config\.json must hold an object"):
        auto_plan(config, 2)


@pytest.mark.parametrize("world_size", [0, -1, 1.5, True, "2", None])
def test_a_world_size_is_a_whole_number(world_size):
    with pytest.raises(ValueError, match="world_size must be"):
        auto_plan(LLAMA_8B, world_size)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*LLAMA_8B, "num_experts", "quantization_config"]), JSON), st.integers(1, 16))
def test_whatever_a_config_says_it_is_a_plan_or_a_checkpoint_error(changes, world_size):
    with contextlib.suppress(CheckpointError):
        auto_plan({**LLAMA_8B, **changes}, world_size)


def test_a_model_in_another_form_is_refused_rather_than_loaded_whole():
    plan = auto_plan({"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8}, 4)
    layer = "model.layers.3"
    known = [f"{layer}.self_attn.q_proj.weight", f"{layer}.input_layernorm.weight", "lm_head.weight"]
    require_known(plan, known)
    for name in ("self_attn.qkv_proj.weight", "mlp.experts.0.gate_up_proj.weight", "mlp.gate_up_proj.bias"):
        with pytest.raises(CheckpointError, match=rf"^x: .*{name}.*explicit tp_plan") as caught:
            require_known(plan, [*known, f"{layer}.{name}"], path="x")
        assert caught.value.tensor == f"{layer}.{name}"
