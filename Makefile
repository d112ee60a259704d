# What a fresh machine needs: Python 3.11 or later, a C compiler, make.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
NEW_VENV := $(VENV)/.python-$(VERSION)
BUILD_INPUTS := pyproject.toml setup.py asyncshard/_core.pyx $(wildcard asyncshard/_kernels/*.pxi)

SANITIZED := build/sanitize
CORE_TESTS := tests/format tests/plan $(wildcard tests/pipeline/test_*_core.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench sanitize clean

help:
	@echo 'make demo      load real weights back from a 2-rank sharded state under a 32 MB budget'
	@echo 'make test      run every check: ruff, mypy, stubtest, pytest'
	@echo 'make bench     measure, and write bench/results'
	@echo 'make sanitize  run the tests of the compiled core under the address and undefined-behaviour sanitisers'
	@echo 'make clean     remove what the others made'
	@echo
	@echo 'PYTHON=python3.13 picks another interpreter; it is $(PYTHON) $(VERSION) now.'

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/demo.py examples/serve.py
	$(BIN)/python -m mypy.stubtest asyncshard._core --allowlist tests/stubtest-allowlist.txt --ignore-unused-allowlist \
	    --mypy-config-file pyproject.toml
	$(BIN)/pytest

bench: $(VENV)/.bench
	$(BIN)/python -m bench

# The sanitised library goes to a folder of its own, which PYTHONPATH puts before the installed one. libstdc++ is loaded
# first because torch throws C++ exceptions, which the sanitiser must know of from the start. Leaks are not looked for:
# the interpreter itself leaves memory at its exit. pytest must not capture the file that the sanitiser writes to.
sanitize: $(VENV)/.test $(SANITIZED)/.built
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONMALLOC=malloc \
	PYTHONPATH=$(SANITIZED)/lib \
	$(BIN)/pytest -p no:cacheprovider --capture=sys $(CORE_TESTS)

clean:
	rm -rf $(VENV) build dist bench/results *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find asyncshard -name '*.so' -delete
	find asyncshard bench examples tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp named for the version, so that another PYTHON makes the environment anew.
$(NEW_VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'Python 3.11 or later is needed: make ... PYTHON=python3.11' >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(NEW_VENV) $(BUILD_INPUTS)
	$(PIP) install --editable '.[$*]'
	touch $@

$(VENV)/.bench: $(VENV)/.test bench/requirements.txt
	$(PIP) install --requirement bench/requirements.txt
	touch $@

$(SANITIZED)/.built: $(VENV)/.test $(wildcard asyncshard/*.py asyncshard/*/*.py)
	rm -rf $(SANITIZED)
	$(PIP) install 'setuptools>=77' 'Cython>=3.1'
	ASYNCSHARD_SANITIZE=1 CC=gcc $(BIN)/python setup.py --quiet build \
	    --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	touch $@
