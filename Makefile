# `make install`, `make demo`, `make test`, `make check`: each makes .venv and installs what it needs, given Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# Threads that wait give way to other processes (the reason stands in cli/app.py).
export GOMP_SPINCOUNT ?= 2000

.PHONY: install demo studio front chromium test slow faults mutants check format benchmark clean

install: .venv/runtime
	@echo 'Installed. In this shell: . .venv/bin/activate'
	@echo 'Then: dpo --help'

demo: .venv/runtime
	$(BIN)/dpo demo --out runs/demo

test: .venv/dev chromium
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

# The studio's pages are tested in a real browser.
chromium:
	@command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq chromium > /dev/null; }

# Rebuilds the studio's pages (node and npm are needed); the result is committed.
front:
	npm ci --ignore-scripts --no-audit --no-fund
	node src/dpo_studio/studio/front/build.mjs

studio: .venv/studio
	$(BIN)/dpo studio --folder .

# The GPTQ path on the real bundled model, minutes long; a tiny model takes it in `make test`.
slow: .venv/dev
	$(BIN)/python -m pytest -m slow $(ARGS)

# 20,000 mutations of strangers' files through the readers, 600 through whole verbs; then 400 kills of real trainings,
# each continued to the same bytes. 20 minutes each; the second writes the table in docs/reliability.md.
faults: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz
	rm -f faults.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --results faults.jsonl --table docs/reliability.md

# The gates with each check removed in turn, some 20 minutes of two cores; then the guards of SECURITY.md with each line broken,
# an hour. The tests must notice. Memory is bounded, for a template no longer stopped would take it all.
mutants: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.removed_checks
	$(BIN)/python -m pip install --quiet 'mutmut>=3.8,<4'
	rm -rf mutants && ulimit -v 12000000 && OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 2
	$(BIN)/mutmut results

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/audit.py

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: .venv/dev
	$(BIN)/python benchmarks/vs_trl.py --device cpu

# A stamp a set of dependencies: the install runs again when pyproject.toml changes.
.venv/runtime: pyproject.toml | .venv
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/studio: pyproject.toml | .venv
	$(BIN)/python -m pip install --quiet --editable '.[studio]'
	@touch $@ .venv/runtime

.venv/dev: pyproject.toml | .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ .venv/runtime

.venv:
	$(PYTHON) -c 'import sys; sys.exit("DPO Studio needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis mutants
