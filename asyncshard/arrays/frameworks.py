"""The array library of each ``framework=``, loaded when it is first asked for: nothing else imports a framework."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any, cast

from asyncshard.arrays.base import ArrayLibrary
from asyncshard.extras import require

FRAMEWORKS = {"np": "asyncshard.arrays.numpy", "pt": "asyncshard.arrays.torch"}
"""The module of each library; each has its `ArrayLibrary` under the name ``library``."""
_PACKAGES = {"pt": "torch"}


def load_library(framework: str, destinations: Mapping[str, Any] | None = None) -> ArrayLibrary:
    """Return the array library of a framework; torch's where a destination is a torch tensor, whatever `framework` is.

    The framework is imported here: call it off the event loop the first time.

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
