# Everything happens in .venv, which is made on first use. Nothing outside this folder is touched.
#
#   make demo     quantizes the bundled DiT; writes demo_output/comparison.png and demo_output/report.json
#   make test     the test suite; host tests run where a ComfyUI is found (COMFYUI_PATH, or ~/ComfyUI)
#   make check    linter, formatter, type checker
#   make oldest-triton    brings a second Triton, which `make test` then compiles the kernels with, too (Linux)
#
# Without make, and on Windows:
#
#   python -m venv .venv
#   .venv\Scripts\activate                     (Linux, macOS: . .venv/bin/activate)
#   python -m pip install torch==2.13.0
#   python -m pip install -e .[test]
#   python -m dit_quant.demo                   (make demo)
#   python -m pytest -n 2 --dist loadfile      (make test)
#
# On Linux, PyPI's torch brings CUDA along. The CPU build is smaller and does for all of this:
#
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
# processes that test side by side; each may start a host of its own, of 2 GB
WORKERS ?= 2
# pinned for .venv only: no requirement of the pack itself names torch
TORCH ?= torch==2.13.0

# threads that spin while they wait are 20 times slower when other programs want the cores
export OMP_WAIT_POLICY ?= PASSIVE
# compiled C and tuning results
export DIT_QUANT_CACHE ?= $(CURDIR)/.venv/cache
# the oldest Triton that the kernels take, where `make oldest-triton` has brought it
export DIT_QUANT_OLDEST_TRITON ?= $(wildcard $(CURDIR)/.venv/oldest-triton)

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: demo test check oldest-triton clean

demo: .venv/installed
	$(BIN)/python -m dit_quant.demo

test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

oldest-triton: .venv/oldest-triton

clean:
	rm -rf .venv demo_output build *.egg-info

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) $(TORCH)
	$(INSTALL) -e '.[test]'
	touch $@

# the extra brings node as a wheel, so that pyright downloads nothing when it runs
.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[dev]' 'pyright[nodejs]'
	touch $@

.venv/oldest-triton: .venv/installed
	$(INSTALL) --no-deps --target $@ triton==3.4.0
