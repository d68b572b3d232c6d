# Main targets: `make quickstart` and `make test`. Each first installs everything it needs into .venv.
# Requires Python 3.11 or newer. No compiler is needed.

PYTHON ?= python3
VBENCH_PYTHON ?= python3.10
VENV   ?= .venv
OUT    ?= runs/quickstart
BIN     = $(VENV)/bin

.PHONY: install quickstart learn checks test test-slurm test-long lint docs slurm browser quantize vbench-env \
  bench bench-gpu wheel clean

install: $(VENV)/.installed

# torch is installed first, so that no other package selects its version.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,docs]'
	touch $@

quickstart: install
	$(BIN)/landiff quickstart --out $(OUT)

# The full recipe of the preset shapes: from zero to scored videos.
learn: install
	$(BIN)/landiff learn --out runs/learn

# One worker for each core. The tests of a file stay together. Those of SLURM run before, since
# they disturb jobs at certain moments. They mostly wait, so mypy computes meanwhile.
PARALLEL = --ignore tests/slurm --numprocesses logical --maxprocesses 4 --dist loadfile \
  --no-loadscope-reorder

# Two at a time: mypy computes for minutes, and most others wait for downloads.
checks: install
	$(MAKE) --jobs 2 --output-sync lint docs slurm browser quantize

test: install
	$(MAKE) --jobs 2 --output-sync lint docs test-slurm browser quantize
	$(BIN)/python -m pytest $(PARALLEL) -m "not long and not gpu"

test-slurm: install slurm
	$(BIN)/python -m pytest -m "not long and not gpu" tests/slurm

test-long: checks
	$(BIN)/python -m pytest -m "not gpu" --timeout 7200 tests/slurm
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu" --timeout 7200

# Tests of the launchers run a real SLURM: 13 MB of Debian packages, installed once as root.
slurm:
	tests/slurm/install.sh

# Tests of `landiff demo` run a real browser: 64 MB of Debian packages, installed once as root.
# After those of SLURM, since only one apt-get can run.
browser: slurm
	tests/launchers/demo/install.sh

# torchao for the tests of int8 weights and float8 training, in a folder of its own: where it is installed, diffusers,
# transformers and peft import it, slowly and with warnings.
quantize: $(VENV)/quantize/torchao
$(VENV)/quantize/torchao: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
	  --upgrade --target $(VENV)/quantize torchao
	touch $@

# The official VBench in an interpreter of its own, since it needs other versions of numpy and transformers:
# landiff evaluate vbench --vbench-python vbench-env/bin/python
vbench-env: vbench-env/.installed
vbench-env/.installed:
	$(VBENCH_PYTHON) -m venv vbench-env
	vbench-env/bin/python -m pip install --quiet --disable-pip-version-check "numpy<2" "transformers==4.33.2" \
	  torch torchvision vbench==0.1.5
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the documentation site in site/. Broken links and pages missing from the nav are errors.
# No --quiet: it would hide warnings from --strict.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: install quantize
	for table in $(filter-out gpu rehearsal,$(notdir $(basename $(wildcard benchmarks/*.py)))); do \
	  echo "== $$table"; $(BIN)/python -m benchmarks.$$table || exit 1; done

# Every row against its limit and its peer. `make bench-gpu OPTIONS=--dry-run`: toy sizes, any machine.
bench-gpu: install
	$(BIN)/python -m benchmarks.gpu $(OPTIONS)

wheel: install
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist site *.egg-info
