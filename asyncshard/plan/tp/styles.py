"""The words for placements in the tensor-parallel plans of transformers.

The words are the keys of ``ALL_PARALLEL_STYLES`` in transformers 4.50 to 5.24. Most words also say how a module
communicates, which does not concern a loader: ``colwise`` and ``colwise_gather_output`` place the same bytes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from reprlib import repr as short_repr
from types import MappingProxyType

from asyncshard.errors import CheckpointError
from asyncshard.plan.division.placements import PackedShard, Placement, Replicate, Shard

_COLWISE = frozenset({"colwise", "colwise_rep", "colwise_gather_output", "local_colwise"})
_ROWWISE = frozenset({"rowwise", "rowwise_rep", "rowwise_split_input", "local_rowwise"})
_PACKED_COLWISE = frozenset({"packed_colwise", "local_packed_colwise"})
_PACKED_ROWWISE = frozenset({"packed_rowwise", "local_packed_rowwise"})
_SPLITTING = _COLWISE | _ROWWISE | _PACKED_COLWISE | _PACKED_ROWWISE
_REPLICATING = frozenset(
    {
        "all_reduce",
        "gather",
        "local",
        "local_params",
        "mla_kv_a_proj",
        "replicate",
        "replicated_with_grad_allreduce",
        "sequence_parallel",
    }
)
KNOWN_WORDS = tuple(sorted(_SPLITTING | _REPLICATING))
"""The words that a plan may use."""

_EXPERTS = "a mixture of experts is not placed by words: say for each tensor of the experts what to do with it"
_EMBEDDING = "embeddings are split only by an explicit placement: say Shard(0) to cut the vocabulary, or 'replicate'"
_REFUSED = {
    "embedding_colwise": _EMBEDDING,
    "embedding_rowwise": _EMBEDDING,
    "ep_dispatch_experts": _EXPERTS,
    "ep_router": _EXPERTS,
    "grouped_gemm": _EXPERTS,
    "moe_identity_expert": _EXPERTS,
    "moe_tp_experts": _EXPERTS,
    "vocab_parallel_rowwise": _EMBEDDING,
}
_EMBEDDINGS = frozenset(
    {
        "embed_in",
        "embed_positions",
        "embed_tokens",
        "position_embeddings",
        "tok_embeddings",
        "token_type_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    }
)
"""The names of embeddings in models. A row of an embedding is a token, while a row of a linear layer is an output, so a
word would cut another dimension than it says."""


def check_word(key: str, word: str) -> None:
    """Raise ValueError if a plan must not use `word` for the modules or parameters named `key`."""
    if word in _REFUSED:
        raise ValueError(f"tp_plan: {word!r} of {key!r} is refused: {_REFUSED[word]}")
    if word in _REPLICATING:
        return
    if word not in _SPLITTING:
        near = difflib.get_close_matches(word[:100], KNOWN_WORDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"tp_plan: {short_repr(word)} of {key!r} is not a word for a placement{hint} Known are "
            f"{', '.join(KNOWN_WORDS)}; or give a Shard, PackedShard or Replicate"
        )
    if key.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS:
        raise ValueError(f"tp_plan: {word!r} of {key!r} is refused: {_EMBEDDING}")


def placement_of_word(word: str, name: str, shape: tuple[int, ...]) -> Placement:
    """Return the placement that a known `word` gives a tensor of this shape.

    A tensor with one dimension is taken for a bias, one with more for a weight. Scalars are whole on every rank.

    Raises
    ------
    CheckpointError
        The word is for two fused tensors of equal size, and the dimension has an odd size.
    """
    by_ndim = _BY_NDIM.get(word)
    if by_ndim is not None:
        return by_ndim[min(len(shape), 2)]
    if word in _PACKED_COLWISE and shape:
        return _halves(word, name, shape, -2 if len(shape) > 1 else 0)
    if word in _PACKED_ROWWISE and len(shape) > 1:
        return _halves(word, name, shape, -1)
    return _WHOLE


_WHOLE = Replicate()
_BY_NDIM: Mapping[str, tuple[Placement, Placement, Placement]] = MappingProxyType(
    {
        **dict.fromkeys(_COLWISE, (_WHOLE, Shard(0), Shard(-2))),
        **dict.fromkeys(_ROWWISE, (_WHOLE, _WHOLE, Shard(-1))),
        **dict.fromkeys(_REPLICATING, (_WHOLE, _WHOLE, _WHOLE)),
    }
)
"""For each word, the placements of a scalar, of a bias, and of a weight."""


def _halves(word: str, name: str, shape: tuple[int, ...], dim: int) -> PackedShard:
    """Return the placement of two tensors of equal size that are fused along `dim`."""
    half, odd = divmod(shape[dim], 2)
    if odd:
        raise CheckpointError(
            f"tensor {name!r} of shape {shape} cannot be placed by {word!r}: its dimension {dim} does not hold two "
            "tensors of one size; give a PackedShard with their sizes in the tp_plan",
            tensor=name,
        )
    return PackedShard(dim, (half, half))
