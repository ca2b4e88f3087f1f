# Everything below works on a fresh machine with Python 3.11 or newer, and nowhere but in this folder.
# With an environment of your own: `pip install -e '.[dev]'`, then the python commands as they stand here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev

.PHONY: install test lint docs smoke quickstart gates clean

install: $(VENV)/installed-$(EXTRAS)

$(VENV)/installed-$(EXTRAS): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

# Two at a time, a file in one piece: most of a test is compiling, which takes one core.
test: install
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# Builds the pages of docs/ into site/, offline, and fails on a broken link.
docs: install
	$(BIN)/mkdocs build --strict

# Every stage for a few steps, in a fresh folder: does it run here? (Most of it is compiling, so: quickly.)
smoke: install
	rm -rf runs/smoke
	XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/python experiments/pipeline.py \
		--config=configs/smoke.py --workdir=runs/smoke

quickstart: install
	$(BIN)/python experiments/pipeline.py --config=configs/quickstart.py --workdir=runs/quickstart

# Five quickstarts, each with a world of its own: over an hour on 2 cores.
gates: install
	$(BIN)/python benchmarks/gates.py --seeds=5 --workdir=runs/gates

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache
