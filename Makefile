# Each target sets everything up by itself, in .venv. Another Python: make demo PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check benchmarks clean

demo: .venv/ready  ## the whole of SimCLR on 1,797 handwritten digits, a few minutes on two CPU cores
	$(BIN)/python simCLR.py --config configs/digits.yaml

test: .venv/ready-for-tests  ## the fast tests
	$(BIN)/python -m pytest

test-slow: .venv/ready-for-tests  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: .venv/ready-for-tests  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmarks: .venv/ready-for-benchmarks  ## side by side with alternatives; an hour, on a machine that does nothing else
	for name in augmentation loss convolution step recurrent startup growth microbatch large_sets memory signals; do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	@echo "installing the packages of requirements.txt into .venv (once; PyTorch with CUDA takes about 5 GB)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/ready-for-tests: .venv/ready tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

.venv/ready-for-benchmarks: .venv/ready benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@
