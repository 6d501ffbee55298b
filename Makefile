# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types unit clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/python -m mypy

# Two processes: tests use several threads themselves.
unit: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Strict editable mode links every module, so that type checkers follow it; a new file needs a new install.
$(READY): pyproject.toml constraints.txt $(wildcard formats/*.py stages/*.py stages/*.toml flow/*.py)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "quantloom needs Python 3.11 or later; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--config-settings editable_mode=strict --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist demo-output example-output .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
