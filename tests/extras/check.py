"""Try every promise in the environment that runs this; ``python check.py EXTRA...`` names the extras that it has.

What they promise must be kept. Everything else must raise ImportError with the ``pip install`` that would help.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from promises import PROMISES, bare

import asyncshard


def main() -> int:
    installed = sys.argv[1:]
    assert Path(asyncshard.__file__).is_relative_to(Path(sys.prefix).parent), "this is not the installed wheel"
    asyncio.run(bare())
    for extra, promise in PROMISES.items():
        if extra in installed:
            asyncio.run(promise())
            continue
        sentence = sentence_of(promise)
        assert sentence.endswith(f"pip install 'asyncshard[{extra}]'"), f"{extra} is not installed: {sentence}"
    return 0


def sentence_of(promise: Callable[[], Coroutine[Any, Any, None]]) -> str:
    """Return what is said where a promise cannot be kept."""
    try:
        asyncio.run(promise())
    except ImportError as error:
        return str(error)
    return "nothing says so"


sys.exit(main())
