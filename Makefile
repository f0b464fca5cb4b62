# make demo | make study | make test | make test-all | make soak | make bench        (VENV=folder, PYTHON=python3.12 to choose)
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: install demo study test test-all soak bench lock clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: install
	$(BIN)/fedssl demo overwrite=true

study: install
	$(BIN)/fedssl demo --study

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest

test-all: test
	$(BIN)/python -m pytest -m "(slow or federation) and not gpu"

soak: install
	$(BIN)/python -m pytest -m soak -s

bench: install
	$(BIN)/python -m simulations.benchmark

# The exact versions of the working environment, without addresses.
lock: install
	$(BIN)/python -m pip freeze --exclude-editable --exclude fedssl > requirements.lock

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
