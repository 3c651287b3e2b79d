# Needs Python 3.11 or newer. Everything else is installed into .venv from the hash-locked requirements.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check lint format bench guard chaos kafka lock configuration docs sbom clean

## Stream transactions through all services on this machine. Options: make demo ARGS="--broker embedded"
demo: $(VENV)/.ready
	@$(BIN)/fraudctl demo --transactions 3000 --rate 500 $(ARGS)

# Python writes bytecode even where the environment forbids it: services start some hundred times.
export PYTHONDONTWRITEBYTECODE :=

## Run all tests, five at a time because they spend much time waiting. Branch coverage must be at least 90 %.
## To run only some, without the coverage limit: make test ARGS="-k records -x"
test: $(VENV)/.ready
	@rm -rf build/coverage
	@$(BIN)/coverage run -m pytest -n 5 --dist loadgroup --no-loadscope-reorder $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report $(if $(ARGS),--fail-under 0)

## Quick check (1 minute): lint, types, import rules, and the tests that start no server
check: lint
	@$(BIN)/python -m pytest -q -n 3 --dist loadgroup --no-loadscope-reorder -m "not server" $(ARGS)

lint: $(VENV)/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m scripts.wording

format: $(VENV)/.ready
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

## Run the benchmarks (1 hour). Options: make bench ARGS="sink latency --rounds 3"
bench: $(VENV)/.ready
	@$(BIN)/python -m benchmarks --report build/bench.json $(ARGS)

## Check the performance ratios that CI guards (1 minute)
guard: $(VENV)/.ready
	@$(BIN)/python -m benchmarks --guard --rounds 3

## Run the fault campaign (45 minutes). Options: make chaos ARGS="--scenario everything --seed 7"
chaos: $(VENV)/.ready
	@mkdir -p build
	@$(BIN)/fraudctl chaos --report build/chaos.json $(ARGS)

## Fetch Apache Kafka's jars once (needs Java 17 and Maven)
kafka: $(VENV)/.ready
	@$(BIN)/python -m sandbox.apache

## Upgrade the locked dependencies of the checkout and of each image. To lock without upgrades: python -m scripts.lock
lock: $(VENV)/.ready
	@$(BIN)/python -m scripts.lock --upgrade

## Regenerate docs/configuration.md from the settings classes
configuration: $(VENV)/.ready
	@$(BIN)/python -m scripts.configuration

## Build the documentation site; open build/site/index.html
docs: $(VENV)/.ready
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

## Write the software bill of materials of each image (CycloneDX, in build/sbom), and a list of licences
sbom: $(VENV)/.ready
	@$(BIN)/python -m scripts.sbom

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info

# pip installs only uv, at the locked version and hash. uv then installs the rest, in seconds if its cache is warm.
$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -m venv --clear $(VENV)
	@awk '/^[^ ]/ {wanted = /^uv==/} wanted' requirements.txt > $(VENV)/uv.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
