"""The array library of each value of ``framework=``, imported when it is first used: nothing else imports one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any, cast

from asyncshard.arrays.base import ArrayLibrary
from asyncshard.extras import require

FRAMEWORKS = {"np": "asyncshard.arrays.numpy", "pt": "asyncshard.arrays.torch"}
"""The module of each framework's array library. Each module has an `ArrayLibrary` under the name ``library``."""
_PACKAGES = {"pt": "torch"}
"""The optional package that a framework needs."""


def load_library(framework: str, destinations: Mapping[str, Any] | None = None) -> ArrayLibrary:
    """Return the array library of a framework, or torch's if one of the `destinations` is a torch tensor.

    The first call for a framework imports it: make that call off the event loop.

    Raises
    ------
    ImportError
        The framework is not installed.
    """
    torch = sys.modules.get("torch")
    if destinations and torch and any(isinstance(target, torch.Tensor) for target in destinations.values()):
        framework = "pt"
    if framework in _PACKAGES:
        require(f"framework={framework!r}", _PACKAGES[framework])
    return cast(ArrayLibrary, importlib.import_module(FRAMEWORKS[framework]).library)
