# Everything here works on a fresh machine with Python 3.11 or later, make and git.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/installed ## make .venv with the pinned dependencies and this project

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install ## from real images to a registered model, in ./demo
	$(BIN)/vlae demo

search-demo: install ## a search for the trade-off of rate and distortion, its report and three models, in ./search-demo
	$(BIN)/vlae demo folder=search-demo search=map train=brief register_best=3 bounds.samples=16

test: lint ## lint, types, and all tests
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

faults: install ## break storage, kill servers and cut off hosts, and show that nothing is lost
	$(BIN)/python -m tests.faults

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what the demos made
	rm -rf demo search-demo outputs

.PHONY: help install demo search-demo test faults lint clean
