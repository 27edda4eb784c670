# Needs python3 (3.11 or newer, another one by `make PYTHON=...`), pip and make.
# Everything else is installed, once and at pinned versions, into .venv.
PYTHON ?= python3
BIN := .venv/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/$(if $(filter 3.11,$(VERSION)),py311,py312).txt
STAMP := .venv/installed-$(VERSION)
# ARGS goes to the command itself: make demo ARGS="--help"
ARGS ?=

.PHONY: help demo test lint bench clean
help:
	@echo 'make demo   train one network on handwritten digits with every rule, and compare'
	@echo 'make test   lint, then all tests and doctests'
	@echo 'make lint   ruff and pyrefly'
	@echo 'make bench  time and memory beside jitted BPTT'
	@echo 'make clean  remove .venv and the caches'

demo: $(STAMP)
	$(BIN)/python -m experiments compare $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 --doctest-modules localgrad tests
# 8 virtual devices are a setting of the whole process, so these tests have their own.
	JAX_PLATFORMS=cpu XLA_FLAGS="$$XLA_FLAGS --xla_force_host_platform_device_count=8" \
	  $(BIN)/python -m pytest tests/multidevice

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
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) \
	  -e '.[experiments,test,dev]'
	@touch $@
