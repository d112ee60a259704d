"""The documents are true of the code, as far as a machine can tell: links lead to files, and names exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import asyncshard

PACKAGE = Path(asyncshard.__file__).parent
ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
FOLDERS = (PACKAGE, ROOT)
"""What a path in a document may be below."""
WINGS = sorted({path.parent for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"} - {PACKAGE})
KERNELS = sorted(PACKAGE.glob("_kernels/*.pxi"))
SOURCES = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links_in(text: str) -> list[str]:
    """Return the targets of links that lead to a file of the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]


def paths_in(text: str) -> list[str]:
    """Return what stands between backticks and is the path of a module, a document or a folder."""
    return re.findall(r"`([\w./-]+\.(?:py|pyx|pyi|pxi|md)|[\w./-]+/)`", text)


def names_in(text: str) -> list[str]:
    """Return the dotted names of the package that stand between backticks."""
    return re.findall(r"`(asyncshard(?:\.\w+)+)(?:\(.*?\))?`", text)


def symbols_in(text: str) -> list[tuple[str, str]]:
    """Return the pairs of "`Symbol` in `path`"."""
    return re.findall(r"`(\w+)`\s+in\s+`([\w./]+\.(?:py|pxi))`", text)


def has_path(path: str) -> bool:
    return any((folder / path).exists() for folder in FOLDERS)


def has_name(name: str) -> bool:
    """Return whether a dotted name is a module, something in one, or a key that the package writes or reads."""
    if f'"{name}"' in SOURCES:
        return True
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def defines(path: str, symbol: str) -> bool:
    definition = rf"^(?:(?:cdef )?class |def |async def ){symbol}\b|^ *{symbol}: |^{symbol} = "
    return re.search(definition, (PACKAGE / path).read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_link_leads_to_a_file(page: Path) -> None:
    assert not [link for link in links_in(without_blocks(page)) if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_a_path_in_a_document_exists(page: Path) -> None:
    assert not [path for path in paths_in(without_blocks(page)) if not has_path(path)]


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_a_name_in_a_document_exists(page: Path) -> None:
    assert not [name for name in names_in(without_blocks(page)) if not has_name(name)]


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_a_symbol_is_where_a_document_says(page: Path) -> None:
    assert not [(symbol, path) for symbol, path in symbols_in(without_blocks(page)) if not defines(path, symbol)]


def test_documents_are_checked_for_what_they_hold() -> None:
    text = "[a](design.md#b), [c](https://d), `plan/items.py`, `plan/`, `asyncshard.load(x)`, `Slice` in\n`plan/a.py`"
    assert (links_in(text), names_in(text)) == (["design.md"], ["asyncshard.load"])
    assert paths_in(text) == ["plan/items.py", "plan/", "plan/a.py"]
    assert symbols_in(text) == [("Slice", "plan/a.py")]
    assert (has_path("plan/items.py"), has_path("plan/absent.py")) == (True, False)
    assert (has_name("asyncshard.stores.base.Store.list"), has_name("asyncshard.stores.absent")) == (True, False)
    assert (defines("plan/items.py", "ReadItem"), defines("plan/items.py", "Read")) == (True, False)


@pytest.mark.parametrize("folder", WINGS, ids=name_of)
def test_the_design_names_each_room_and_wing(folder: Path) -> None:
    assert f"`{folder.relative_to(PACKAGE)}/`" in (ROOT / "docs" / "design.md").read_text()


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_the_design_names_each_kernel(path: Path) -> None:
    assert f"`{path.relative_to(PACKAGE)}`" in (ROOT / "docs" / "design.md").read_text()
