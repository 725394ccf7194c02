# All targets work on a fresh machine with Python 3.11 or later, make and git.
PYTHON ?= python3
BIN := .venv/bin
# Every file that pip downloads is held to a hash. PyTorch's CUDA build, unlike its CPU build, needs
# the packages of constraints-cuda.txt; `pip check` tells which it is.
INSTALL = $(BIN)/pip install --quiet --no-deps --no-build-isolation --require-hashes

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/installed ## create .venv with the pinned dependencies and this project

.venv/installed: pyproject.toml $(wildcard constraints*.txt)
	$(PYTHON) -m venv .venv
	$(INSTALL) -r constraints-build.txt
	$(INSTALL) -r constraints.txt -r constraints-dev.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/pip check > /dev/null || $(INSTALL) -r constraints-cuda.txt
	$(BIN)/pip check
	touch $@

demo: install ## take real images to a registered model, in ./demo
	$(BIN)/vlae demo

search-demo: install ## search for the trade-off of rate and distortion, in ./search-demo
	$(BIN)/vlae demo folder=search-demo search=map train=brief register_best=3 bounds.samples=16

test: lint ## run lint and all tests
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

faults: install ## break storage, kill servers, cut off hosts; check that nothing is lost
	$(BIN)/python -m tests.faults

SEED ?= 1
MINUTES ?= 10

chaos: install ## draw faults from SEED (or several), for MINUTES, over run, search and registration
	$(BIN)/python -m tests.faults.chaos $(MINUTES) $(SEED)

lint: install ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: install ## build the documentation as a site, without a network; open build/docs/index.html
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs
	@echo "open build/docs/index.html"

dist: install ## build the wheel and the sdist in ./dist, and check them
	rm -rf build dist vlae_pipeline.egg-info
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/venv
	build/venv/bin/pip install --quiet --no-deps dist/*.whl
	build/venv/bin/python -I tests/distribution.py

lock: ## resolve the dependencies again, and write the hashes of their files; needs .venv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python infra/lock.py

# Where PyPI's interface is out of reach, as behind a mirror, pip-audit would say of the first
# package that it does not exist.
ADVISORIES = https://pypi.org/pypi/pip/24.0/json

audit: install ## look up known vulnerabilities of the dependencies; fails if PyPI cannot tell
	@$(BIN)/python -c 'import requests; requests.get("$(ADVISORIES)", timeout=60).json()["vulnerabilities"]' \
		2> /dev/null || { echo "nothing was audited: PyPI's database of vulnerabilities cannot be" \
		"reached ($(ADVISORIES))" >&2; exit 1; }
	$(BIN)/uvx pip-audit@2.10.1 --strict --require-hashes --disable-pip --requirement constraints.txt

sbom: install ## list what the wheel needs, as CycloneDX, in ./dist
	mkdir -p dist
	$(BIN)/uvx --from cyclonedx-bom==7.5.0 cyclonedx-py requirements --pyproject pyproject.toml \
		--output-reproducible --output-file dist/sbom.cdx.json constraints.txt

clean: ## remove what the demos, `make docs` and `make dist` created
	rm -rf demo search-demo outputs build dist docs/generated

.PHONY: help install demo search-demo test faults chaos lint docs dist lock audit sbom clean
