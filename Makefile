# `make demo` and `make test` do all their own set-up: they need Python >= 3.10, make and pip.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SHELL := bash

# What the API reference shows; the command line is described by its own --help.
API := tpvprune tpvprune.groups tpvprune.scores.baselines tpvprune.widths.latency tpvprune.widths.latency_file \
  tpvprune.weights.scores tpvprune.weights.masks tpvprune.weights.repair tpvprune.weights.pruning \
  tpvprune.passes.batches tpvprune.images.sources tpvprune.images.preprocessing \
  tpvprune.images.augmentation tpvprune.saved.models tpvprune.diagnostics tpvprune.cifar_resnet

.PHONY: help demo test test-long lint docs clean

help:
	@echo "make demo   prune a small model on real images, offline; the report lands in demo-output/"
	@echo "make test   run the tests"
	@echo "make test-long  those that take seconds each: processes, whole commands"
	@echo "make lint   run ruff and mypy"
	@echo "make docs   build the API reference from the docstrings, into site/"
	@echo "make clean  remove the virtual environment, caches and the demo's output"
	@echo "PYTHON=/path/to/python3 chooses the interpreter (3.10 or newer)"

demo: $(STAMP)
	$(RUN) -m tpvprune demo --output demo-output --overwrite

# One thread per worker: two libraries that both use all cores slow each other down many times over.
# One worker per file: what the tests of a file share is made once.
TEST = OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: $(STAMP)
	$(TEST)

test-long: $(STAMP)
	$(TEST) -m 'long and not slow'

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs: $(STAMP)
	$(RUN) -m pdoc --docformat google --math --output-directory site $(API)

# The stamp is written last: an interrupted installation leaves none and is taken up again.
# Debian's Python comes without ensurepip; the second venv line then borrows the system's pip.
$(STAMP): pyproject.toml Makefile
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "No $(PYTHON) found: install Python 3.10 or newer, or say 'make PYTHON=/path/to/python3'." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
	  "Python >= 3.10 is needed, $(PYTHON) is %d.%d: say make PYTHON=/path/to/python3" % (v[0], v[1]))'
	@rm -f $@
	@echo "[1/2] virtual environment in $(VENV)"
	@"$(PYTHON)" -m venv $(VENV) >/dev/null || { \
	  "$(PYTHON)" -m venv --without-pip $(VENV) && \
	  $(RUN) "$$("$(PYTHON)" -c 'import pip; print(*pip.__path__)')" install --quiet --ignore-installed pip; }
	@echo "[2/2] tpvprune and its dependencies (torch is large: minutes the first time)"
	@set -o pipefail; $(RUN) -m pip install --disable-pip-version-check --editable '.[dev]' | \
	  while IFS= read -r line; do case $$line in \
	    *[Dd]ownloading*[MG]B* | *"Using cached"*[MG]B*) echo "  $${line##*/}" ;; \
	    Installing* | Successfully*) echo "  $${line:0:76}..." ;; \
	  esac; done
	@touch $@

clean:
	rm -rf $(VENV) demo-output site .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
