# Everything is installed into .venv, on first use and again when pyproject.toml or constraints.txt change.
#   make demo [OUT=folder]    train a small LoRA on the bundled model and draw a contact sheet
#   make test | test-slow     the quick tests | those that take minutes
#   make test-chaos           kill and starve a job everywhere: minutes
#   make soak                 2,000 jobs in one process, and what of them stays
#   make fuzz                 hostile input: over 200,000 random cases, in about half an hour
#   make lint | format        check the style | apply it
PYTHON ?= python3
VENV ?= .venv
# A process a core; each takes over what another has not come to.
PARALLEL ?= -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo test test-slow test-chaos soak fuzz lint format
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(VENV)/bin/lora-trainer demo $(if $(OUT),--out "$(OUT)")

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "not slow and not gpu and not chaos"

test-slow: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -m "slow and not gpu and not chaos and not soak"

test-chaos: $(VENV)/.ready
	$(VENV)/bin/python -m pytest tests/chaos -m ""

soak: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -m soak -s tests/soak

# `make test` runs the same properties with few cases, always the same ones.
fuzz: $(VENV)/.ready
	FUZZ_TIMES=72 $(VENV)/bin/python -m pytest tests/fuzz

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The tested versions need Python 3.11; on 3.10 pip takes the newest that still support it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(VENV)/bin/pip || $(PYTHON) -c 'import sys; (3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	    "LoRA Trainer needs Python 3.10 to 3.13, but $(PYTHON) is %d.%d: try make PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e ".[tensorboard,test]" \
	    $$($(VENV)/bin/python -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')
	@touch $@
