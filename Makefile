# make demo: everything on two CPU cores. make test: the quick tests, make test-slow: the others. make lint: ruff.
# make serve-test: the stand-in in the real vLLM-Omni; it sets up .venv-serve (3.3 GB). All set up .venv first.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.test-ready
SERVE := .venv-serve
# Two files beside each other, one thread each.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

.PHONY: setup demo lint test test-slow serve-test

setup: $(READY)

$(READY): requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps resemblyzer  # for its weights
	touch $@

demo: $(READY)
	$(VENV)/bin/python demo.py

$(TEST_READY): requirements-test.txt $(READY)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

lint: $(TEST_READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

test: $(TEST_READY)
	$(PYTEST) -m "not slow"

test-slow: $(TEST_READY)
	$(PYTEST) -m slow

serve-test: $(TEST_READY)
	-$(MAKE) --no-print-directory $(SERVE)/.ready
	$(VENV)/bin/python -m pytest -q -s -rs -p no:cacheprovider serving

# PyPI's torchaudio and torchvision are built for CUDA: their libraries do not load beside torch for the CPU.
$(SERVE)/.ready: serving/requirements.txt serving/pyproject.toml serving/torchvision_extension.py
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet --disable-pip-version-check --no-deps -r serving/requirements.txt
	rm -f $(SERVE)/lib/python3*/site-packages/torchaudio/lib/*.so
	grep -q _OPERATORS $(SERVE)/lib/python3*/site-packages/torchvision/extension.py || \
		cat serving/torchvision_extension.py >> $$(echo $(SERVE)/lib/python3*/site-packages/torchvision/extension.py)
	$(SERVE)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e serving
	touch $@
