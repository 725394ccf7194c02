# Everything here works on a fresh machine with Python 3.11 or later, make and git.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/installed ## make .venv with the pinned dependencies and this project

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install ## from real images to a registered model, in ./demo
	$(BIN)/vlae demo

test: lint ## lint, types, and all tests
	$(BIN)/pytest

faults: install ## break storage in every way and show that no byte is lost
	$(BIN)/python -m tests.faults

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what the demo made
	rm -rf demo outputs

.PHONY: help install demo test faults lint clean
