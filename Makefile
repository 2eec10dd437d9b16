# Two commands for a new machine: `make demo` and `make test`. The first use creates .venv and installs everything.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: demo test slow-test lint mini help
.DEFAULT_GOAL := help

help:       ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*##/:/'

demo: $(STAMP)       ## train on rendered hands: no download, no GPU, minutes; ARGS="KEY=VALUE ..." overrides the config
	$(PY) script/stage1.py --config-name=stage1-demo $(ARGS)

test: $(STAMP)       ## run the tests
	$(PY) -m pytest

slow-test: $(STAMP)  ## run the slow tests
	$(PY) -m pytest -m slow

lint: $(STAMP)       ## check style with ruff
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

mini: $(STAMP)       ## retrain model/mini and model/hand-mini: hours on two cores; repeat to resume
	$(PY) script/stage1.py --config-name=stage1-mini GENERAL.output_root=checkpoint/mini GENERAL.resume_path=auto $(ARGS)
	RUN=$$(ls -d checkpoint/mini/20*/*_stage1-mini | tail -n 1) && \
	$(PY) script/export.py $$RUN --to backbone --output model/mini --overwrite && \
	$(PY) script/export.py $$RUN --to checkpoint --precision fp16 --output model/hand-mini --overwrite

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 13) and f"Python 3.10 to 3.13 is required, but {sys.executable} is {v[0]}.{v[1]}; use another: make PYTHON=python3.12 ...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV), once; this takes a few minutes."
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
