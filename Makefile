# Targets set up what they need. Variables: FRAMEWORKS="torch tensorflow" (or one of them),
# VENV=.venv (where everything is installed), PYTHON=python3 (3.10 or newer).
VENV ?= .venv
PYTHON ?= python3
FRAMEWORK ?= torch
ifeq ($(MAKECMDGOALS),demo)
# The demo sets up its own framework, unless both are there already.
FRAMEWORKS ?= $(if $(wildcard $(VENV)/.ready-tensorflow-torch-*),torch tensorflow,$(FRAMEWORK))
endif
FRAMEWORKS ?= torch tensorflow
PYTEST_ARGS ?=
SIDE_BY_SIDE := -n logical --maxprocesses 8

comma := ,
empty :=
space := $(empty) $(empty)
override FRAMEWORKS := $(sort $(subst $(comma),$(space),$(FRAMEWORKS)))
UNKNOWN := $(filter-out torch tensorflow,$(FRAMEWORKS))
ifneq ($(UNKNOWN)$(if $(FRAMEWORKS),,none),)
$(error FRAMEWORKS must be torch, tensorflow or both, got "$(FRAMEWORKS)")
endif
EXTRAS := $(subst $(space),$(comma),$(strip $(FRAMEWORKS) dev docs examples mpi))

BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
export TF_CPP_MIN_LOG_LEVEL ?= 2
# What is left out is left out of Horovod's build and of the tests, even where it is installed.
export HVD_EXT_FRAMEWORKS := $(subst $(space),$(comma),$(FRAMEWORKS))
ifeq ($(filter torch,$(FRAMEWORKS)),)
export HOROVOD_WITHOUT_PYTORCH := 1
endif
ifeq ($(filter tensorflow,$(FRAMEWORKS)),)
export HOROVOD_WITHOUT_TENSORFLOW := 1
endif

# An environment is current when its stamp carries the checksum of what it was made from.
SOURCES := Makefile setup.py pyproject.toml hvd_ext/versions.py $(sort $(shell find hvd_ext/cli/horovod_patches -name '*.py' -o -name '*.in' -o -name '*.diff'))
SUM := $(shell cat $(SOURCES) | cksum | tr ' ' '-')
TOOLS := $(VENV)/.tools-$(SUM)
READY := $(VENV)/.ready-$(subst $(space),-,$(FRAMEWORKS))-$(SUM)

.PHONY: setup demo test test-quick test-long test-portable test-soak test-cluster test-zoo test-gpu-build test-triton lint docs bench doctor clean
.DEFAULT_GOAL := setup

setup: $(READY)
	@echo "Ready. Next: make demo, or $(BIN)/hvd-ext doctor"

demo: $(READY)
	$(PY) -m examples.demo --framework $(FRAMEWORK)

# Side by side what leaves cores to others, then ranks, which take all of them. Either may be empty (5).
test: $(READY)
	@$(PY) -m pytest $(SIDE_BY_SIDE) -m "not distributed or idle_ranks" $(PYTEST_ARGS); first=$$?; \
	  $(PY) -m pytest -m "distributed and not idle_ranks" $(PYTEST_ARGS); second=$$?; \
	  case $$first-$$second in 0-0|0-5|5-0) ;; *) echo "exit status $$first side by side, $$second of ranks"; exit 1;; esac

test-quick: $(READY)
	$(PY) -m pytest $(SIDE_BY_SIDE) -m "(not slow and not distributed) or smoke" $(PYTEST_ARGS)

# What `make test` has no minutes for.
test-long: $(READY)
	$(PY) -m pytest -m extended $(PYTEST_ARGS)

# Tests without ranks under other instruction sets and beside a busy loop, three times each: many hours.
test-portable: $(READY)
	$(PY) -m scripts.portable_tests -- $(SIDE_BY_SIDE) $(PYTEST_ARGS)

test-soak: $(READY)
	$(PY) -m pytest -m soak $(PYTEST_ARGS)

# Hosts as network namespaces: needs root, and ip and tc (iproute2).
test-cluster: $(READY)
	$(PY) -m tests.cluster.hosts
	$(PY) -m pytest -m cluster tests/cluster $(PYTEST_ARGS)

# Horovod with NCCL operations, built from wheels in an environment of its own: 10 GB, 20 minutes.
test-gpu-build: $(TOOLS)
	$(PY) -m pytest -m gpu_build tests/cli -s $(PYTEST_ARGS)

test-zoo: $(READY)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[zoo]'
	$(PY) -m pytest tests/zoo -m "zoo or not zoo" $(PYTEST_ARGS)
	$(if $(filter torch,$(FRAMEWORKS)),$(PY) -m tests.zoo)
	$(if $(filter tensorflow,$(FRAMEWORKS)),$(PY) -m tests.zoo --framework tensorflow)

# Kernels for GPUs, through Triton's interpreter: installs 200 MB.
test-triton: $(READY)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[triton]'
	$(PY) -m pytest tests/torch/test_kernels_triton.py $(PYTEST_ARGS)

bench: $(READY)
	$(PY) -m benchmarks

doctor: $(READY)
	$(BIN)/hvd-ext doctor

# The pages and the API reference, into out/site; a warning is an error.
docs: $(TOOLS)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist out .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -path '*/.venv*' -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -prune -print | xargs rm -rf
	@echo "Kept: $(VENV) and the Horovod wheels in the user's cache."

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "no venv module: install python3-venv, or pass another PYTHON="; exit 1; }

$(TOOLS): $(SOURCES) | $(PY)
	$(PY) -m pip install --quiet 'setuptools>=77,<81' wheel
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[dev]'
	@rm -f $(VENV)/.tools-*
	@touch $@

$(READY): $(TOOLS)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[$(EXTRAS)]'
	$(BIN)/hvd-ext install-horovod
	@rm -f $(VENV)/.ready-*
	@touch $@
