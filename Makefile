# Every target makes its own virtual environment in .venv; nothing else needs to be set up.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 4
# pip would compile all that it installs, in one thread. Python compiles what it imports, and keeps it.
INSTALL = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-compile --constraint constraints.txt
WITH_BYTECODE = env -u PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(WITH_BYTECODE) $(VENV)/bin/draftcache demo --output runs/demo

test: $(VENV)/.installed-dev
	$(WITH_BYTECODE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[plot]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs
