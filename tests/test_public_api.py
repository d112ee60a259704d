"""What ``import asyncshard`` gives: names, signatures, docstrings, errors, and no side effects."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import pickle
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from safetensors.numpy import save, save_file

import asyncshard
from asyncshard import errors

ERRORS = [item for item in vars(errors).values() if inspect.isclass(item) and issubclass(item, errors.AsyncShardError)]
PUBLIC = [name for name in asyncshard.__all__ if not name.startswith("_")]


def test_all_names_what_there_is_and_nothing_else() -> None:
    rooms = {path.stem for path in Path(asyncshard.__file__).parent.iterdir()} - {"errors"}
    public = {name for name in vars(asyncshard) if not name.startswith("_")} - rooms
    assert public | {"__version__"} == set(asyncshard.__all__)
    assert len(asyncshard.__all__) == len(set(asyncshard.__all__))
    assert len(asyncshard.__all__) <= 32


def test_the_names_of_the_public_api_are_there() -> None:
    assert set(asyncshard.__all__) >= {
        "AsyncShardError",
        "AsyncShardLoader",
        "CheckpointVersion",
        "Header",
        "MemoryBudget",
        "PackedShard",
        "Replicate",
        "Shard",
        "ShardPattern",
        "ShardedStateLoader",
        "ShardedTensor",
        "Sink",
        "SubtensorFilter",
        "TensorInfo",
        "Update",
        "__version__",
        "check_checkpoint",
        "compute_shard_assignment",
        "errors",
        "load",
        "parse_header",
        "read_header",
        "reshard",
        "save_sharded_state",
        "stream",
        "validate_shard_shapes",
        "verify_cache",
    }


def public_members() -> list[Any]:
    found = []
    for name in [*PUBLIC, *(f"errors.{error.__name__}" for error in ERRORS)]:
        thing: Any = asyncshard
        for part in name.split("."):
            thing = getattr(thing, part)
        found.append(pytest.param(thing, id=name))
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                is_code = inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)
                if is_code and not member.startswith("_"):
                    found.append(pytest.param(value, id=f"{name}.{member}"))
    return found


PLACES = [importlib.import_module(f"asyncshard{place}") for place in ("", ".errors", ".events", ".stores", ".types")]
"""The modules from which users import."""


def named_types(annotation: Any) -> Iterator[type]:
    """Yield the classes that an annotation is made of."""
    if isinstance(annotation, list | tuple):  # the parameters of a Callable
        for part in annotation:
            yield from named_types(part)
    elif typing.get_args(annotation):
        yield from named_types(typing.get_origin(annotation))
        yield from named_types(typing.get_args(annotation))
    elif isinstance(annotation, TypeVar):
        yield from named_types(annotation.__bound__)
    elif inspect.isclass(annotation):
        yield annotation


def annotations_of(thing: Any) -> dict[str, Any]:
    if isinstance(thing, property):
        thing = thing.fget
    # What is imported for type checkers alone has to be given.
    return typing.get_type_hints(getattr(thing, "__func__", thing), localns={"Buffer": memoryview})


@pytest.mark.parametrize("thing", public_members())
def test_each_type_that_a_public_signature_names_can_be_imported_from_a_public_place(thing: Any) -> None:
    named = {kind for annotation in annotations_of(thing).values() for kind in named_types(annotation)}
    own = {kind for kind in named if kind.__module__.startswith("asyncshard.") and not kind.__name__.startswith("_")}
    public = {value for place in PLACES for value in vars(place).values() if inspect.isclass(value)}
    assert own <= public


@pytest.mark.parametrize("thing", public_members())
def test_everything_public_has_a_docstring_of_its_own(thing: Any) -> None:
    doc = thing.__doc__
    assert doc
    assert doc.strip()
    if inspect.isclass(thing):
        assert not doc.startswith(f"{thing.__name__}("), "a docstring that dataclass or NamedTuple made up"


def shape_of(function: Any) -> list[tuple[str, str, Any]]:
    """Return name, kind and default of each parameter but self; an empty default stands for none."""
    parameters = inspect.signature(function).parameters.values()
    return [
        (item.name, item.kind.name, "required" if item.default is item.empty else item.default)
        for item in parameters
        if item.name != "self"
    ]


BOTH, ONLY, ANY = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY", "VAR_KEYWORD"
SIGNATURES: dict[str, tuple[Any, list[tuple[str, str, Any]]]] = {
    "ShardPattern": (
        asyncshard.ShardPattern,
        [("template", BOTH, "model-rank-{rank}-part-{part}.safetensors")],
    ),
    "format_for_rank": (
        asyncshard.ShardPattern.format_for_rank,
        [("rank", BOTH, "required"), ("part", BOTH, "*")],
    ),
    "parse_filename": (asyncshard.ShardPattern.parse_filename, [("name", BOTH, "required")]),
    "ShardedTensor": (
        asyncshard.ShardedTensor,
        [
            ("name", BOTH, "required"),
            ("shape", BOTH, "required"),
            ("dtype", BOTH, "required"),
            ("shard_dim", BOTH, 0),
            ("num_shards", BOTH, 1),
            ("local_shard_index", BOTH, 0),
        ],
    ),
    "filter_subtensors": (asyncshard.SubtensorFilter.filter_subtensors, [("tensors", BOTH, "required")]),
    "compute_shard_assignment": (
        asyncshard.compute_shard_assignment,
        [("num_params", BOTH, "required"), ("num_ranks", BOTH, "required"), ("param_sizes", BOTH, "required")],
    ),
    "validate_shard_shapes": (
        asyncshard.validate_shard_shapes,
        [("shard_specs", BOTH, "required"), ("rank", BOTH, "required"), ("world_size", BOTH, "required")],
    ),
    "ShardedStateLoader": (
        asyncshard.ShardedStateLoader,
        [("pattern", BOTH, None), ("rank", BOTH, 0), ("world_size", BOTH, 1), ("pp_rank", ONLY, 0)],
    ),
    "discover_shards": (asyncshard.ShardedStateLoader.discover_shards, [("path", BOTH, "required")]),
    "load_weights": (
        asyncshard.ShardedStateLoader.load_weights,
        [("path", BOTH, "required"), ("state_dict", BOTH, None), ("strict", BOTH, True), ("cast", BOTH, False)],
    ),
    "iterate_weights": (asyncshard.ShardedStateLoader.iterate_weights, [("path", BOTH, "required")]),
    "AsyncShardLoader": (
        asyncshard.AsyncShardLoader,
        [("base_loader", BOTH, None), ("prefetch_count", BOTH, None), ("max_workers", BOTH, None)],
    ),
    "AsyncShardLoader.stream": (
        asyncshard.AsyncShardLoader.stream,
        [("path", BOTH, "required"), ("into", BOTH, None), ("strict", ONLY, True), ("cast", ONLY, False)],
    ),
    "load_weights_async": (asyncshard.AsyncShardLoader.load_weights_async, [("path", BOTH, "required")]),
    "save_sharded_state": (
        asyncshard.save_sharded_state,
        [
            ("state_dict", BOTH, "required"),
            ("directory", BOTH, "required"),
            ("rank", ONLY, "required"),
            ("pattern", ONLY, None),
            ("max_shard_size", ONLY, None),
        ],
    ),
    "prepare_refresh": (
        asyncshard.ShardedStateLoader.prepare_refresh,
        [
            ("path", BOTH, "required"),
            ("state_dict", BOTH, "required"),
            ("since", BOTH, None),
            ("stage", ONLY, True),
            ("strict", ONLY, True),
            ("cast", ONLY, False),
        ],
    ),
    "Update.apply": (asyncshard.Update.apply, []),
    "CheckpointVersion.parse": (asyncshard.CheckpointVersion.parse, [("text", BOTH, "required")]),
    "check_checkpoint": (asyncshard.check_checkpoint, [("path", BOTH, "required")]),
    "reshard": (asyncshard.reshard, [("source", BOTH, "required"), ("target", BOTH, "required")]),
    "read_header": (asyncshard.read_header, [("path", BOTH, "required")]),
    "parse_header": (asyncshard.parse_header, [("data", BOTH, "required"), ("file_size", BOTH, None)]),
    "verify_cache": (asyncshard.verify_cache, [("cache_dir", BOTH, "required")]),
    "load": (asyncshard.load, [("path", BOTH, "required"), ("options", ANY, "required")]),
    "Stream.drain": (asyncshard.Stream.drain, []),
    "Stream.statistics": (asyncshard.Stream.statistics, []),
    "Sink.write": (asyncshard.Sink.write, [("offset", BOTH, "required"), ("buffer", BOTH, "required")]),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_kept(name: str) -> None:
    function, promised = SIGNATURES[name]
    shape = shape_of(function)
    assert shape[: len(promised)] == promised
    added = shape[len(promised) :]
    assert all(kind in (ONLY, ANY) or default != "required" for _, kind, default in added), "what was added is optional"


@pytest.mark.parametrize(
    "function",
    [
        asyncshard.check_checkpoint,
        asyncshard.load,
        asyncshard.read_header,
        asyncshard.verify_cache,
        asyncshard.reshard,
        asyncshard.save_sharded_state,
        asyncshard.ShardedStateLoader.load_weights,
        asyncshard.ShardedStateLoader.discover_shards,
        asyncshard.AsyncShardLoader.load_weights_async,
        asyncshard.ShardedStateLoader.prepare_refresh,
        asyncshard.Update.apply,
        asyncshard.Update.aclose,
        asyncshard.Stream.drain,
        asyncshard.Stream.aclose,
    ],
)
def test_what_is_awaited_is_a_coroutine_function(function: Any) -> None:
    assert inspect.iscoroutinefunction(function)


def test_statistics_have_the_promised_fields() -> None:
    assert set(inspect.get_annotations(asyncshard.Statistics)) >= {
        "bytes_total",
        "bytes_done",
        "tensors_total",
        "tensors_done",
        "bytes_in_flight",
        "bytes_held",
        "budget_wait_s",
        "retries",
        "elapsed_s",
        "eta_s",
        "missing",
        "unexpected",
    }


def test_values_are_immutable() -> None:
    tensor = asyncshard.ShardedTensor("w", (4, 2), "F32")
    with pytest.raises(AttributeError):
        tensor.name = "v"  # type: ignore[misc]
    info = asyncshard.TensorInfo("w", "F32", (1,), 8, 12)
    with pytest.raises(AttributeError):
        info.start = 0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        asyncshard.ShardPattern().template = "x"  # type: ignore[misc]


IMPORT = """
import gc, json, logging, os, signal, sys, threading, warnings, asyncio, locale
import numpy, anyio
def state():
    root = logging.getLogger()
    return {
        "environ": dict(os.environ),
        "cwd": os.getcwd(),
        "logging": [len(root.handlers), root.level],
        "warnings": len(warnings.filters),
        "threads": [thread.name for thread in threading.enumerate()],
        "gc": [gc.isenabled(), gc.get_threshold()],
        "policy": type(asyncio.get_event_loop_policy()).__name__,
        "hooks": [str(sys.excepthook), str(sys.unraisablehook)],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGBUS)],
        "switch": sys.getswitchinterval(),
        "fds": sorted(os.listdir("/proc/self/fd")),
        "path": sys.path[:],
        "recursion": sys.getrecursionlimit(),
        "numpy": str(numpy.geterr()),
        "stack": threading.stack_size(),
        "locale": locale.getlocale(),
        "umask": [os.umask(18), os.umask(18)][1],
    }
