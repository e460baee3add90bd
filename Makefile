# Everything runs from a virtual environment of the project's own: a Python of 3.11 or later, make and a package index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup check format imports test demo bench compare chaos chaos-quick sim sim-full semantic load helm-lint clean

setup: .venv/.ready

.venv/.ready: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not there; name a Python >= 3.11 with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python >= 3.11 is needed"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

imports: setup
	$(BIN)/lint-imports

check: setup ## format, lint, types, imports, the decisions' tests: under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n auto tests/core

test: setup ## everything; what CI runs
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

demo: setup
	$(BIN)/gpu-balancer demo

bench: setup
	$(BIN)/python -m loadtest.bench

compare: setup ## policies over HTTP in front of eight fake nodes, and in the simulator: about seven minutes
	$(BIN)/python -m loadtest.compare

chaos: setup ## every promise against a running balancer whose nodes break, three times: about 20 minutes
	$(BIN)/python -m loadtest.chaos

chaos-quick: setup ## the quick trials once: about a minute
	$(BIN)/python -m loadtest.chaos --quick

sim: setup ## the standard table of the simulator: every policy on every row, with its bounds
	$(BIN)/python -m loadtest.sim.standard

sim-full: setup ## everything, on whole traces: make sim-full MOONCAKE=FILE CONV=FILE CODE=FILE
	$(BIN)/python -m loadtest.sim.standard --full $(if $(MOONCAKE),--mooncake $(MOONCAKE)) \
		$(if $(CONV),--conv $(CONV)) $(if $(CODE),--code $(CODE))

semantic: setup ## quality of the semantic cache: make semantic DATA=FOLDER MODEL_DIR=FOLDER
	$(BIN)/python -m loadtest.semantic_quality $(DATA) $(if $(MODEL_DIR),--model-dir $(MODEL_DIR))

load: setup ## locust against a running balancer: make load HOST=http://127.0.0.1:8080
	$(BIN)/locust -f loadtest/locustfile.py --headless --host $(or $(HOST),http://127.0.0.1:8080) \
		--users $(or $(USERS),20) --run-time $(or $(TIME),1m)

helm-lint: setup
	$(BIN)/python -m pytest -q tests/helm

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis bench-results .parts
