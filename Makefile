# Needs Python 3.11 or newer and make. Everything else is installed into .venv from the hash-locked requirements.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check lint format bench guard chaos kafka lock configuration docs sbom clean

## A stream of transactions through everything, on this machine. Options: make demo ARGS="--broker embedded"
demo: $(VENV)/.ready
	@$(BIN)/fraudctl demo --transactions 3000 --rate 500 $(ARGS)

## The whole suite, four tests at a time since they wait a lot; it covers at least 90 % of the branches.
## A part of it: make test ARGS="-k records -x", of which no coverage is asked
test: $(VENV)/.ready
	@rm -rf build/coverage
	@$(BIN)/coverage run -m pytest -n 4 --dist loadgroup --no-loadscope-reorder $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report $(if $(ARGS),--fail-under 0)

## The inner loop, a minute: lint, types, import rules, and the tests that start no server
check: lint
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder -m "not server" $(ARGS)

lint: $(VENV)/.ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m scripts.wording

format: $(VENV)/.ready
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

## Ratios to the limits of the parts and to other ways, an hour. Options: make bench ARGS="sink latency --rounds 3"
bench: $(VENV)/.ready
	@$(BIN)/python -m benchmarks --report build/bench.json $(ARGS)

## The ratios that CI looks after, in a minute
guard: $(VENV)/.ready
	@$(BIN)/python -m benchmarks --guard --rounds 3

## The fault campaign, three quarters of an hour. Options: make chaos ARGS="--scenario everything --seed 7"
chaos: $(VENV)/.ready
	@mkdir -p build
	@$(BIN)/fraudctl chaos --report build/chaos.json $(ARGS)

## Fetch Apache Kafka's jars once (needs Java 17 and Maven)
kafka: $(VENV)/.ready
	@$(BIN)/python -m sandbox.apache

## Upgrade the locked dependencies: one lock for a checkout, one for each image. Without upgrades: python -m scripts.lock
lock: $(VENV)/.ready
	@$(BIN)/python -m scripts.lock --upgrade

## Write docs/configuration.md anew, from the settings classes
configuration: $(VENV)/.ready
	@$(BIN)/python -m scripts.configuration

## Build the documentation as a site in build/site; open build/site/index.html
docs: $(VENV)/.ready
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

## What each image is made of: CycloneDX in build/sbom, and a list of licences
sbom: $(VENV)/.ready
	@$(BIN)/python -m scripts.sbom

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info

# uv comes from the lock as well, by pip and with its hash; it installs the rest in seconds from a warm cache.
$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -m venv --clear $(VENV)
	@awk '/^[^ ]/ {wanted = /^uv==/} wanted' requirements.txt > $(VENV)/uv.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
