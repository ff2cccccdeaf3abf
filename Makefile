# Each target does its own set-up: a virtual environment in .venv with the project in it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: run test lint docs leaderboard protocols all-tests clean

run: $(READY)
	@$(BIN)/python -m clbench

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not gpu and not network"

# Tunes here, evaluates there, four boards; started again it only does what is missing.
RESULTS ?= results
BENCHMARK := OMP_NUM_THREADS=1 $(BIN)/python -m clbench -m phase=benchmark budget=small workers=2 \
  references=true results_dir=$(RESULTS)
GLYPHS := scenario=glyphs backbone=convnet scenario.n_experiences=5 scenario.n_classes=20 \
  scenario.train_per_class=40 scenario.epochs=10 scenario.batch_size=10 scenario.memory_size=100

leaderboard: $(READY)
	$(BENCHMARK) scenario=digits strategy=replay,derpp,er_ace,icarl,ewc,lwf
	$(BENCHMARK) $(GLYPHS) strategy=replay,derpp,er_ace
	$(BENCHMARK) scenario=digits_c scenario.held_out=0.1 strategy=tent,eata,lame
	$(BENCHMARK) scenario=string_instructions scenario.per_task=60 scenario.epochs=5 \
	  scenario.tests_per_task=20 scenario.base_tests_per_task=10 strategy=replay,ewc,hft
	$(BIN)/python -m clbench phase=report results_dir=$(RESULTS)

# The same strategies tuned on what is reported, as is common, beside those tuned on other data.
protocols: $(READY)
	$(BENCHMARK) $(GLYPHS) strategy=replay,derpp,er_ace,ewc,lwf,icarl,si
	$(BENCHMARK) $(GLYPHS) strategy=replay,derpp,er_ace,ewc,lwf,icarl,si protocol=conventional
	$(BIN)/python -m clbench phase=report results_dir=$(RESULTS)

all-tests: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html"

clean:
	rm -rf .venv site

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "clbench needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up .venv, once; PyTorch is large, so this takes some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
