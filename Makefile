# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up first.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo test test-fast lint clean

setup:
	@$(PYTHON) tools/setup_env.py $(VENV)

demo: setup
	@$(RUN) -m hybridkv_vllm.demo

# What starts engines and servers wants the machine for itself; of all else each file takes a core.
test: lint test-fast
	$(RUN) -m pytest -m slow

test-fast: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n auto --dist loadfile

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
