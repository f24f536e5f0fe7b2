# Each target does all of its own set-up: an environment in .venv with exactly what requirements.lock names.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test format lock compat bench soak clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n auto --dist loadfile

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolves the newest releases that pyproject.toml allows, once for Python 3.11 to 3.13 and every platform.
lock: .venv/installed
	$(BIN)/uv pip compile pyproject.toml --extra hermes --group dev --universal --upgrade --generate-hashes --no-emit-index-url \
		--no-annotate --custom-compile-command "make lock" --quiet --output-file requirements.lock

# Proves every supported pair of hermes-agent and atroposlib, and writes the table in compat/README.md.
compat: .venv/installed
	$(BIN)/python compat/check.py --all

# The short forms; without --short each script takes minutes and prints the figures that count.
bench: .venv/installed
	for script in $(filter-out benchmarks/soak.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script --short || exit 1; done

soak: .venv/installed
	$(BIN)/python benchmarks/soak.py --short

clean:
	rm -rf .venv build

# Rebuilt from nothing when the lock changes, so that what is installed is what is locked. Python compiles what it
# imports anyway: --no-compile saves the third of the time that compiling the rest takes.
.venv/locked: requirements.lock
	$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		--require-hashes --requirement requirements.lock
	touch $@

.venv/installed: .venv/locked pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
