# make run    serve the embedded demonstration model and answer a first prompt; Ctrl-C stops it
# make test   lint, type check and all tests
# make lint   ruff and mypy only
# make setup  only make the virtual environment .venv
# make clean  remove all that these commands made, .venv included
#
# PYTHON=...            the Python (3.11 or newer) that .venv is made with
# LLMOS_TORCH=cpu|cuda  which build of torch; without it: cuda where there is an NVIDIA GPU, else cpu
# ARGS=...              further options: of llmosd for `make run`, of pytest for `make test` ("-n 0 -k name": in one process, some)

CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python
IS_NEW := import sys; print(sys.executable if sys.version_info >= (3, 11) else "")
PYTHON ?= $(firstword $(foreach name,$(CANDIDATES),$(shell $(name) -c '$(IS_NEW)' 2>/dev/null)))

BIN := .venv/bin
READY := .venv/.ready-$(or $(LLMOS_TORCH),auto)
SETUP_NEEDS := pyproject.toml scripts/setup_env.py
export LLMOS_TORCH

.PHONY: run test lint setup clean
.NOTPARALLEL:

run: $(READY)-run
	@$(BIN)/python scripts/run.py $(ARGS)

test: lint
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)

lint: $(READY)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf .typecheck && mkdir -p .typecheck/llmos
	@for found in llmos/* kernels services; do ln -s "../../$$found" .typecheck/llmos/; done
	cd .typecheck && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p llmos

setup: $(READY)-run

# .venv/.ready-KIND-run: what serving needs is installed; -test: also what the tests need.
$(READY)-run: $(SETUP_NEEDS)
	@$(require_python)
	@$(PYTHON) scripts/setup_env.py --stamp $@

$(READY)-test: $(SETUP_NEEDS)
	@$(require_python)
	@$(PYTHON) scripts/setup_env.py --test --stamp $@

define require_python
test -n "$(PYTHON)" || { echo "llmos needs Python 3.11 or newer; none of these is: $(CANDIDATES). Name one with make PYTHON=..." >&2; exit 1; }
endef

clean:
	rm -rf .venv .typecheck build dist llmos.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
