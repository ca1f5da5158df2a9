# `make demo` and `make test` set up everything they need; the other targets likewise.
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
NATIVE := $(VENV)/.native
CSRC := $(wildcard kernels/csrc/* kernels/csrc/*/*) kernels/CMakeLists.txt pyproject.toml
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-unit check format bench bench-peers browser wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(NATIVE)  ## virtual environment, pinned packages, native kernels

$(INSTALLED): constraints.txt pyproject.toml
	@echo 'setting up $(VENV): pinned packages and the native kernels, a minute or two' >&2
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@$(PYTHON) -m pip install -qq --constraint constraints.txt scikit-build-core nanobind ninja
	@$(PYTHON) -m pip install -qq --no-build-isolation --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

# The kernels once more when their sources change; --no-deps, so that it takes seconds.
$(NATIVE): $(INSTALLED) $(CSRC)
	@test -z "$$(find $(CSRC) -newer $(INSTALLED))" || { echo 'building the native kernels' >&2; \
	  $(PYTHON) -m pip install -qq --no-build-isolation --no-deps --editable .; }
	@touch $@

demo: setup  ## one model over three devices on this machine: plan, speed, generated code, console
	$(VENV)/bin/edge-runtime demo $(DEMO_FLAGS)

test: setup browser  ## every test: unit, real processes, real browser
	$(PYTHON) -m pytest

# Real links, the interpreter of GPU programs: `make test` runs them, a minute of waiting is too much for test-unit.
LINK_TESTS := tests/coordinator/test_bad_input.py tests/coordinator/test_runtime_sessions.py tests/experts/test_expert_agent.py \
  tests/experts/test_expert_peer_agents.py tests/experts/test_expert_helped_agents.py \
  tests/sdk tests/local_api tests/conformance tests/trust tests/api tests/agent/test_agents.py tests/agent/test_agent_refusals.py tests/coordinator/test_nothing_leaks.py \
  tests/engine/test_torch_stage.py tests/engine/test_torch_side_rows.py $(wildcard tests/kernels/test_triton_*.py)

test-unit: setup  ## the fast tests: no processes, no browser, no transformers
	$(PYTHON) -m pytest -m 'not cluster and not browser and not export' $(addprefix --ignore=,$(LINK_TESTS))

check: setup  ## lint, types, import rule: what CI checks
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	PYTHONPATH=kernels:. $(VENV)/bin/lint-imports

format: setup  ## put the code in the house style
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: setup  ## measure the kernels and the transport; benchmarks/README.md lists the others
	$(PYTHON) -m benchmarks.kernels
	$(PYTHON) -m benchmarks.transport

# llama.cpp with its RPC backend, for this machine's processor; an environment of its own, so that nothing of it is ours.
PEERS := .peers
bench-peers: $(PEERS)/.installed  ## the programs that benchmarks compare with, built from source (minutes)

$(PEERS)/.installed: benchmarks/peers/requirements.txt
	test -x $(PEERS)/bin/python || python3 -m venv $(PEERS)
	CMAKE_ARGS="-DGGML_RPC=ON -DGGML_NATIVE=ON" \
	  $(PEERS)/bin/python -m pip install --quiet --no-binary llama-cpp-python --requirement $<
	touch $@

# The console's test needs a real Chromium: Debian's, where we may install it.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y chromium >/dev/null; } || \
	  echo 'no Chromium here and no right to install it: the browser test will say so' >&2

wheel: setup  ## build the wheel into dist/
	$(PYTHON) -m build --wheel --no-isolation --outdir dist

clean:  ## remove what was built
	rm -rf build dist $(VENV)
