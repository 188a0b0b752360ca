# Everything runs in .venv, which .ci/setup.sh makes: an environment with SGLang that is already
# active is used as it is, otherwise SGLang is installed once per user and shared by all checkouts.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Scripts that the packages bring, ninja for one, are looked up on PATH by the processes we start.
in_venv = base="$$(cat .venv/base-python)"; export PATH="$$PWD/.venv/bin:$${base%/*}:$$PATH"
run = $(in_venv); exec .venv/bin/python
ARGS ?=

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## make .venv with SGLang and this checkout; quick when it is there
	@bash .ci/setup.sh

.PHONY: demo
demo: setup ## multi-turn chats against stock SGLang and against jenga, one table
	@$(run) -m benchmarks.demo $(ARGS)

.PHONY: bench
bench: setup ## replay loads on real models' layer mixes, stock against jenga; some 15 minutes
	@$(run) -m benchmarks.replay.bench $(ARGS)

.PHONY: gpu
gpu: setup ## all that only a GPU can tell: parity, kernels, attention, a live comparison; under 25 minutes
	@$(run) -m benchmarks.gpu.suite $(ARGS)

.PHONY: test
test: setup ## all tests, real servers included
	@$(in_venv); exec .ci/test $(ARGS)

.PHONY: test-fast
test-fast: setup ## the tests that start no server, and of random programs a part
	@$(in_venv); exec .ci/test-fast $(ARGS)

.PHONY: coverage
coverage: setup ## what the fast tests run of serving/ and boot/; fails below 85 % of a file
	@$(run) .ci/coverage.py $(ARGS)

.PHONY: lint
lint: setup ## ruff check, ruff format --check, mypy
	@.venv/bin/python -m ruff check . && .venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy

.PHONY: docs
docs: setup ## write the pages and the catalogue that come from code, ours and SGLang's
	@$(in_venv); .venv/bin/python -m sglang_jenga.boot.hook_docs
	@$(run) -m sglang_jenga.boot.write_catalogue

.PHONY: clean
clean: ## remove .venv, caches and build output of this checkout; the shared SGLang stays
	rm -rf .venv .cache build dist ./*.egg-info examples/*/build examples/*/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
