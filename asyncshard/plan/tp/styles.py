"""The words that transformers' plans of tensor parallelism use, and what each says of a tensor in a checkpoint.

They are the keys of its ``ALL_PARALLEL_STYLES``, from 4.50 to 5.24. Most also say how a module communicates, which is
nothing to a loader: ``colwise`` and ``colwise_gather_output`` place the same bytes.
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
"""What models call their embeddings. A row of them is a token, not an output as in a linear layer, so that the words
would mean another dimension than they say."""


def check_word(key: str, word: str) -> None:
    """Raise ValueError where a plan may not give `word` to the modules or parameters called `key`."""
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
    """Return what a known `word` says of a tensor: a weight, or with fewer than two dimensions a bias.

    Scalars are whole on every rank.

    Raises
    ------
    CheckpointError
        The dimension that packs two tensors has an odd size.
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
"""The placement of a scalar, of a bias, and of a weight."""


def _halves(word: str, name: str, shape: tuple[int, ...], dim: int) -> PackedShard:
    half, odd = divmod(shape[dim], 2)
    if odd:
        raise CheckpointError(
            f"tensor {name!r} of shape {shape} cannot be placed by {word!r}: its dimension {dim} does not hold two "
            "tensors of one size; give a PackedShard with their sizes in the tp_plan",
            tensor=name,
        )
    return PackedShard(dim, (half, half))
