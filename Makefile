# Each target builds .venv from nothing. PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DATA := $(or $(HF_MIMIC_DATA),../shared/data)

.PHONY: demo test test-slow quality bench clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch  # first, at the tested version: unpinned, its newest build brings gigabytes of CUDA
	$(INSTALL) -e '.[dev]'
	touch $@

demo: .venv/.installed  ## the main job on embedded data
	$(BIN)/hf-mimic demo

test: .venv/.installed  ## the default tests: no network, no data, about eleven minutes
	$(BIN)/python -m pytest

test-slow: .venv/.installed  ## the slow tests, and those on real data where it is present
	HF_MIMIC_DATA=$(DATA) $(BIN)/python -m pytest -m 'slow or data'

quality: .venv/.installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.installed  ## step time and memory of scoring over plain training
	$(BIN)/python examples/benchmarks/bench_scoring.py --model vit-s

clean:
	rm -rf .venv build dist *.egg-info demo_output outputs
