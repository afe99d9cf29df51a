# Everything is set up in .venv with nothing but Python and pip. `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
# Without a GPU the CPU build of torch is enough; set TORCH to take another one.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)

.PHONY: demo test lint kernels wheel clean

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

# A wheel that carries the compiled kernels, so that it tags the platform they are for.
wheel: kernels
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist \
	    --config-settings=--build-option=--plat-name=$(shell $(PYTHON) -c "import platform; print('manylinux_2_28_' + platform.machine())") .

clean:
	rm -rf $(VENV) build dist flash_mla/_kernels *.egg-info

$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -e '.[test,lint]'
	touch $@

$(VENV)/.build: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -e '.[build]'
	touch $@
