# make demo: everything on two CPU cores. make test: the test suite. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: setup demo test

setup: $(READY)

$(READY): requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps resemblyzer  # its weights; the rest of it is not used
	touch $@

demo: $(READY)
	$(VENV)/bin/python demo.py

test: $(READY)
	$(VENV)/bin/python -m pytest -q tests
