"""Ties: other names of a tensor that a checkpoint holds once. The one rule, for whoever loads, reads or checks it.

A tie names a tensor that is missing, and the stored one that it is. It is told in one of two ways.

**By the metadata of a file.** `save_sharded_state` writes a key of our own, such as
``{"asyncshard.tie.lm_head.weight": "model.embed_tokens.weight"}``, and beside it the pair
``{"lm_head.weight": "model.embed_tokens.weight"}``, which is how ``safetensors.torch.save_model`` tells what it left
out. A key of our own is a tie. A pair of the other kind may be any text whose value happens to be a tensor's name
(``{"type": "embeddings"}``): it is a tie where somebody asks for the missing name (a destination, a rule of a plan,
`get_tensor`), or where that name reads like a parameter's: dotted, with the last part of the stored name.

**By config.json.** ``tie_word_embeddings`` says that the output layer ``lm_head`` is the embedding. It stands in the
config itself or in its ``text_config``; where either says true they are tied, where one says false and none true they
are not, and where neither says anything the default of the ``model_type`` decides, of the config or of ``text_config``.
That is what transformers 5.24 does, with one exception:

- ``PreTrainedModel.get_expanded_tied_weights_keys`` (``modeling_utils.py``) asks the outer config alone; before 5 it
  was ``config.get_text_config(decoder=True)``. The configs of models whose older files have the word within
  ``text_config`` copy a true from there (``LlavaConfig``, ``Qwen2VLConfig``, ``Glm4vConfig``, ...).
- ``PreTrainedConfig`` has no default any more (it was true before 5): each config class has one, and `TIED_MODEL_TYPES`
  lists those where it is true. The exception: a false in ``text_config`` goes before a default of the outer config, so
  that an output layer that was lost is missed rather than made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from reprlib import repr as short_repr

from asyncshard.errors import CheckpointError

EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"
"""How the names end of the two tensors that a model may share."""
TIE_PREFIX = "asyncshard.tie."
"""How a key of the metadata begins that tells a tie; the missing name follows, and the value is the stored name."""
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
"""Models whose config is tied unless it says otherwise, and whose ``lm_head.weight`` is an ``embed_tokens.weight``."""
_WORD = "tie_word_embeddings"
_WITH_OUTPUT = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""How the names of architectures end that have an output layer."""


def tie_metadata(ties: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that tells ties, each a missing name with the stored one: by our keys and by safetensors'."""
    return {**ties, **{f"{TIE_PREFIX}{name}": stored_name for name, stored_name in ties.items()}}


def told_ties(
    metadata: Mapping[str, str], is_stored: Callable[[str], bool], is_asked: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the ties that a file's metadata tells: the missing name, and the stored one.

    Parameters
    ----------
    metadata : mapping of str to str
    is_stored : callable
        Whether the files hold a tensor of this name.
    is_asked : callable, optional
        Whether somebody asks for a tensor of this name; None where everything is taken that is there.
    """
    for key, stored_name in metadata.items():
        name = key.removeprefix(TIE_PREFIX)
        if not is_stored(stored_name) or is_stored(name):
            continue
        if name != key or _is_parameter(name, stored_name) or (is_asked is not None and is_asked(name)):
            yield name, stored_name


def _is_parameter(name: str, stored_name: str) -> bool:
    """Return whether a text reads like the name of a parameter of the same kind as a tensor."""
    module, dot, last = name.rpartition(".")
    return bool(module and dot) and stored_name.endswith(f".{last}") and not any(map(str.isspace, name))


def tie_word(config: object, *, path: str | None = None) -> bool | None:
    """Return what a config says of ``tie_word_embeddings``, itself or in its ``text_config``; None if it is silent.

    Raises
    ------
    CheckpointError
        The config is not a mapping, or the word is neither true nor false.
    """
    said = [word for part in _parts(config, path) if (word := _word_of(part, path)) is not None]
    return any(said) if said else None


def ties_embeddings(config: object, *, path: str | None = None) -> bool:
    """Return whether the output layer of a config's model is its embedding, so that files need not hold both.

    Parameters
    ----------
    config : object
        What the JSON of ``config.json`` holds.
    path : str, optional
        Of ``config.json``, for messages.

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
    """Return the tie of the output layer that nobody asks for by name; None where the config tells none.

    There is one where `names`, those of all tensors or of those that end like `EMBEDDING` or `OUTPUT`, have one
    embedding and no output layer, and the model has one: its config names no other architecture, and the embedding
    stands in a module called ``model``, beside which the output layer is.

    Raises
    ------
    CheckpointError
        As for `ties_embeddings`.
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
    """Return the one name that is an embedding's; None where there are several, or none."""
    embeddings = {name for name in names if name.endswith(EMBEDDING)}
    return embeddings.pop() if len(embeddings) == 1 else None


def output_names(embedding: str) -> tuple[str, ...]:
    """Return the names that the output layer may have beside an embedding: it stands in one of the modules above."""
    above = embedding.removesuffix(EMBEDDING).split(".")[:-1]
    return tuple(".".join([*above[:depth], OUTPUT]) for depth in range(len(above) + 1))


def may_need(name: str, is_wanted: Callable[[str], bool], is_stored: Callable[[str], bool]) -> bool:
    """Return whether a tensor may have to be read for the output layer: one that is wanted, and stored nowhere."""
    return name.endswith(EMBEDDING) and any(
        is_wanted(output) and not is_stored(output) for output in output_names(name)
    )


def _output_beside(embedding: str) -> str | None:
    """Return the name of the output layer of the model that has an embedding; None for a model without."""
    above = embedding.removesuffix(EMBEDDING).split(".")[:-1]
    return ".".join([*above[: above.index("model")], OUTPUT]) if "model" in above else None


def _has_output(config: object) -> bool:
    """Return whether the architectures that a config names have an output layer; a config that names none may."""
    names = config.get("architectures") if isinstance(config, Mapping) else None
    if not isinstance(names, list) or not names:
        return True
    return any(isinstance(name, str) and name.endswith(_WITH_OUTPUT) for name in names)


def _parts(config: object, path: str | None) -> list[Mapping[str, object]]:
    """Return the config, and that of its language model where that is a part of it."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{path or 'config.json'} must hold an object, got {short_repr(config)}", path=path)
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, Mapping) else [config]


def _word_of(part: Mapping[str, object], path: str | None) -> bool | None:
    word = part.get(_WORD)
    if word is None or isinstance(word, bool):
        return word
    raise CheckpointError(f"{path or 'config.json'}: {_WORD} must be true or false, got {short_repr(word)}", path=path)
