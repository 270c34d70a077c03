# make demo: install and hear the codec; make test: install everything and run the tests;
# make test-fast: the tests that are not slow, on all cores;
# make docs: the documentation with the API reference, in site/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Bytecode as pip makes it: without, each start of the program compiles all that it imports.
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

.PHONY: demo test test-fast lint docs clean

demo: $(VENV)/.core
	@mkdir -p demo
	$(BIN)/vpcodec encode tests/resources/speech.wav -o demo/speech.tok
	$(BIN)/vpcodec decode demo/speech.tok -o demo/speech.wav
	$(BIN)/vpcodec info demo/speech.tok
	@ls -l tests/resources/speech.wav demo/speech.tok demo/speech.wav
	@echo "listen to demo/speech.wav; the original is tests/resources/speech.wav"
	@echo "vpcodec is in $(BIN): call $(BIN)/vpcodec, or put it on the PATH: source $(BIN)/activate"

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n auto --dist loadfile

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/python docs/make_metrics.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/bin/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv

$(VENV)/.core: pyproject.toml | $(VENV)/bin/uv
	$(UV) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/uv
	$(UV) --editable ".[train,score,corpus,lm,dev]"
	@touch $@ $(VENV)/.core

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/uv
	$(UV) --editable ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) demo build dist site
