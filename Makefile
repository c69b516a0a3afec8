# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick lint dist clean

BIN := .venv/bin
PARALLEL := $(BIN)/pytest tests -n 2 --dist loadfile --no-loadscope-reorder

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Create .venv with vLLM's CPU build and the plugin
	@.ci/install

demo: install ## Serve a small real model with attention offloading and ask it a question
	@$(BIN)/python benchmarks/demo.py

# Engines mostly start and compute in one thread: two files run at once. The second
# part runs whatever the first one found.
test: install lint ## Check style and types, then run the whole test suite
	@status=0; \
	$(BIN)/pytest tests/faults -m alone || status=$$?; \
	$(PARALLEL) -m "not slow and not alone" --durations=25 || status=$$?; \
	exit $$status

test-quick: install ## Run the tests that need no engine, and one that does (minutes)
	ATTN_OFFLOAD_FUZZ_S=5 $(PARALLEL) -m "not slow and not long"

# mypy does not follow an editable install to vllm_attn_offload.triton_kernels and
# .patches, so it checks a copy of the modules laid out as installed, under their names.
lint: install ## Check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typed
	@$(BIN)/python setup.py --quiet build_py --build-lib build/typed
	MYPYPATH=build/typed:deploy/grafana $(BIN)/mypy build/typed/vllm_attn_offload benchmarks deploy/grafana

dist: install ## Build the sdist and the manylinux wheel into dist/, and check both
	@.ci/dist

clean: ## Remove what builds and tests leave; the virtual environment stays
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
