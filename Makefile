# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up first.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo test test-fast lint clean

setup:
	@$(PYTHON) tools/setup_env.py $(VENV)

demo: setup
	@$(RUN) -m hybridkv_vllm.demo

# Of quick tests each file takes a core. So does each file of engines, but on a GPU, where one takes the whole card.
# Servers want the machine for themselves.
ENGINES := $(if $(shell command -v nvidia-smi),1,auto)

test: lint test-fast
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "slow and not alone" -n $(ENGINES) --dist loadfile
	$(RUN) -m pytest -m "slow and alone"

test-fast: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n auto --dist loadfile

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
