"""`asyncshard.types` has the types for annotations that stand nowhere else.

That it has every type that a public signature names is tested in ``test_public_api.py``.
"""

from __future__ import annotations

import ast
import inspect

import asyncshard
from asyncshard import types


def test_it_exports_just_what_it_imports() -> None:
    tree = ast.parse(inspect.getsource(types))
    imported = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(imported) == sorted(types.__all__)
    assert len(set(types.__all__)) == len(types.__all__)


def test_no_type_is_exported_at_two_places() -> None:
    assert not set(types.__all__) & set(asyncshard.__all__)


def test_a_name_stands_for_what_the_library_itself_calls_so() -> None:
    for name in types.__all__:
        value = getattr(types, name)
        if inspect.isclass(value):
            assert value.__name__ == name
            assert value.__module__.startswith("asyncshard.")
