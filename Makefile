# Everything is set up in .venv with nothing but Python and pip. `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
# Where there is no NVIDIA GPU, a torch of fixed version; set TORCH to take another one.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)

.PHONY: demo test lint kernels triton wheel clean

demo: $(VENV)/.runtime
	$(BIN)/flash-mla demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiles every Hopper kernel into the package and fails on spills, ptxas warnings or registers above the budget.
kernels: $(VENV)/.build
	$(BIN)/flash-mla build --jobs $(JOBS) --check

# Compiles every Triton kernel for every architecture and fails on spills, shared memory or a lack of tensor cores.
triton: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m flash_mla.backends.triton.check --jobs $(JOBS)

# A wheel that carries the compiled kernels; build/ may hold files of an earlier one.
wheel: kernels
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist flash_mla/_kernels *.egg-info

# numpy: torch warns on every import where it is missing.
$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)' numpy
	$(BIN)/python -m pip install --quiet -e .
	touch $@

# setuptools: a test builds wheels.
$(VENV)/.test: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -e '.[test,lint]' 'setuptools>=77'
	touch $@

$(VENV)/.build: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -e '.[build]'
	touch $@
