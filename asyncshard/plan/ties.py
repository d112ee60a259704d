"""Ties: further names of a tensor that a checkpoint stores under one name. Loading, reading and checking use this rule.

A tie consists of a missing name and the stored name of the same tensor. A checkpoint can tell a tie in two ways.

**In the metadata of a file.** `save_sharded_state` writes a key of its own, such as
``{"asyncshard.tie.lm_head.weight": "model.embed_tokens.weight"}``, and also the pair
``{"lm_head.weight": "model.embed_tokens.weight"}``, which ``safetensors.torch.save_model`` writes for a tensor that it
leaves out. A key with our prefix is always a tie. A pair without the prefix may be any text whose value is by chance
the name of a tensor (``{"type": "embeddings"}``). It is a tie only if the caller asks for the missing name (as a
destination, in a rule of a plan, or with `get_tensor`), or if the missing name looks like the name of a parameter: it
has dots, and its last part is that of the stored name.

**In config.json.** ``tie_word_embeddings`` says that the output layer ``lm_head`` is the embedding. The field may be in
the config itself or in its ``text_config``. If either is true, the two tensors are tied. If one is false and none is
true, they are not. If both are absent, the default of the ``model_type`` of the config or of ``text_config`` decides.
This is the behaviour of transformers 5.24, with one exception:

- ``PreTrainedModel.get_expanded_tied_weights_keys`` (``modeling_utils.py``) reads only the outer config; before
  version 5 it read ``config.get_text_config(decoder=True)``. The configs of models whose older files have the field in
  ``text_config`` copy the value true from there (``LlavaConfig``, ``Qwen2VLConfig``, ``Glm4vConfig``, ...).
- ``PreTrainedConfig`` has no default since version 5 (before, it was true). Each config class has its own default, and
  `TIED_MODEL_TYPES` lists the models where it is true. The exception: false in ``text_config`` takes precedence over a
  default of the outer config, so that a lost output layer is reported as missing instead of being replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from reprlib import repr as short_repr

from asyncshard.errors import CheckpointError

EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"
"""The ends of the names of the embedding and of the output layer, which a model may share."""
TIE_PREFIX = "asyncshard.tie."
"""The prefix of a key of the metadata that tells a tie. The missing name follows; the value is the stored name."""
TIED_MODEL_TYPES = frozenset(
    """
    aya_vision bart blenderbot blenderbot-small cohere cohere2 cohere2_moe cohere2_vision cohere_compass_text
    deepseek_vl deepseek_vl_hybrid diffusion_gemma ernie4_5 ernie4_5_moe ernie4_5_vl_moe fun_asr_nano gemma gemma2
    gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_assistant
    gemma4_unified_text glmasr got_ocr2 granite_docling granite_speech granite_speech_plus granite_swa hunyuan_vl
    hyperclovax_vision_v2 internvl janus jetmoe kimi_k25 kosmos-2 lara_mini lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl
    lighton_ocr marian mbart minicpm3 minicpm_ocr mistral3 moss_transcribe_diarize mvp opt ovis2 paddleocr_vl
    paligemma pegasus plbart pp_chart2table qwen3_asr recurrent_gemma shieldgemma2 smollm3 speech_to_text starcoder2
    vaultgemma voxtral_realtime xglm youtu zamba zamba2 zaya
    """.split()  # noqa: SIM905 - a word a line would be seventy
)
"""The model types for which ``tie_word_embeddings`` is true by default, and ties ``lm_head`` with ``embed_tokens``."""
_WORD = "tie_word_embeddings"
_WITH_OUTPUT = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""The ends of the names of architectures that have an output layer."""


