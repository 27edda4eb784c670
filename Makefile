# Needs python3 (3.11 or newer, another one by `make PYTHON=...`), pip and make.
# Everything else is installed, once and at pinned versions, into .venv.
PYTHON ?= python3
BIN := .venv/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/$(if $(filter 3.11,$(VERSION)),py311,py312).txt
STAMP := .venv/installed-$(VERSION)
# ARGS goes to the command itself: make demo ARGS="--help"
ARGS ?=
# Test workers: one a core, at most 8; each holds up to 1.5 GiB. Another number by WORKERS=...
WORKERS ?= logical
# Less to compile on a CPU, where this jaxlib knows these flags; another would abort.
QUICK := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
FLAGS = $$XLA_FLAGS $(shell XLA_FLAGS="$(QUICK)" $(BIN)/python -c 'import jax; jax.devices()' >/dev/null 2>&1 \
  && echo '$(QUICK)')

# Where the long tests are.
LONG := $(addprefix tests/,experiments benchmarks colabs docs)

.PHONY: help demo test test-fast test-long test-slow lint bench clean
help:
	@echo 'make demo       train one network on handwritten digits with every rule, and compare'
	@echo 'make test       lint, then all tests and doctests: test-fast, then test-long'
	@echo 'make test-fast  tests and doctests of the library alone; ARGS="-k rtrl" for some'
	@echo 'make test-long  notebooks, experiments, benchmarks and memory'
	@echo 'make test-slow  the slow tests: every rule on every model'
	@echo 'make lint       ruff and pyrefly'
	@echo 'make bench      time and memory beside jitted BPTT'
	@echo 'make clean      remove .venv and the caches'

demo: $(STAMP)
	$(BIN)/python -m experiments compare $(ARGS)

test: lint
	$(MAKE) test-fast test-long

test-fast: $(STAMP)
	XLA_FLAGS="$(FLAGS)" $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not long" \
	  --doctest-modules localgrad tests $(ARGS)
# 8 virtual devices are a setting of the whole process, so these tests have their own.
	JAX_PLATFORMS=cpu XLA_FLAGS="$(FLAGS) --xla_force_host_platform_device_count=8" \
	  $(BIN)/python -m pytest -n $(WORKERS) tests/multidevice

test-long: $(STAMP)
	XLA_FLAGS="$(FLAGS)" $(BIN)/python -m pytest -n $(WORKERS) -m "long and not slow" $(LONG) $(ARGS)
# What is measured is compiled as users have it.
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests/cost $(ARGS)

test-slow: $(STAMP)
	XLA_FLAGS="$(FLAGS)" $(BIN)/python -m pytest -n $(WORKERS) -m slow --ignore tests/cost tests $(ARGS)
	$(BIN)/python -m pytest -n $(WORKERS) -m slow tests/cost $(ARGS)
	JAX_PLATFORMS=cpu XLA_FLAGS="$(FLAGS) --xla_force_host_platform_device_count=8" \
	  $(BIN)/python -m pytest -n $(WORKERS) -m slow tests/multidevice $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: localgrad needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'error: $(PYTHON) cannot make virtual environments: install python3-venv' >&2; exit 1; }
	@echo 'Setting up .venv for Python $(VERSION): about 1 GB, once, a minute or two ...'
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c $(CONSTRAINTS) \
	  -e '.[experiments,test,dev]'
	@touch $@
