"""Plans of tensor parallelism for known models, chosen by ``config.json``.

The rules use the tensor names of Hugging Face checkpoints. Attention is cut on whole heads, and the MLP along its inner
dimension. All other tensors (norms, embeddings, the output layer) are whole on every rank. If the number of ranks does
not divide the inner dimension, it is cut as ``torch.chunk`` cuts it, at the same indexes in all three weights of the
MLP, so that the sum over the ranks is still right.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from reprlib import repr as short_repr
from typing import Any, NoReturn

from asyncshard.errors import CheckpointError
from asyncshard.plan.division.chunks import whole_number
from asyncshard.plan.division.placements import Placement, Shard
from asyncshard.plan.text import enumerate_names
from asyncshard.plan.tp.plan import TpPlan

_MODEL_TYPES = frozenset({"gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"})
_EXPERTS = (
    "moe_intermediate_size",
    "moe_num_experts",
    "n_routed_experts",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
)
_QUANTIZATION = ("quantization_config", "compression_config")
_OTHER_PARTS = ("text_config", "vision_config", "audio_config")
_PROJECTION = re.compile(r"layers\.[0-9]+\..*proj\.(weight|bias)$")
_EXPLICIT = "Pass a tp_plan of your own, with the name and the placement of each module that is to be split."


def auto_plan(config: Mapping[str, Any], world_size: int, *, path: str | None = None) -> TpPlan:
    """Return the plan of a dense Llama, Mistral, Qwen 2, Qwen 3 or Gemma model.

    If there are fewer key and value heads than ranks, ``world_size / num_key_value_heads`` neighbouring ranks hold the
    same head.

    Parameters
    ----------
    config : mapping
        The content of ``config.json``.
    world_size : int
        The number of ranks.
    path : str, optional
        The path of ``config.json``, for messages.

    Raises
    ------
    CheckpointError
        The model is unknown, has a mixture of experts or is quantized; its heads cannot be divided among
        `world_size` ranks; or a field of the config is missing.
    ValueError
        `world_size` is not a whole number of at least 1.
    """
    world_size = whole_number(world_size, "world_size", minimum=1)
    _check_config(config, path)
    _check_model(config, path)
    heads = _number(config, "num_attention_heads", path)
    if config.get("num_key_value_heads") is None and ("num_key_value_heads" in config or _is_llama(config)):
        kv_heads = heads  # the default of transformers
    else:
        kv_heads = _number(config, "num_key_value_heads", path)
    if heads % kv_heads:
        _refuse(f"{heads} attention heads are no multiple of {kv_heads} heads of keys and values", path)
    if heads % world_size:
        _refuse(f"{heads} attention heads cannot be divided among {world_size} ranks", path)
    if kv_heads % world_size and world_size % kv_heads:
        _refuse(f"{kv_heads} heads of keys and values can be neither divided nor repeated on {world_size} ranks", path)
    keys: Placement | str = "colwise" if kv_heads >= world_size else Shard(0, pieces=kv_heads)
    return TpPlan(
        {
            "model.layers.*.self_attn.q_proj": "colwise",
            "model.layers.*.self_attn.k_proj": keys,
            "model.layers.*.self_attn.v_proj": keys,
            "model.layers.*.self_attn.o_proj": "rowwise",
            "model.layers.*.mlp.gate_proj": "colwise",
            "model.layers.*.mlp.up_proj": "colwise",
            "model.layers.*.mlp.down_proj": "rowwise",
        }
    )


def require_known(plan: TpPlan, names: Iterable[str], *, path: str | None = None) -> None:
    """Check that a plan of `auto_plan` has a rule for every projection of the layers in a checkpoint.

    Raises
    ------
    CheckpointError
        The checkpoint has projections that the plan does not know, such as fused ones, experts or adapters.
    """
    others = [name for name in plan.match(names).unmatched if _PROJECTION.search(name)]
    if others:
        raise CheckpointError(
            f"{path or 'the checkpoint'}: tp_plan='auto' does not know how {enumerate_names(others)} are divided; pass "
            "an explicit tp_plan",
            path=path,
            tensor=others[0],
        )


def _check_config(config: object, path: str | None) -> None:
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{path or 'config.json'} must hold an object, got {short_repr(config)}", path=path)


def _check_model(config: Mapping[str, Any], path: str | None) -> None:
    """Raise CheckpointError if `auto_plan` has no rules for the model."""
    model_type = config.get("model_type")
    if model_type is None:
        _refuse("there is no model_type", path)
    if not isinstance(model_type, str):
        _refuse(f"model_type must be a text, got {short_repr(model_type)}", path)
    for key in _QUANTIZATION:
        if config.get(key) is not None:
            _refuse(f"the model is quantized ({key}), and its scales cannot be placed by their names alone", path)
    experts = [key for key in _EXPERTS if config.get(key) not in (None, 0)]
    if experts or model_type.endswith("moe") or model_type == "mixtral":
        _refuse(f"{short_repr(model_type)} has a mixture of experts ({', '.join(experts) or 'model_type'})", path)
    parts = [key for key in _OTHER_PARTS if config.get(key) is not None]
    if parts:
        _refuse(f"{short_repr(model_type)} is made of several models ({', '.join(parts)})", path)
    if model_type not in _MODEL_TYPES:
        near = difflib.get_close_matches(model_type[:100], sorted(_MODEL_TYPES), 1, 0.8)
        hint = f" (the nearest is {near[0]})" if near else ""
        known = ", ".join(sorted(_MODEL_TYPES))
        _refuse(f"model_type {short_repr(model_type)} is none of those known, {known}{hint}", path)


def _is_llama(config: Mapping[str, Any]) -> bool:
    # Configs of the first Llama models have no number of key and value heads: it equals the number of query heads.
    return bool(config.get("model_type") == "llama")


def _number(config: Mapping[str, Any], key: str, path: str | None) -> int:
    if config.get(key) is None:
        _refuse(f"there is no {key}", path)
    try:
        return whole_number(config[key], key, minimum=1)
    except ValueError as error:
        _refuse(str(error), path)


def _refuse(reason: str, path: str | None) -> NoReturn:
    raise CheckpointError(f"{path or 'config.json'}: tp_plan='auto' cannot be used: {reason}. {_EXPLICIT}", path=path)
