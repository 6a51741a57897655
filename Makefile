# Two commands do everything on a fresh machine: make demo, make test.
# What setting up means is in tools/setup_environment.py; it does nothing when nothing has changed.

SHELL := /bin/bash
BIN := .venv/bin
PYTEST_FLAGS ?=
# Empty is off. Without bytecode every test process, and every process of their clusters, compiles all it imports.
export PYTHONDONTWRITEBYTECODE :=
# Tests wait for engines more than they compute. Each process may hold a pair of real engines, 2.5 GB.
TEST_PROCESSES ?= 3

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-again tools-test coverage faults compose-test lint deploy-lint packages docs sbom protos clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## create or update .venv, CPU engine included
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        exec "$$python" tools/setup_environment.py; \
	    fi; \
	done; \
	echo "Python 3.11 or newer with its venv module is needed; name one with PYTHON=..." >&2; exit 1

demo: setup ## start a cluster, stream an answer through it, stop it
	@$(BIN)/tandem demo

# The same order of parametrized tests in every process, whatever their sets are hashed with.
check: lint ## before a commit: lint, types and unit tests, on all cores
	PYTHONHASHSEED=0 $(BIN)/python -m pytest tests/unit -q -n auto --dist loadfile $(PYTEST_FLAGS)

# All examples of every property; check runs a quarter of them.
test: setup ## every test, in TEST_PROCESSES (3; 0: one after another)
	@HYPOTHESIS_EXAMPLES=full PYTHONHASHSEED=0 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_FLAGS)

test-again: setup ## the files in which a test of the last run failed, alone; CI does this once
	@HYPOTHESIS_EXAMPLES=full PYTHONHASHSEED=0 $(BIN)/python tools/rerun_failed.py

tools-test: setup ## other projects' tools and coding agents, as they come; installed into .cache the first time
	@$(BIN)/python -m pytest tests/other_tools -m '' $(PYTEST_FLAGS)

coverage: setup ## line coverage of the unit, wire and contract tests; fails below the floor in pyproject.toml
	@$(BIN)/python -m coverage run -m pytest tests/unit tests/wire tests/contract -q $(PYTEST_FLAGS)
	@$(BIN)/python -m coverage report

faults: setup ## break everything that can break, with a line of measurements for each scenario
	@$(BIN)/python -m pytest tests/faults -m '' $(PYTEST_FLAGS)

compose-test: setup ## build the images, run docker-compose.yml, break it (ENGINE=debian: install and start an engine)
	@$(BIN)/python -m tests.compose $(if $(filter debian,$(ENGINE)),--debian-engine) $(COMPOSE_FLAGS)

lint: setup ## ruff, mypy, drift of what is generated, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/gen_protos.py --check
	$(BIN)/python tools/gen_metrics_page.py --check
	$(BIN)/python tools/gen_settings_page.py --check
	$(BIN)/python tools/gen_contracts_page.py --check
	$(BIN)/python tools/gen_dashboards.py --check
	$(BIN)/python tools/gen_prometheus_rule.py --check
	$(BIN)/python tools/gen_helm_chart.py --check
	$(BIN)/python tools/gen_protos.py --lint

deploy-lint: setup ## the deployment files against other tools' checkers, installed into .cache
	@$(BIN)/python tools/check_deployments.py

packages: setup ## dist/: sdist and wheel, checked by twine and tried in an empty directory
	@$(BIN)/python tools/build_packages.py $(PACKAGES_FLAGS)

docs: setup ## the documentation as a site, in .cache/docs-site/site; a broken link fails
	@$(BIN)/python tools/build_docs_site.py

sbom: setup ## sbom.json: a CycloneDX bill of materials of .venv
	@$(BIN)/python tools/write_sbom.py

protos: setup ## generate src/tandem/api and docs/reference/contracts.md from protos/
	$(BIN)/python tools/gen_protos.py
	$(BIN)/python tools/gen_contracts_page.py

clean: ## remove the environment, caches and run-time files
	rm -rf .venv .cache .tandem .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build dist
