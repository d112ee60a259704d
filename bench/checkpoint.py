"""The files that the benchmark loads.

They are one rank of a Llama of 1B parameters, files whose headers have very many tensors, files of very many small
tensors, and further files that are loaded from S3. They are written once for each scale, byte by byte from the format's
definition, with neither the library under test nor a peer.
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
"""Random bytes are made and written 64 MiB at a time."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a generated file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and the position of its bytes."""

    tensor: Tensor
    path: Path
    """The file that holds the tensor."""
    start: int
    """Offset in the file of the tensor's first byte."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes of all files and models of the benchmark."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    headers: tuple[int, int]
    """The number of tensors of the smaller header, and of the larger one."""
    small_tensors: int
    """The number of tensors of 4 bytes in one file."""
    views: int
    """The number of views of one storage that `filter_subtensors` gets."""
    parameters: int
    """The number of parameters that `compute_shard_assignment` gets."""
    ranks: int
    """The number of ranks that `compute_shard_assignment` gets."""
    pages: int
    """The number of tensors of 4 KiB in one object."""
    late: int
    """The number of tensors of 1 MiB that a slow server sends."""
    cancels: int
    """The number of loads that are cancelled."""
    whole_layers: int
    """The number of layers of the checkpoint that was not cut for ranks."""


FULL = Scale(
    "full", 16, 2048, 8192, 128256, (100_000, 1_000_000), 100_000, 100_000, 1_000_000, 1_024, 100_000, 256, 1_000, 24
)
QUICK = Scale("quick", 4, 256, 1024, 4096, (1_000, 10_000), 1_000, 1_000, 10_000, 64, 1_000, 16, 20, 4)
SCALES = {scale.name: scale for scale in (FULL, QUICK)}
RANK, WORLD_SIZE = 0, 2


def rank_parts(scale: Scale) -> list[list[Tensor]]:
    """Return the tensors of rank 0 of 2 of a Llama, with the names and fused parameters of vLLM, in three parts.

    The parts have about the same size. The embedding is the largest tensor. The second part has layers only.
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
    """Return the tensors of a Llama that was not cut for ranks, with Hugging Face names, in two parts."""
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
    """Yield tensors of 8 bytes with the names of a mixture of experts: they make a large header and a small file."""
    for number in range(count):
        layer, expert = divmod(number // 3, 512)
        yield Tensor(f"layers.{layer}.experts.{expert}.w{number % 3 + 1}", "BF16", (2, 2))


@dataclass(frozen=True, slots=True)
class Dataset:
    """The generated files of one scale, in a folder."""

    folder: Path
    scale: Scale

    @property
    def rank(self) -> Path:
        """The directory of the rank shards."""
        return self.folder / "rank"

    @property
    def files(self) -> list[Path]:
        return [self.rank / f"model-rank-{RANK}-part-{part}.safetensors" for part in range(3)]

    @property
    def layers_only(self) -> Path:
        """The rank shard without the large tensors."""
        return self.files[1]

    def header(self, count: int) -> Path:
        return self.folder / f"header-{count}.safetensors"

    @property
    def small(self) -> Path:
        """The file of very many tensors of 4 bytes."""
        return self.folder / "small.safetensors"

    @property
    def pages(self) -> Path:
        """The file of many tensors of 4 KiB: a load that makes one request for each tensor is slow."""
        return self.folder / "pages.safetensors"

    @property
    def late(self) -> Path:
        """The file of tensors of 1 MiB, which a slow server sends."""
        return self.folder / "late.safetensors"

    @property
    def whole(self) -> Path:
        """The directory of the checkpoint that was not cut for ranks."""
        return self.folder / "whole"

    @property
    def whole_files(self) -> list[Path]:
        return [self.whole / f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]

    def objects(self) -> list[tuple[str, Path]]:
        """Return the key and the path of each file that is loaded from S3. The key is the path below the folder."""
        return [(path.relative_to(self.folder).as_posix(), path) for path in (*self.files, self.pages, self.late)]

    def tensors(self, only: Path | None = None) -> Iterator[Placed]:
        """Yield the tensors of the rank, or of the file `only`, as the headers of the files describe them."""
        for path in self.files if only is None else [only]:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            for name, entry in header.items():
                tensor = Tensor(name, entry["dtype"], tuple(entry["shape"]))
                yield Placed(tensor, path, 8 + size + entry["data_offsets"][0])

    @property
    def rank_bytes(self) -> int:
        """The number of bytes of the rank's files."""
        return sum(path.stat().st_size for path in self.files)

    def generate(self) -> None:
        """Write the files of the rank, and the files of headers and small tensors, unless they exist."""
        self.rank.mkdir(parents=True, exist_ok=True)
        for path, tensors in zip(self.files, rank_parts(self.scale), strict=True):
            _write(path, tensors)
        for count in self.scale.headers:
            _write(self.header(count), _experts(count))
        _write(self.small, (Tensor(f"scale.{number}", "F32", (1,)) for number in range(self.scale.small_tensors)))

    def generate_whole(self) -> None:
        """Write the checkpoint that was not cut for ranks, which only the cases of slices load, unless it exists."""
        self.whole.mkdir(parents=True, exist_ok=True)
        parts = whole_parts(self.scale)
        for path, tensors in zip(self.whole_files, parts, strict=True):
            _write(path, tensors)
        files = zip(self.whole_files, parts, strict=True)
        weight_map = {tensor.name: path.name for path, tensors in files for tensor in tensors}
        index = {"metadata": {"total_size": sum(tensor.nbytes for part in parts for tensor in part)}}
        (self.whole / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": weight_map}))

    def generate_objects(self) -> None:
        """Write the files that only the cases of S3 load, unless they exist."""
        _write(self.pages, (Tensor(f"page.{number}", "BF16", (2048,)) for number in range(self.scale.pages)))
        _write(self.late, (Tensor(f"late.{number}", "BF16", (512, 1024)) for number in range(self.scale.late)))


def _write(path: Path, tensors: Iterable[Tensor]) -> None:
    """Write a file of random bytes, unless it exists. It gets its name when it is complete and on the disk."""
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
