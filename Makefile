# Two commands do everything on a fresh machine: make demo, make test.
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
EXTRAS ?= dev
SOURCES := pyproject.toml build_protos.py $(wildcard protos/isthmus/v1/*.proto)

.PHONY: demo test test-all lint protos parity peers setup setup-dev clean

demo: $(VENV)/.ready  ## train on Python's own source, serve, call it with eight prompts at once
	$(BIN)/isthmus demo

test: $(VENV)/.ready-dev  ## everything but the slow tests and those that need another environment
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not peers"

test-all: $(VENV)/.ready-dev  ## what CI runs
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint

setup: $(VENV)/.ready

setup-dev: $(VENV)/.ready-dev

protos: $(VENV)/.ready-dev  ## generate isthmus/v1 again
	$(BIN)/python build_protos.py

parity: $(VENV)/.ready-dev peers  ## every family against transformers, live, on models of a new seed
	$(BIN)/python tests/parity/live.py $(SEED)

peers: .venv-peers/.ready  ## torch, transformers and what else we are measured against; Python 3.11

$(VENV)/.ready: $(SOURCES)
	@sh scripts/setup.sh $(VENV)
	@touch $@

$(VENV)/.ready-dev: $(SOURCES)
	@sh scripts/setup.sh $(VENV) $(EXTRAS)
	@touch $@ $(VENV)/.ready

.venv-peers/.ready: benchmarks/peers/requirements.txt scripts/setup_peers.sh
	@sh scripts/setup_peers.sh .venv-peers
	@touch $@

clean:
	rm -rf $(VENV) .venv-peers demo-out
