# Every target works on a bare clone: the first one that needs it creates .venv and installs with constraints.txt, and a
# stamp keeps that from being repeated until setup.cfg or constraints.txt change.
#
# An environment of your own: make PYTHON=/path/to/python TARGET. It is used as it is; nothing is created or installed.
# Another interpreter for .venv: make BASE_PYTHON=python3.12 TARGET.

BASE_PYTHON ?= python3
VENV := .venv
CPUS := $(shell $(BASE_PYTHON) -c 'import os; print(os.cpu_count() or 1)' 2>/dev/null || echo 1)
# Workers of the test run, one thread each: two workers finish sooner than one worker with two threads.
TEST_WORKERS ?= $(shell [ $(CPUS) -gt 1 ] && echo 2 || echo 0)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

ifdef PYTHON
RUNTIME :=
TESTING :=
else
override PYTHON := $(VENV)/bin/python
RUNTIME := $(VENV)/.installed
TESTING := $(VENV)/.installed-test
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench assets clean

help:  ## what can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-8s %s\n' "$$name" "$$text"; done

$(VENV)/bin/python:
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "mmalign needs Python 3.11 or newer, and '$(BASE_PYTHON)' is older or missing: make BASE_PYTHON=python3.12 ..." >&2; exit 2; }
	$(BASE_PYTHON) -m venv $(VENV)

# The first installation downloads torch and takes a few minutes; pip shows how far it is.
$(VENV)/.installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: setup.cfg constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed

demo: $(RUNTIME)  ## align the embedded model, compare it with its base, write runs/demo/report.html (about 4 minutes)
	$(PYTHON) -m mmalign demo --out runs/demo

# A worker takes whole files, whose fixtures are shared, in the order that tests/conftest.py gives them.
test: $(TESTING)  ## the whole test suite
	$(ONE_THREAD) $(PYTHON) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(TESTING)  ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

bench: $(RUNTIME)  ## training throughput against a plain implementation of the same step
	$(PYTHON) benchmarks/diffusion_dpo.py

# Two recipes at a time, one thread each. Intermediate files lie in build/assets. Times are for one thread of a 2-core machine.
RECIPE := $(ONE_THREAD) $(PYTHON) scripts/assets
define side_by_side
	$(RECIPE)/$(1) & first=$$!; $(RECIPE)/$(2) & second=$$!; \
	wait $$first; one=$$?; wait $$second; two=$$?; [ $$one -eq 0 ] && [ $$two -eq 0 ]
endef

assets: $(RUNTIME)  ## retrain everything under assets/ from seeds (about 110 minutes on 2 cores)
	@echo "expected: VAE 27 min beside CLIP 17 + 16 min, generator 45 min, candidates 10 min, rewards 8 min, vision-language models 30 min; about 110 min in all"
	mkdir -p build/assets
	$(RECIPE)/tokenizer.py
	$(RECIPE)/prompts.py
	$(RECIPE)/domains.py
	$(RECIPE)/vae.py & vae=$$!; \
	{ $(RECIPE)/clip.py tiny-clip && $(RECIPE)/clip.py tiny-judge; } & clips=$$!; \
	wait $$vae; one=$$?; wait $$clips; two=$$?; [ $$one -eq 0 ] && [ $$two -eq 0 ]
	$(RECIPE)/unet.py
	$(call side_by_side,candidates.py reward,candidates.py judge)
	$(call side_by_side,candidates.py agreement,candidates.py demo)
	$(call side_by_side,reward.py tiny-clip,reward.py tiny-judge)
	$(call side_by_side,tiny_vlm.py,tiny_cxr_vlm.py)
	$(RECIPE)/tiny_video_vlm.py

clean:  ## remove caches and build products, intermediates of 'make assets' included (keeps .venv and runs/)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find mmalign scripts tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
