# Each target does all of its own set-up: an environment in .venv with exactly what requirements.lock names.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# Python may keep what it compiles: a process that imports Hermes starts in half the time, and the tests start many.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo learn learn-short trl test test-newest format lock compat engines hermes-tests hermes-cli bench soak clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

# The model of the demo learns its errands: engine, environment, Atropos' API and trainer, each a process. Stopped, it
# goes on where it was.
learn: build/learn/installed
	build/learn/bin/python examples/learn/learn.py build/runs/learn

learn-short: build/learn/installed
	rm -rf build/runs/short
	build/learn/bin/python examples/learn/learn.py build/runs/short --short

# The same errands with TRL's trainer, in one process.
trl: build/trl/installed
	build/trl/bin/python examples/trl/train.py build/runs/trl

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n auto --dist loadfile

# What leans on Hermes, on the newest release that was tried: a fork on PyPI stands in for upstream's checkout.
test-newest: build/newest/installed
	build/newest/bin/pytest -n auto --dist loadfile tests/test_agent*.py tests/test_sandbox*.py \
		tests/test_seams.py tests/test_sockets.py tests/test_tools.py tests/test_wall*.py tests/test_verifiers.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolves the newest releases that pyproject.toml allows, once for Python 3.11 to 3.13 and every platform.
lock: .venv/installed
	$(BIN)/uv pip compile pyproject.toml --extra hermes --group dev --universal --upgrade --generate-hashes --no-emit-index-url \
		--no-annotate --custom-compile-command "make lock" --quiet --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml compat/newest.in --group dev --universal --upgrade --generate-hashes --no-emit-index-url \
		--no-annotate --custom-compile-command "make lock" --quiet --output-file compat/newest.lock

# Proves every supported pair of hermes-agent and atroposlib, and other agents on the proxy, and writes the tables in compat.
compat: .venv/installed
	$(BIN)/python compat/check.py --all
	$(BIN)/python compat/harnesses.py

# Hermes' own tests, with our class in place of Hermes': CHECKOUT is a clone at the tag of the release in .venv.
hermes-tests: .venv/installed
	$(BIN)/python compat/hermes_tests.py $(CHECKOUT)

# Hermes' interactive command line, stock beside ours, in pseudo-terminals. Its times are those of people at a prompt: on
# a machine with much else to do it fails.
hermes-cli: .venv/installed
	$(BIN)/pytest tests/interactive.py

# Serves a tiny model with vLLM and SGLang on the CPU, recomputes every sampled logprob, and writes docs/engines.md.
engines: .venv/installed
	$(BIN)/python compat/engines/prove.py

# The short forms; without --short each script takes minutes and prints the figures that count.
bench: .venv/installed
	for script in $(filter-out benchmarks/soak.py benchmarks/endurance.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script --short || exit 1; done

# Many rollouts at once under one fault after the other, and under all of them at random. Without --short the second
# takes half an hour.
soak: .venv/installed
	$(BIN)/python benchmarks/soak.py --short
	$(BIN)/python benchmarks/endurance.py --short

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

build/newest/locked: compat/newest.lock
	$(PYTHON) -m venv --clear build/newest
	build/newest/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		--require-hashes --requirement compat/newest.lock
	touch $@

build/newest/installed: build/newest/locked pyproject.toml
	build/newest/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# PyTorch by itself: the lock is for every platform, and its builds are many.
build/learn/locked build/trl/locked: build/%/locked: requirements.lock examples/%/requirements.txt
	$(PYTHON) -m venv --clear build/$*
	build/$*/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		--require-hashes --requirement requirements.lock
	build/$*/bin/pip install --quiet --disable-pip-version-check --requirement examples/$*/requirements.txt
	touch $@

build/learn/installed build/trl/installed: build/%/installed: build/%/locked pyproject.toml
	build/$*/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

.venv/installed: .venv/locked pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
