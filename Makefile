# `make train` and `make test` each do everything on a machine that has Python and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py pyproject.toml constraints.txt

.PHONY: help train test lint bench figures clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/installed: $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "python3 -m venv failed: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/developer: $(VENV)/installed
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

train: $(VENV)/installed ## train ResNet-20 on handwritten digits, split over two CPU devices
	$(BIN)/python -m fdg_cuda train

test: $(VENV)/installed ## the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/developer ## ruff, clang-format, mypy, the stub against the extension, documents against results
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/cpp tests/stand_in -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest fdg_cuda._core --ignore-missing-stub --allowlist tests/stubtest_allowlist.txt --mypy-config-file pyproject.toml
	$(BIN)/python -m benchmarks.tables --check
	$(BIN)/python -m docs.model_table --check

bench: $(VENV)/developer ## every benchmark; writes benchmarks/results and docs/results.md (a quiet machine, 4 hours)
	$(BIN)/python -m benchmarks.compare
	$(BIN)/python -m benchmarks.training_step
	$(BIN)/python -m pytest benchmarks --benchmark-json benchmarks/results/micro.json
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.auto_cut
	$(BIN)/python -m benchmarks.cut_time
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.simulation
	$(BIN)/python -m benchmarks.staleness
	$(BIN)/python -m benchmarks.learning
	$(BIN)/python -m benchmarks.tables

figures: $(VENV)/developer ## the pictures and tables in docs/
	$(BIN)/python -m docs.pipeline_picture
	$(BIN)/python -m docs.model_table

clean:
	rm -rf $(VENV) build *.egg-info fdg_cuda/_core.*.so
