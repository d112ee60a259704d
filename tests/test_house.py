"""The rooms of the house, read from the imports: an import points down, never up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncshard

PACKAGE = Path(asyncshard.__file__).parent
FLOORS = {
    "integrations": 6,
    "cli": 6,
    "testing": 6,
    "loaders": 5,
    "pipeline": 4,
    "stores": 3,
    "plan": 2,
    "format": 1,
    "_core": 0,
    "errors": 0,
    "extras": 0,
    "_version": 0,
}
FRAMEWORKS = {"torch", "jax", "vllm", "starlette", "ray", "tensorflow", "transformers", "uvicorn"}
MODULES = sorted(PACKAGE.rglob("*.py"))
PURE = [path for path in MODULES if path.relative_to(PACKAGE).parts[0] in ("format", "plan")]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, wherever in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    parts = (name.split(".") for name in imports_of(path))
    return {part[1] for part in parts if part[0] == "asyncshard" and len(part) > 1}


def roots_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_an_import_points_down_the_rooms_never_up(path: Path) -> None:
    room = room_of(path)
    assert room in FLOORS, f"{name_of(path)} stands in no room of the house"
    above = {other for other in rooms_imported(path) if other != room and FLOORS[other] >= FLOORS[room]}
    assert not above, f"{name_of(path)} (floor {FLOORS[room]}) imports {above}"


def test_the_rule_sees_an_import_that_points_up(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("def f():\n    from asyncshard.loaders import loader\n    import asyncshard.stores.local.store\n")
    assert rooms_imported(module) == {"loaders", "stores"}


def test_the_package_itself_only_imports_and_names() -> None:
    kinds = {type(node) for node in tree_of(PACKAGE / "__init__.py").body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Import, ast.Assign}


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_format_and_plan_are_pure(path: Path) -> None:
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not [node for node in ast.walk(tree_of(path)) if isinstance(node, asynchronous)]
    assert not roots_imported(path) & {"anyio", "asyncio", "aiofiles", "os", "pathlib", "io", "threading", "socket"}


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) != "integrations"], ids=name_of)
def test_only_integrations_import_a_framework(path: Path) -> None:
    assert not roots_imported(path) & FRAMEWORKS


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room_of(path) == "integrations" and path.stem != "__init__"], ids=name_of
)
def test_an_integration_imports_its_framework_at_its_top(path: Path) -> None:
    top = {
        name.split(".")[0]
        for node in tree_of(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert path.stem in top
    assert roots_imported(path) & FRAMEWORKS == top & FRAMEWORKS


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) != "cli"], ids=name_of)
def test_the_library_neither_prints_nor_reads_the_environment_nor_configures_logging(path: Path) -> None:
    attributes = {node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
    assert not attributes & {"environ", "environb", "getenv", "putenv", "basicConfig", "addHandler", "setLevel"}
    called = {
        node.func.id
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"print", "input", "exec", "eval"}
    assert not {name for name in imports_of(path) if name in ("os.environ", "os.getenv", "mmap")}


def test_botocore_is_imported_in_one_module_at_most() -> None:
    users = [name_of(path) for path in MODULES if roots_imported(path) & {"botocore", "aiobotocore", "boto3"}]
    assert len(users) <= 1, users


def test_loggers_are_named_after_the_package_alone() -> None:
    names = {
        node.args[0].value
        for path in MODULES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "getLogger"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert names == {"asyncshard"}
