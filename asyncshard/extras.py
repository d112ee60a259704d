"""Optional packages: which extra brings each, and the error that says so where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

PACKAGES = {
    "s3": ("aiobotocore", "h11"),
    "checksums": ("aiobotocore", "h11", "awscrt"),
    "cache": ("filelock", "xxhash"),
    "torch": ("torch",),
}
"""The packages that the library imports of each extra, by the extra's name; a smaller extra stands before a larger."""


def require(purpose: str, *packages: str) -> None:
    """Raise ImportError unless these optional packages are installed; none of them is imported.

    Parameters
    ----------
    purpose : str
        What needs the packages, in the user's words: the error's message begins with it.
    *packages : str
        Top-level names, all of which one extra brings.

    Raises
    ------
    ImportError
        Some are not installed. The message names them and the ``pip install`` that brings them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        extra = next(extra for extra, brought in PACKAGES.items() if set(missing) <= set(brought))
        names = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        raise ImportError(f"{purpose}: {names}: pip install 'asyncshard[{extra}]'", name=missing[0])
