# Two commands do everything on a fresh machine: make demo, make test.
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
EXTRAS ?= dev
SOURCES := pyproject.toml build_protos.py $(wildcard protos/isthmus/v1/*.proto)

.PHONY: demo test test-slow test-all test-long lint protos promise parity peers peers-llama peers-vllm setup setup-dev clean

demo: $(VENV)/.ready  ## train on Python's own source, serve, call it with eight prompts at once
	$(BIN)/isthmus demo

test: $(VENV)/.ready-dev  ## everything but the slow tests and those that need another environment
	@$(BIN)/python -c "from isthmus.model.ops.cpu import library; library.why_not()"  # once, and not in every worker
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not peers and not exact"
	ISTHMUS_EXACT=1 $(BIN)/python -m pytest -n $(JOBS) -m "exact and not slow"

test-slow: $(VENV)/.ready-dev  ## what takes a minute or more, or needs what `make peers` builds
	$(BIN)/python -m pytest -n $(JOBS) -m "(slow or peers) and not exact and not long"
	ISTHMUS_EXACT=1 $(BIN)/python -m pytest -n $(JOBS) -m "exact and slow and not long"

test-all: test test-slow  ## what CI runs

test-long: $(VENV)/.ready-dev  ## what CI has no time for
	ISTHMUS_EXACT=1 $(BIN)/python -m pytest -n $(JOBS) -m long

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against isthmus-v1.binpb

setup: $(VENV)/.ready

setup-dev: $(VENV)/.ready-dev

protos: $(VENV)/.ready-dev  ## generate isthmus/v1 again
	$(BIN)/python build_protos.py

promise: $(VENV)/.ready-dev  ## with a release: what the API has gained since the last one must stay from now on
	cd protos && ../$(BIN)/buf breaking --against isthmus-v1.binpb && ../$(BIN)/buf build --exclude-source-info -o isthmus-v1.binpb

parity: $(VENV)/.ready-dev peers  ## every family against transformers, live, on models of a new seed
	$(BIN)/python tests/parity/live.py $(SEED)

peers: .venv-peers/.ready  ## torch, transformers and what else we are measured against; Python 3.11

peers-llama: .peers-llama/.ready  ## llama.cpp, built for this machine; a quarter of an hour on two cores

peers-vllm: .venv-vllm/.ready  ## vLLM for CPUs; 3.4 GB

$(VENV)/.ready: $(SOURCES)
	@sh scripts/setup.sh $(VENV)
	@touch $@

$(VENV)/.ready-dev: $(SOURCES)
	@sh scripts/setup.sh $(VENV) $(EXTRAS)
	@touch $@ $(VENV)/.ready

.venv-peers/.ready: benchmarks/peers/requirements.txt scripts/setup_peers.sh
	@sh scripts/setup_peers.sh .venv-peers
	@touch $@

.peers-llama/.ready: benchmarks/peers/requirements_llama_cpp.txt scripts/setup_llama_cpp.sh | .venv-peers/.ready
	@JOBS=$(JOBS) sh scripts/setup_llama_cpp.sh .peers-llama .venv-peers/bin/python
	@touch $@

.venv-vllm/.ready: benchmarks/peers/requirements_vllm.txt scripts/setup_vllm.sh | .venv-peers/.ready
	@sh scripts/setup_vllm.sh .venv-vllm .venv-peers/bin/python
	@touch $@

clean:
	rm -rf $(VENV) .venv-peers .venv-vllm .peers-llama demo-out
