# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up first.
PYTHON ?= python3
VENV ?= .venv
RUN := "$(VENV)/bin/python"

.PHONY: setup demo test test-fast lint clean

setup:
	@$(PYTHON) tools/setup_env.py "$(VENV)"

demo: setup
	@$(RUN) -m hybridkv_vllm.demo

# Each file of tests takes a core, in the order in which they are found: long files are not left for the end. On a
# GPU one of engines takes the whole card, and servers want it without the engines' process.
CORES := -n auto --dist loadfile --no-loadscope-reorder
ENGINES := $(if $(shell command -v nvidia-smi),-n 1,$(CORES))

test: lint test-fast
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "slow and not server" $(ENGINES)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "slow and server" $(ENGINES)

test-fast: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" $(CORES)

lint: setup
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/mypy"

clean:
	rm -rf "$(VENV)" build *.egg-info .pytest_cache .mypy_cache .ruff_cache
