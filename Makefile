# The workshop. Every verb sets up what it needs; Python 3.11, make and git are all a machine must have.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RUN    ?= runs/demo
TRITON ?= 3.9.0
GPU_PYTHON ?= python3
PEERS  := xlstm==2.0.6 mlstm_kernels==2.0.6 einops==0.8.2 omegaconf==2.4.0 dacite==1.9.2 xllamacpp==2026.10.11549

.PHONY: demo test check bench gpu triton docs setup format clean

setup: $(READY)

# torch is installed alone and pinned: asked for as somebody's dependency, it brings gigabytes of GPU libraries.
$(READY): pyproject.toml constraints.txt setup.py $(wildcard openxlstm/kernels/cpu/csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "needs $(PYTHON); or name yours: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# The other implementations of xLSTM, for comparison only. Without their dependencies: those would bring compilers.
$(VENV)/.peers: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(PEERS)
	touch $@

## demo: train a small xLSTM on the Python library's source (at most 5 minutes), sample from it, write a report
demo: $(READY)
	$(BIN)/xlstm train openxlstm/recipes/stdlib-demo.toml --out $(RUN)
	$(BIN)/xlstm generate $(RUN) --prompt 'def ' --max-tokens 300 --temperature 0.7 --seed 1
	@echo; echo "The report: $(RUN)/report.md"

## check: the gate before every commit, about five minutes on two cores
check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 -m 'not compile and not slow'

## test: everything a machine without an accelerator can prove
test: $(VENV)/.peers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --durations=10
	$(BIN)/pytest -q -m compile -o addopts=--import-mode=importlib

## bench: speed beside the installed peers, into docs/performance.md; prints no number while parity is red
bench: $(VENV)/.peers
	$(BIN)/xlstm bench --write docs/performance.md

## gpu: parity on a GPU, then speed beside the importable peers; in the Python that has torch for that GPU, nothing installed
gpu:
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) -m openxlstm.bench.gpu --write docs/performance.md $(GPU_OPTIONS)

## triton: the kernels' tests with another Triton: make triton TRITON=3.6.0
triton: $(READY)
	$(BIN)/python tests/kernels/triton/with_version.py $(TRITON)

## docs: every command and every example in README and docs is executed
docs: $(READY)
	$(BIN)/pytest -q tests/test_docs.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs build *.egg-info
