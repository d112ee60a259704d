"""The house, read from its imports: an import points down, from wing to wing too, and never up."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import asyncshard

PACKAGE = Path(asyncshard.__file__).parent
FLOORS: tuple[set[str], ...] = (
    {"errors", "events", "extras", "_core", "_typing", "_version"},
    {"tasks", "format"},
    {"plan.text", "plan.ranges"},
    {"plan.division", "plan.items", "plan.tensor_filter", "plan.ties"},
    {"plan.tp", "plan.files", "plan.assignment"},
    {"plan.file_slices", "plan.check"},
    {"stores.ranges", "stores.scatter"},
    {"stores.base"},
    {"stores.wrapper", "stores.local", "stores.http"},
    {"stores.s3", "stores.disk_cache"},
    {"stores"},
    {"stores.opening"},
    {"arrays"},
    {"pipeline.memory"},
    {"pipeline.checkpoint"},
    {"pipeline.transfer", "pipeline.writing"},
    {"pipeline.writing.reshard", "pipeline.shard_cache", "pipeline.refresh"},
    {"loaders"},
    {"types", "integrations", "cli", "testing"},
)
"""The places of the house from the ground up; one that names a folder stands for all in it that is not named itself."""
FLOOR_OF = {place: floor for floor, places in enumerate(FLOORS) for place in places}
MOST_FILES = 12
"""In one wing."""
MOST_LINES = 300
REASON = "Longer than 300 lines"
"""How the docstring of a longer file says why it is one."""
FRAMEWORKS = {"torch", "jax", "vllm", "starlette", "ray", "tensorflow", "transformers", "uvicorn"}
LOADERS_OF_FRAMEWORKS = {"arrays.frameworks"}
"""What may load a module of the package by its name: whatever has a framework behind it."""
TESTS = Path(__file__).parent
TESTED_ROOMS = {
    *("arrays", "errors", "extras", "format", "loaders", "plan", "tasks", "testing"),
    *("pipeline.memory", "pipeline.refresh", "pipeline.shard_cache", "pipeline.transfer"),
    *("pipeline.checkpoint.opening", "stores.opening"),
}
"""The rooms, wings and modules of which every module has a test file of its name, in the same folder below ``tests``.

A module may share the test file of another module in its folder. That file's docstring then has the sentence
"Also tests `name`.", with the name of the module.
"""
MODULES = sorted(PACKAGE.rglob("*.py"))
WITH_FRAMEWORK = [path for path in MODULES if path.stem in FRAMEWORKS]
PURE = [path for path in MODULES if path.relative_to(PACKAGE).parts[0] in ("format", "plan")]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@functools.cache
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


def own_modules_imported(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, without the package's name."""
    names = {name.removeprefix("asyncshard.") for name in imports_of(path) if name.startswith("asyncshard.")}
    return {name for name in names if is_module(name)}


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir() or path.with_suffix(".pyx").exists()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def place_of(module: str) -> str:
    """Return the place of the house that a module stands in: the longest name that has a floor."""
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        if ".".join(parts[:count]) in FLOOR_OF:
            return ".".join(parts[:count])
    raise AssertionError(f"{module} stands in no place of the house")


def roots_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.stat().st_size and path != PACKAGE / "__init__.py"], ids=name_of
)
def test_an_import_points_down_the_house_never_up(path: Path) -> None:
    place = place_of(module_of(path))
    others = {place_of(module) for module in own_modules_imported(path)} - {place}
    above = {other for other in others if FLOOR_OF[other] >= FLOOR_OF[place]}
    assert not above, f"{name_of(path)} (floor {FLOOR_OF[place]}) imports {above}"


def test_the_rule_sees_an_import_that_points_up(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("def f():\n    from asyncshard.loaders import loader\n    import asyncshard.stores.local\n")
    assert {place_of(name) for name in own_modules_imported(module)} == {"loaders", "stores.local"}


def test_no_circle_of_files() -> None:
    files = {module_of(path): own_modules_imported(path) for path in MODULES if path.parent != PACKAGE}
    packages = {module_of(path) for path in MODULES if path.stem == "__init__"}
    graph = {module: (others & files.keys()) - packages - {module} for module, others in files.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"files that import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "path", [path for path in MODULES if module_of(path) not in LOADERS_OF_FRAMEWORKS], ids=name_of
)
def test_no_room_of_the_house_is_loaded_by_a_string(path: Path) -> None:
    called = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    assert not called & {"import_module", "__import__"}


def test_a_wing_has_few_files() -> None:
    counts = Counter(path.parent for path in MODULES if path.stem != "__init__" and path.parent != PACKAGE)
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_long_file_says_why_it_is_one(path: Path) -> None:
    is_short = len(path.read_text().splitlines()) <= MOST_LINES
    assert is_short or REASON in (ast.get_docstring(tree_of(path)) or "")


def is_in_tested_room(path: Path) -> bool:
    names = itertools.accumulate(module_of(path).split("."), lambda room, name: f"{room}.{name}")
    return not TESTED_ROOMS.isdisjoint(names)


def modules_also_tested(folder: Path) -> set[str]:
    """Return the modules that the docstrings of a folder's test files name as tested there."""
    docstrings = [ast.get_docstring(tree_of(path)) or "" for path in folder.glob("test_*.py")]
    return {name for text in docstrings for name in re.findall(r"Also tests `(\w+)`\.", text)}


@pytest.mark.parametrize(
    "path", [path for path in MODULES if is_in_tested_room(path) and path.stem != "__init__"], ids=name_of
)
def test_a_module_has_a_test_file_of_its_name_or_is_named_in_one(path: Path) -> None:
    folder = TESTS / path.relative_to(PACKAGE).parent
    assert (folder / f"test_{path.stem}.py").exists() or path.stem in modules_also_tested(folder)


def test_the_package_itself_only_imports_and_names() -> None:
    kinds = {type(node) for node in tree_of(PACKAGE / "__init__.py").body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Import, ast.Assign}


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_format_and_plan_are_pure(path: Path) -> None:
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not [node for node in ast.walk(tree_of(path)) if isinstance(node, asynchronous)]
    assert not roots_imported(path) & {"anyio", "asyncio", "aiofiles", "os", "pathlib", "io", "threading", "socket"}


@pytest.mark.parametrize("path", [path for path in MODULES if path not in WITH_FRAMEWORK], ids=name_of)
def test_a_framework_is_imported_by_its_own_module_alone(path: Path) -> None:
    assert not roots_imported(path) & FRAMEWORKS


@pytest.mark.parametrize("path", WITH_FRAMEWORK, ids=name_of)
def test_the_module_of_a_framework_imports_it_at_its_top(path: Path) -> None:
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
