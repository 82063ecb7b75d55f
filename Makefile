# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up first.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo test test-fast lint clean

setup:
	@$(PYTHON) tools/setup_env.py $(VENV)

demo: setup
	@$(RUN) -m hybridkv_vllm.demo

test: setup lint
	$(RUN) -m pytest

test-fast: setup
	$(RUN) -m pytest -m "not slow"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
