# make demo: audit a real model.  make test: the tests.  Both set themselves up in .venv with Python 3.11 or newer.
VENV  := .venv
BIN   := $(VENV)/bin
# The first interpreter that runs and is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# An environment for each engine, which disagree about what they need.
ENGINES := .engines

.PHONY: demo test test-real test-all test-engines lint docs organisms certificate clean

demo: $(VENV)/.runtime
	$(BIN)/kvgeom audit demo --out audit-demo

# Tiny models, a process on each core.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope

# Whole pipelines on tiny models; then the demo model and the notebooks, one after the other.
test-real: $(VENV)/.dev
	$(BIN)/python -m pytest -m "long and not slow and not real" --numprocesses auto --maxprocesses 8 --dist loadscope
	$(BIN)/python -m pytest -m "real and not slow"

test-all: test $(VENV)/.dev
	$(BIN)/python -m pytest -m "real or slow or long"

# Engines as they are, in environments that are kept; tests of one that cannot be installed here are skipped and say so.
test-engines: $(VENV)/.dev
	-$(MAKE) --no-print-directory $(ENGINES)/llamacpp/.made
	-$(MAKE) --no-print-directory $(ENGINES)/vllm/.made
	KVGEOM_ENGINES=$(CURDIR)/$(ENGINES) $(BIN)/python -m pytest -m engines -rs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Plants failure modes, diagnoses them, and writes what came out into docs/organisms.md and the README.
organisms: $(VENV)/.dev
	$(BIN)/python -m benchmarks.organisms

# The same text again, from the rows that were measured.
certificate: $(VENV)/.dev
	$(BIN)/python -m benchmarks.certificate

docs: $(VENV)/.dev
	$(PIP) --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(ENGINES)

$(ENGINES)/%/.made: tests/engines/%.txt | $(VENV)/bin/python
	@echo "installing $* in $(ENGINES)/$*..."
	$(VENV)/bin/python -m venv --clear $(ENGINES)/$*
	$(ENGINES)/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	$(ENGINES)/$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# A stamp is written only when its installation has ended well, so that an interrupted one is done again.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "kvgeom needs Python 3.11 or newer, and none was found; install one, or give make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing kvgeom and what it needs (torch is the largest part)..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing kvgeom, what it needs, and the tools that test it..."
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/.runtime $@
