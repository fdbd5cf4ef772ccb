# Needs Python 3.11+, make and a package registry; everything else is installed into .venv.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# The pinned torch on the command line picks the CPU build where the registry offers one; any CUDA build works too.
TORCH ?= torch==2.13.0

.PHONY: demo test lint unit real assets readme clean

demo: $(BIN)/.demo  ## The whole job on a small CLIP: compress, export, benchmark, verdict, report.
	$(BIN)/mmc demo

test: lint unit real  ## Everything CI runs.

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(BIN)/.dev  ## Laws and golden values on tiny models.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not real" -n 2 --dist worksteal -rs

real: assets  ## The same commands on real pretrained weights.
	$(BIN)/python -m pytest -m real -rs --timeout 1800

assets: $(BIN)/.dev  ## Fetch and build the real models and data (cached outside the repository).
	$(BIN)/python -m bench.assets

readme: $(BIN)/.dev  ## Write every command's --help into README.md.
	$(BIN)/python -m bench.readme

$(BIN)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[cpu,openvino]' '$(TORCH)'
	touch $@

$(BIN)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' '$(TORCH)'
	touch $@ $(BIN)/.demo

clean:
	rm -rf $(VENV) out
