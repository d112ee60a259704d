"""Build the one compiled extension; everything else is in pyproject.toml.

``ASYNCSHARD_SANITIZE=1`` builds it with gcc's address and undefined-behaviour sanitisers (``make sanitize``).
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

SANITIZE = os.environ.get("ASYNCSHARD_SANITIZE") == "1"
FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3"]

core = Extension(
    "asyncshard._core",
    ["asyncshard/_core.pyx"],
    depends=[f"asyncshard/_kernels/{name}" for name in sorted(os.listdir("asyncshard/_kernels"))],
    extra_compile_args=FLAGS,
    extra_link_args=["-fsanitize=address,undefined"] if SANITIZE else [],
)

setup(
    ext_modules=cythonize(
        core,
        build_dir="build/sanitize/cython" if SANITIZE else "build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": SANITIZE,
            "wraparound": False,
            "initializedcheck": False,
            "cdivision": True,
            "embedsignature": False,
        },
    )
)
