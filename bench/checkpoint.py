"""The files that are loaded: one rank of a 1B Llama, headers of very many tensors, and very many small tensors; and
what is loaded from S3 besides.

They are written byte by byte from the format's definition, by neither the library under test nor a peer, once for each
scale.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ITEM_BYTES = {"BF16": 2, "F32": 4}
_BLOCK = 64 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a file that was generated here."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and where it lies."""

    tensor: Tensor
    path: Path
    start: int


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    headers: tuple[int, int]
    """Tensors of the smaller and of the larger header."""
    small_tensors: int
    views: int
    """Views of one storage for `filter_subtensors`."""
    parameters: int
    ranks: int
    """For `compute_shard_assignment`."""
    pages: int
    """Tensors of 4 KiB of one object."""
    late: int
    """Tensors of 1 MiB that a server sends late."""
    cancels: int
    """Loads that are cancelled."""
    whole_layers: int
    """Layers of a checkpoint that was not cut for ranks."""


FULL = Scale(
    "full", 16, 2048, 8192, 128256, (100_000, 1_000_000), 100_000, 100_000, 1_000_000, 1_024, 100_000, 256, 1_000, 24
)
QUICK = Scale("quick", 4, 256, 1024, 4096, (1_000, 10_000), 1_000, 1_000, 10_000, 64, 1_000, 16, 20, 4)
SCALES = {scale.name: scale for scale in (FULL, QUICK)}
RANK, WORLD_SIZE = 0, 2


