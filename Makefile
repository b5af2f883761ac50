# make demo    install the run-time packages, teach two concepts on the embedded model, paint them
# make test    install the test packages, too, and run every test
# make check   lint, types, words, dependencies, documentation
# make soak    the long versions of the tests: hours
# make audit   dependencies against PyPI's advisories; needs the network
# Needs Python 3.11+ and make. PYTHON=... chooses the interpreter.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev
TORCH  := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: setup browser demo test test-fast controls numeric soak check audit bench clean

setup: $(DEV)

# Run-time packages, in the tested versions. Where there is no GPU, the CPU build of torch comes first, so that no
# CUDA packages are fetched.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Minikin needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 " + "$(MAKECMDGOALS)")'
	@echo "Installing the run-time packages into $(VENV) (about 1 GB; a minute or two)."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@TORCH=$(TORCH) BIN=$(BIN) sh tools/install-torch.sh
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $(READY)

# All extras, the tests' tools and the documentation's.
$(DEV): $(READY)
	@echo "Installing the test packages into $(VENV)."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(DEV)

# The page is tried in Debian's Chromium. Where it may not be installed, those tests say that they were skipped.
browser:
	@command -v chromium >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 \
		&& apt-get update -qq >/dev/null 2>&1 && apt-get install -qq -y --no-install-recommends chromium >/dev/null 2>&1; } \
		|| echo "Chromium is not here and was not installed: the page's browser tests will be skipped."

demo: $(READY)
	@$(BIN)/minikin demo --out demo

# Two workers of one thread each; a whole file goes to one worker.
test: setup browser
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations=20

# Tests of the tests: a bug is planted, and the test that should find it must fail.
controls: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m controls

# What claims equality to the bit, as a processor without AVX-512 and AMX computes it: with one thread, and with two.
OLD_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2
numeric: setup
	$(OLD_CPU) $(BIN)/python -m pytest -m numeric -n 2 --dist loadgroup
	$(OLD_CPU) OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m numeric

test-fast: setup
	$(BIN)/python -m pytest -m 'not slow'

# the page's scripts have their types in comments
TYPESCRIPT := typescript@7.0.2
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/words.py
	$(BIN)/python tools/audit.py
	@if command -v npx >/dev/null 2>&1; then echo "tsc -p ."; npx --yes --package $(TYPESCRIPT) tsc -p .; \
		else echo "Node.js is not here: the types of the page's scripts were not checked."; fi
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# 2,000,000 damaged concept files, 300 kills, overload and fairness of the server, an hour of fuzzing
soak: setup
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	for target in concept_file prompt parameters; do \
	  $(BIN)/python -m fuzz $$target -max_total_time=1200 || exit 1; done

audit: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python tools/audit.py --online

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) demo out site