before = state()
import asyncshard
after = state()
own = logging.getLogger("asyncshard")
result = {
    "changed": sorted(key for key in before if before[key] != after[key]),
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "logger": [len(own.handlers), own.level, own.propagate],
}
sys.stderr.write(json.dumps(result))
"""


def test_importing_brings_no_framework_prints_nothing_and_changes_no_global_state() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])},
    )
    assert done.stdout == ""
    result = json.loads(done.stderr)
    assert result["changed"] == []
    assert result["logger"] == [0, 0, True]
    heavy = {
        "torch",
        "jax",
        "safetensors",
        "xxhash",
        "filelock",
        "aiobotocore",
        "botocore",
        "vllm",
        "starlette",
        "ray",
        "pytest",
        "tqdm",
    }
    assert not heavy & set(result["modules"])


# Errors


BUILT_INS = {
    errors.FormatError: ValueError,
    errors.UnsupportedTensorError: ValueError,
    errors.CheckpointError: ValueError,
    errors.NamesError: KeyError,
    errors.DestinationError: ValueError,
    errors.BudgetError: ValueError,
    errors.StreamClosedError: RuntimeError,
    errors.StoreError: OSError,
    errors.ObjectNotFoundError: FileNotFoundError,
    errors.TargetExistsError: FileExistsError,
    errors.AccessDeniedError: PermissionError,
    errors.NotRegularFileError: OSError,
    errors.ObjectChangedError: OSError,
    errors.TruncatedError: OSError,
    errors.StoreTimeoutError: TimeoutError,
    errors.ThrottledError: OSError,
    errors.ChecksumError: OSError,
}
OF_S3 = {errors.ThrottledError, errors.ChecksumError}
"""Caused in tests/stores/s3."""


@pytest.mark.parametrize("kind", ERRORS)
def test_each_error_has_the_base_and_the_built_in_that_a_user_would_catch(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.AsyncShardError)
    assert issubclass(kind, BUILT_INS.get(kind, Exception))
    assert kind is errors.AsyncShardError or kind in BUILT_INS


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ERRORS)
def test_each_error_pickles_with_its_attributes(kind: Any, protocol: int) -> None:
    samples: dict[str, Any] = {
        "path": "/a/b",
        "tensor": "w",
        "offset": 17,
        "missing": ("m",),
        "unexpected": ("u",),
        "needed_bytes": 5,
        "budget_bytes": 4,
        "start": 1,
        "stop": 2,
        "errno": 5,
    }
    accepted = inspect.signature(kind).parameters
    given = {name: value for name, value in samples.items() if name in accepted}
    error = kind("what was wrong, where, and what to do", **given)
    error.filled, error.torn = ("a",), ("b",)
    error.add_note("a note")
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is kind
    assert str(copy) == str(error) == "what was wrong, where, and what to do"
    assert copy.args == error.args
    assert copy.__notes__ == ["a note"]
    for name, value in {**given, "filled": ("a",), "torn": ("b",), "retryable": error.retryable}.items():
        assert getattr(copy, name) == getattr(error, name) == value, name


def test_only_what_a_retry_helps_is_retryable() -> None:
    assert {kind for kind in ERRORS if kind.retryable} == {
        errors.ObjectChangedError,
        errors.StoreTimeoutError,
        errors.ThrottledError,
    }


def rewrite_while_streaming(path: Path) -> Any:
    async def attempt() -> None:
        save_file({f"t{i}": np.zeros(1 << 18, np.uint8) for i in range(8)}, path)
        loader = asyncshard.AsyncShardLoader(prefetch_count=1, chunk_size=1 << 18, memory_budget_mb=1)
        async with loader.stream(path) as weights:
            async for _ in weights:
                os.utime(path, ns=(1, 1))

    return attempt()


def truncate_within_a_read(path: Path) -> Any:
    # A file of /proc has no size until it is read: it ends before what its status says.
    from asyncshard._core import StopFlag
    from asyncshard.stores.local.store import LocalStore

    async def attempt() -> None:
        path.write_bytes(bytes(10))
        with path.open("rb") as file:
            LocalStore._fill(file.fileno(), str(path), 0, [memoryview(bytearray(11))], StopFlag())

    return attempt()


def cause(kind: Any, path: Path) -> Any:
    """Return an awaitable that fails with an error of just this kind."""
    good = save({"w": np.arange(6, dtype=np.float32)})
    if kind is errors.FormatError:
        path.write_bytes(good[:20])
        return asyncshard.load(path)
    if kind is errors.UnsupportedTensorError:
        text = json.dumps({"w": {"dtype": "U8", "shape": [1] * 70, "data_offsets": [0, 1]}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"x")
        return asyncshard.load(path)
    if kind is errors.CheckpointError:
        path.mkdir()
        (path / "model-rank-0-part-1.safetensors").write_bytes(good)
        return asyncshard.load(path)
    if kind is errors.ObjectNotFoundError:
        return asyncshard.load(path)
    if kind is errors.TargetExistsError:
        path.mkdir()
        (path / "notes").write_bytes(b"")
        return asyncshard.reshard(path.parent, path, world_size=1)
    if kind is errors.NotRegularFileError:
        os.mkfifo(path)
        return asyncshard.load(path)
    if kind is errors.AccessDeniedError:
        path.mkdir()
        (path / "model.safetensors").symlink_to("/etc/passwd")
        return asyncshard.load(path)
    if kind is errors.ObjectChangedError:
        return rewrite_while_streaming(path)
    if kind is errors.TruncatedError:
        return truncate_within_a_read(path)
    if kind is errors.StoreError:
        path.symlink_to(path)
        return asyncshard.load(path)
    path.write_bytes(good)
    if kind is errors.NamesError:
        return asyncshard.ShardedStateLoader().load_weights(path, {})
    if kind is errors.DestinationError:
        return asyncshard.ShardedStateLoader().load_weights(path, {"w": np.zeros(5, np.float32)})
    if kind is errors.BudgetError:
        return asyncshard.stream(path, memory_budget_mb=1e-5).drain()
    if kind is errors.StreamClosedError:

        async def ask_a_closed_stream() -> None:
            stream = await asyncshard.stream(path)
            await stream.aclose()
            await anext(stream)

        return ask_a_closed_stream()
    if kind is errors.StoreTimeoutError:
        import errno

        from asyncshard.stores.local.files import translated

        async def ask_storage_that_gave_up() -> None:
            with translated(str(path)):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

        return ask_storage_that_gave_up()
    raise AssertionError(f"nothing causes {kind.__name__}")


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind not in {errors.AsyncShardError, *OF_S3}])
def test_each_error_is_really_raised_and_names_the_file(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(kind) as caught:
        asyncio.run(cause(kind, path))
    assert type(caught.value) is kind
    if kind is not errors.StreamClosedError:
        assert str(path) in str(caught.value)
        assert str(path) in str(caught.value.path)
    assert pickle.loads(pickle.dumps(caught.value)).__dict__ == caught.value.__dict__


def test_a_single_cause_is_raised_bare_never_as_a_group(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"model-rank-0-part-{rank}.safetensors").write_bytes(b"not one")
    with pytest.raises(errors.FormatError) as caught:
        asyncio.run(asyncshard.load(tmp_path))
    assert not isinstance(caught.value, BaseExceptionGroup)
    assert "part-0" in str(caught.value)


def test_the_errors_module_holds_nothing_but_errors() -> None:
    public = {name for name, item in vars(errors).items() if not name.startswith("_")}
    assert {name for name in public if isinstance(getattr(errors, name), type)} >= {kind.__name__ for kind in ERRORS}
    assert isinstance(errors, types.ModuleType)
