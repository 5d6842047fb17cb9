# Every target sets up what it needs: a fresh machine needs only Python 3.11 or newer and make.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
            $$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet # errors only
UV ?= uv
REAL ?= safe_rlhf
# GPUs compile scanned layers several times faster. Of CPUs, those with amx_bf16 and AMD's with avx512_bf16 multiply bfloat16
# faster than float32 (slow_dtype of safe_rlhf_jax/stages/check.py knows the same).
REAL_ARGS = $(if $(findstring gpu,$(REAL)),execution.scan_layers=true,$(shell \
              grep -qm1 amx_bf16 /proc/cpuinfo 2>/dev/null || { grep -qm1 AuthenticAMD /proc/cpuinfo && \
              grep -qm1 avx512_bf16 /proc/cpuinfo; } 2>/dev/null || echo execution.dtype=float32))
# Without restarts: after the crash of a worker xdist would wait for ever.
PYTEST ?= -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
COMPILE := $(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
             --no-annotate --custom-compile-command 'make lock'

.DEFAULT_GOAL := help
unexport PYTHONDONTWRITEBYTECODE # where it is set, every process would compile all that it imports anew
.PHONY: help venv quickstart real test test-fast test-distributed test-real test-reference test-tpu test-gpu-aot lint format types dist wheels lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## create .venv from the locked, hashed requirements (about a minute)

$(STAMP): requirements-dev.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv was found; name one: make PYTHON=..." >&2; exit 1; }
	@echo "Installing requirements-dev.lock into .venv ($(PYTHON))"
	$(PYTHON) -m venv .venv
	$(PIP) install --no-compile --no-deps --require-hashes -r requirements-dev.lock # what is imported is compiled then
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

quickstart: venv ## train the small pipeline on this machine's CPU (ARGS="dotted.key=value ...")
	$(BIN)/python -m safe_rlhf_jax.train --config configs/quickstart.yaml $(ARGS)

real: venv ## Safe RLHF of SmolLM2-135M-Instruct on real preferences: hours on two cores, or REAL=one_gpu (docs/real.md; needs ../shared)
	$(PIP) install --no-build-isolation -e '.[real]'
	$(BIN)/python -m benchmarks.real.prepare
	$(BIN)/python -m benchmarks.real.judge fit
	$(if $(findstring gpu,$(REAL)),$(BIN)/python -m safe_rlhf_jax.train --config configs/smollm2_135m/judge.yaml $(REAL_ARGS))
	$(BIN)/python -m safe_rlhf_jax.train --config configs/smollm2_135m/$(REAL).yaml $(REAL_ARGS) $(ARGS)

test: venv ## all tests that need neither TPU, GPU nor torch, the slow ones too (ARGS="-k name ...")
	$(BIN)/python -m pytest -m "not tpu and not gpu_aot and not reference and not distributed and not real" $(PYTEST) $(ARGS)

test-fast: venv ## the same without the slow ones
	$(BIN)/python -m pytest -m "not tpu and not gpu_aot and not reference and not distributed and not real and not slow" $(PYTEST) $(ARGS)

test-distributed: venv ## kills, terminations and deaths of processes; every mesh shape (about ten minutes)
	$(BIN)/python -m pytest -m distributed $(ARGS)

test-real: venv ## a few steps of every stage of `make real` (some minutes; downloads the model, needs ../shared)
	$(PIP) install --no-build-isolation -e '.[real]'
	$(BIN)/python -m pytest -m real $(ARGS)

test-reference: venv ## comparisons with the torch reference (installs torch into .venv)
	$(PIP) install --no-build-isolation -e '.[torch]'
	$(BIN)/python -m pytest -m reference $(ARGS)

test-tpu: venv ## programs for TPU topologies, compiled without a TPU (installs libtpu into .venv)
	$(PIP) install --no-build-isolation -e '.[tpu]'
	$(BIN)/python -m pytest -m tpu $(ARGS)

test-gpu-aot: venv ## programs for GPUs, compiled without a GPU (installs JAX's CUDA plugin into .venv)
	$(PIP) install --no-build-isolation -e '.[gpu-aot]'
	$(BIN)/python -m pytest -m gpu_aot $(ARGS)

lint: venv ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv ## ruff: fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: venv ## mypy --strict on the package
	$(BIN)/mypy

dist: venv ## build the wheel, dist/*.whl
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

wheels: venv ## gather in build/wheels what benchmarks/device.sh may install without network (ARGS="--python 3.12 --present FILE")
	$(BIN)/python benchmarks/wheels.py build/wheels $(ARGS)

lock: ## resolve the requirements anew (needs uv)
	$(COMPILE) $(UPGRADE) -o requirements.lock
	$(COMPILE) $(UPGRADE) --extra dev -o requirements-dev.lock

clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find safe_rlhf_jax tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