def rank_parts(scale: Scale) -> list[list[Tensor]]:
    """Return what rank 0 of 2 of a Llama holds, named and fused as vLLM does, in three parts of about the same size.

    The embedding is the largest tensor; the second part has layers only.
    """
    hidden, intermediate = scale.hidden, scale.intermediate // WORLD_SIZE
    vocabulary = (scale.vocabulary // WORLD_SIZE, hidden)

    def layers(first: int, last: int) -> Iterator[Tensor]:
        for number in range(first, last):
            for name, shape in (
                ("input_layernorm", (hidden,)),
                ("self_attn.qkv_proj", ((hidden + hidden // 2) // WORLD_SIZE, hidden)),
                ("self_attn.o_proj", (hidden, hidden // WORLD_SIZE)),
                ("post_attention_layernorm", (hidden,)),
                ("mlp.gate_up_proj", (2 * intermediate, hidden)),
                ("mlp.down_proj", (hidden, intermediate)),
            ):
                yield Tensor(f"model.layers.{number}.{name}.weight", "BF16", shape)

    quarter = scale.layers // 4
    return [
        [Tensor("model.embed_tokens.weight", "BF16", vocabulary), *layers(0, quarter)],
        [*layers(quarter, 3 * quarter)],
        [
            *layers(3 * quarter, scale.layers),
            Tensor("model.norm.weight", "BF16", (hidden,)),
            Tensor("lm_head.weight", "BF16", vocabulary),
        ],
    ]


def whole_parts(scale: Scale) -> list[list[Tensor]]:
    """Return a Llama that is not cut for ranks, named as on the Hugging Face hub, in two files."""
    hidden, intermediate = scale.hidden, scale.intermediate

    def layers(first: int, last: int) -> Iterator[Tensor]:
        for number in range(first, last):
            for name, shape in (
                ("input_layernorm", (hidden,)),
                ("mlp.down_proj", (hidden, intermediate)),
                ("mlp.gate_proj", (intermediate, hidden)),
                ("mlp.up_proj", (intermediate, hidden)),
                ("post_attention_layernorm", (hidden,)),
                ("self_attn.k_proj", (hidden // 4, hidden)),
                ("self_attn.o_proj", (hidden, hidden)),
                ("self_attn.q_proj", (hidden, hidden)),
                ("self_attn.v_proj", (hidden // 4, hidden)),
            ):
                yield Tensor(f"model.layers.{number}.{name}.weight", "BF16", shape)

    half = scale.whole_layers // 2
    embedding = Tensor("model.embed_tokens.weight", "BF16", (scale.vocabulary // 4, hidden))
    norm = Tensor("model.norm.weight", "BF16", (hidden,))
    return [[embedding, *layers(0, half)], [*layers(half, scale.whole_layers), norm]]


def _experts(count: int) -> Iterator[Tensor]:
    """Yield tensors of 8 bytes with the names of a mixture of experts: the file stays small, the header does not."""
    for number in range(count):
        layer, expert = divmod(number // 3, 512)
        yield Tensor(f"layers.{layer}.experts.{expert}.w{number % 3 + 1}", "BF16", (2, 2))


@dataclass(frozen=True, slots=True)
class Dataset:
    """The files of one scale in a folder."""

    folder: Path
    scale: Scale

    @property
    def rank(self) -> Path:
        """A directory of rank shards."""
        return self.folder / "rank"

    @property
    def files(self) -> list[Path]:
        return [self.rank / f"model-rank-{RANK}-part-{part}.safetensors" for part in range(3)]

    @property
    def layers_only(self) -> Path:
        """The part without the large tensors."""
        return self.files[1]

    def header(self, count: int) -> Path:
        return self.folder / f"header-{count}.safetensors"

    @property
    def small(self) -> Path:
        """A file of very many tensors of 4 bytes."""
        return self.folder / "small.safetensors"

    @property
    def pages(self) -> Path:
        """A file of many tensors of 4 KiB, which an object store is not to be asked for one by one."""
        return self.folder / "pages.safetensors"

    @property
    def late(self) -> Path:
        """A file of tensors of 1 MiB."""
        return self.folder / "late.safetensors"

    @property
    def whole(self) -> Path:
        """A directory with a checkpoint that was not cut for ranks."""
        return self.folder / "whole"

    @property
    def whole_files(self) -> list[Path]:
        return [self.whole / f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]

    def objects(self) -> list[tuple[str, Path]]:
        """Return the keys of what is loaded from S3: the files' paths below the folder."""
        return [(path.relative_to(self.folder).as_posix(), path) for path in (*self.files, self.pages, self.late)]

    def tensors(self, only: Path | None = None) -> Iterator[Placed]:
        """Yield the tensors of the rank, or of one file, and where they are, as the files' headers say."""
        for path in self.files if only is None else [only]:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            for name, entry in header.items():
                tensor = Tensor(name, entry["dtype"], tuple(entry["shape"]))
                yield Placed(tensor, path, 8 + size + entry["data_offsets"][0])

    @property
    def rank_bytes(self) -> int:
        """Bytes of the rank's files."""
        return sum(path.stat().st_size for path in self.files)

    def generate(self) -> None:
        """Write the files that are not there yet."""
        self.rank.mkdir(parents=True, exist_ok=True)
        for path, tensors in zip(self.files, rank_parts(self.scale), strict=True):
            _write(path, tensors)
        for count in self.scale.headers:
            _write(self.header(count), _experts(count))
        _write(self.small, (Tensor(f"scale.{number}", "F32", (1,)) for number in range(self.scale.small_tensors)))

    def generate_whole(self) -> None:
        """Write what only the cases of slices load."""
        self.whole.mkdir(parents=True, exist_ok=True)
        parts = whole_parts(self.scale)
        for path, tensors in zip(self.whole_files, parts, strict=True):
            _write(path, tensors)
        files = zip(self.whole_files, parts, strict=True)
        weight_map = {tensor.name: path.name for path, tensors in files for tensor in tensors}
        index = {"metadata": {"total_size": sum(tensor.nbytes for part in parts for tensor in part)}}
        (self.whole / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": weight_map}))

    def generate_objects(self) -> None:
        """Write what only the cases of S3 load."""
        _write(self.pages, (Tensor(f"page.{number}", "BF16", (2048,)) for number in range(self.scale.pages)))
        _write(self.late, (Tensor(f"late.{number}", "BF16", (512, 1024)) for number in range(self.scale.late)))


def _write(path: Path, tensors: Iterable[Tensor]) -> None:
    """Write a file of random bytes; under its name it is complete and on the disk."""
    if path.exists():
        return
    entries = {}
    stop = 0
    for tensor in tensors:
        start, stop = stop, stop + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    random = np.random.default_rng(len(header))
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for start in range(0, stop, _BLOCK):
            file.write(random.bytes(min(_BLOCK, stop - start)))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
