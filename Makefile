# Two commands for people: `make demo`, with Python >= 3.10, and `make test`, with Python >= 3.11 for
# the sake of torchtitan. Both need only venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test torture versions lint format proto clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-installed  ## Train a small GPT on two ranks, with its LR and WD from a server.
	@exec $(BIN)/python examples/demo.py

test: $(VENV)/.dev-installed  ## Run the linters, the type checker and the whole test suite.
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/test.sh

torture: $(VENV)/.dev-installed  ## Let 1,000 things go wrong and check what is promised; half an hour.
	@$(BIN)/python -m pytest -q -m torture tests/crash
	@$(BIN)/python -m tests.crash.torture $(TORTURE)

versions: $(VENV)/.dev-installed  ## Test the client on the oldest and newest versions of what it needs; long.
	@$(BIN)/python scripts/check_versions.py

lint: $(VENV)/.dev-installed  ## Run the linters and the type checker alone.
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/lint.sh

format: $(VENV)/.dev-installed  ## Format the code.
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

proto:  ## Generate the stubs of proto/ anew.
	@PYTHON="$(PYTHON)" bash scripts/generate_stubs.sh proto

clean:  ## Remove what the other targets made.
	rm -rf $(VENV) .cache dist build demo-output .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps make a second run fast; a changed list of dependencies installs again.
$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[server,torch]'
	@touch $@

# Frameworks that the tests drive, without what they ask for beside torch and is not used there.
# DeepSpeed is built here, with no operators; it wants torch and setuptools for that.
$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[server,torch,dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps megatron-core \
		torchtitan spmd_types torchdata tyro docstring_parser typeguard
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt --no-deps \
		--no-build-isolation deepspeed hjson msgpack einops py-cpuinfo
	@touch $@
