"""The array library that belongs to ``framework=`` and to the destinations."""

import subprocess
import sys

import numpy as np
import pytest

from asyncshard.arrays import numpy as numpy_library
from asyncshard.arrays.frameworks import FRAMEWORKS, load_library


def test_the_library_of_np_is_that_of_numpy():
    assert load_library("np") is numpy_library.library
    assert load_library("np", {"w": np.zeros(3)}) is numpy_library.library


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_torch_destination_chooses_the_library_of_torch_whatever_the_framework(framework):
    torch = pytest.importorskip("torch")
    from asyncshard.arrays import torch as torch_library

    assert load_library(framework, {"a": np.zeros(3), "w": torch.zeros(3)}) is torch_library.library


def test_a_framework_that_is_not_installed_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "asyncshard.arrays.torch", raising=False)
    with pytest.raises(ImportError, match=r"framework='pt': torch is not installed: pip install 'asyncshard\[torch\]'"):
        load_library("pt")


def test_an_import_error_within_an_installed_framework_is_not_disguised(monkeypatch, tmp_path):
    (tmp_path / "broken_library.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FRAMEWORKS, "broken", "broken_library")
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_package_that_nobody_has'"):
        load_library("broken")


def test_numpy_tensors_do_not_import_torch():
    program = (
        "import sys\n"
        "from asyncshard.arrays.frameworks import load_library\n"
        "load_library('np', {})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