def tie_metadata(ties: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata for ties, given as stored names by missing names: keys of ours, and pairs of safetensors."""
    return {**ties, **{f"{TIE_PREFIX}{name}": stored_name for name, stored_name in ties.items()}}


def told_ties(
    metadata: Mapping[str, str], is_stored: Callable[[str], bool], is_asked: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the missing name and the stored name of each tie that the metadata of a file tells.

    Parameters
    ----------
    metadata : mapping of str to str
        The metadata of the file.
    is_stored : callable
        Returns whether the files hold a tensor of a given name.
    is_asked : callable, optional
        Returns whether the caller asks for a tensor of a given name; None if the caller names no tensors.
    """
    for key, stored_name in metadata.items():
        name = key.removeprefix(TIE_PREFIX)
        if not is_stored(stored_name) or is_stored(name):
            continue
        if name != key or _is_parameter(name, stored_name) or (is_asked is not None and is_asked(name)):
            yield name, stored_name


def _is_parameter(name: str, stored_name: str) -> bool:
    """Return whether a text looks like the name of a parameter whose last part is that of the stored name."""
    module, dot, last = name.rpartition(".")
    return bool(module and dot) and stored_name.endswith(f".{last}") and not any(map(str.isspace, name))


def tie_word(config: object, *, path: str | None = None) -> bool | None:
    """Return ``tie_word_embeddings`` of a config or of its ``text_config``; None if both lack the field.

    Raises
    ------
    CheckpointError
        The config is not a mapping, or the field is neither true nor false.
    """
    said = [word for part in _parts(config, path) if (word := _word_of(part, path)) is not None]
    return any(said) if said else None


def ties_embeddings(config: object, *, path: str | None = None) -> bool:
    """Return whether the output layer of a model is its embedding, so that its files may hold only one of them.

    Parameters
    ----------
    config : object
        The content of ``config.json``.
    path : str, optional
        The path of ``config.json``, for messages.

    Raises
    ------
    CheckpointError
        The config is not a mapping, or ``tie_word_embeddings`` is neither true nor false.
    """
    word = tie_word(config, path=path)
    if word is not None:
        return word
    types = [part.get("model_type") for part in _parts(config, path)]
    return any(isinstance(each, str) and each in TIED_MODEL_TYPES for each in types)


def config_tie(config: object, names: Iterable[str], *, path: str | None = None) -> tuple[str, str] | None:
    """Return the missing name and the stored name of the output layer's tie; None if the config tells no such tie.

    `names` are the names of all tensors, or at least of those that end with `EMBEDDING` or `OUTPUT`. The output layer
    is tied if there is one embedding and no output layer among them, the embedding is within a module named ``model``
    (the output layer is beside that module), and the config names no architecture without an output layer.

    Raises
    ------
    CheckpointError
        The config is not a mapping, or ``tie_word_embeddings`` is neither true nor false.
    """
    names = set(names)
    embedding = only_embedding(names)
    if embedding is None or any(name.endswith(OUTPUT) for name in names):
        return None
    output = _output_beside(embedding)
    if output is None or not ties_embeddings(config, path=path) or not _has_output(config):
        return None
    return output, embedding


def only_embedding(names: Iterable[str]) -> str | None:
    """Return the name of the only embedding; None if there is none, or more than one."""
    embeddings = {name for name in names if name.endswith(EMBEDDING)}
    return embeddings.pop() if len(embeddings) == 1 else None


def output_names(embedding: str) -> tuple[str, ...]:
    """Return the possible names of the output layer that belongs to an embedding: it is in a module above."""
    above = embedding.removesuffix(EMBEDDING).split(".")[:-1]
    return tuple(".".join([*above[:depth], OUTPUT]) for depth in range(len(above) + 1))


def may_need(name: str, is_wanted: Callable[[str], bool], is_stored: Callable[[str], bool]) -> bool:
    """Return whether a tensor may be needed for an output layer that is wanted and not stored."""
    return name.endswith(EMBEDDING) and any(
        is_wanted(output) and not is_stored(output) for output in output_names(name)
    )


def _output_beside(embedding: str) -> str | None:
    """Return the name of the output layer beside the module ``model`` of an embedding; None without that module."""
    above = embedding.removesuffix(EMBEDDING).split(".")[:-1]
    return ".".join([*above[: above.index("model")], OUTPUT]) if "model" in above else None


def _has_output(config: object) -> bool:
    """Return whether an architecture of the config has an output layer; True if the config names no architecture."""
    names = config.get("architectures") if isinstance(config, Mapping) else None
    if not isinstance(names, list) or not names:
        return True
    return any(isinstance(name, str) and name.endswith(_WITH_OUTPUT) for name in names)


def _parts(config: object, path: str | None) -> list[Mapping[str, object]]:
    """Return the config, and its ``text_config`` if it has one."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{path or 'config.json'} must hold an object, got {short_repr(config)}", path=path)
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, Mapping) else [config]


def _word_of(part: Mapping[str, object], path: str | None) -> bool | None:
    word = part.get(_WORD)
    if word is None or isinstance(word, bool):
        return word
    raise CheckpointError(f"{path or 'config.json'}: {_WORD} must be true or false, got {short_repr(word)}", path=path)
