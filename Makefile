# Everything runs in .venv, which is made from the hash-pinned locks and remade when they change.

PY := .venv/bin/python
RUN_STAMP := .venv/installed
DEV_STAMP := .venv/installed-dev
TRY := -m pytest -o python_files='trial_*.py' -o timeout=900 -s
DATA_TRIALS := $(patsubst %,tests/trials/trial_%.py,datasets index ray)
PIP := $(PY) -m pip --disable-pip-version-check --quiet install
COMPILE := uv pip compile --universal --generate-hashes --no-header --no-annotate --quiet

.DEFAULT_GOAL := help
.PHONY: help run test check trials trials-data trial-proxy bench lock

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(RUN_STAMP) ## Serve on 127.0.0.1:8080, or as ./embedgate.toml says (PORT=8099 for another port)
	@exec .venv/bin/embedgate serve $(if $(PORT),--port $(PORT))

test: $(DEV_STAMP) ## Run the whole test suite, two at once (ARGS="-k queue" for a part)
	@exec $(PY) -m pytest $(or $(ARGS),-n 2)

trials: $(DEV_STAMP) ## Run the slow proofs under load and faults (ARGS="-k fallback" for a part)
	@exec $(PY) $(TRY) tests/trials $(addprefix --ignore=,$(DATA_TRIALS)) $(ARGS)

trials-data: $(DEV_STAMP) ## Run those of datasets and source trees: AG News' size, five kills, thousands of files, Ray
	@exec $(PY) $(TRY) $(DATA_TRIALS) $(ARGS)

trial-proxy: $(DEV_STAMP) ## Hold the provider contract against LiteLLM's proxy, installed in .venv-litellm
	@test -x .venv-litellm/bin/litellm || { $(PY) -m venv --clear .venv-litellm && \
		.venv-litellm/bin/python -m pip --disable-pip-version-check --quiet install 'litellm[proxy]==1.101.6'; }
	@EMBEDGATE_TEST_LITELLM=$(CURDIR)/.venv-litellm/bin/litellm $(PY) -m pytest tests/contract/test_providers.py -k litellm

check: $(DEV_STAMP) ## Lint, formatting, types and the floors of the house
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: $(DEV_STAMP) ## Measure against a bare ASGI app and FastAPI, side by side
	@exec $(PY) -m tests.bench

# setuptools is no dependency, but builds the project itself: so it is pinned like the rest.
lock: ## Renew both locks within the bounds of pyproject.toml (needs uv)
	echo 'setuptools>=77' | $(COMPILE) pyproject.toml - -o requirements.lock
	echo 'setuptools>=77' | $(COMPILE) pyproject.toml --group dev - -o requirements-dev.lock

$(PY):
	@for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
		if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			exec $$python -m venv --clear .venv; \
		fi; \
	done; \
	echo 'embedgate needs Python 3.11 or newer, with venv' >&2; exit 1

$(RUN_STAMP): requirements.lock pyproject.toml | $(PY)
	@echo 'installing into .venv'
	@$(PIP) --require-hashes -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# The larger lock holds all of the smaller one, so that `make run` needs nothing more after it.
$(DEV_STAMP): requirements-dev.lock requirements.lock pyproject.toml | $(PY)
	@echo 'installing into .venv, tools included'
	@$(PIP) --require-hashes -r requirements-dev.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $(RUN_STAMP) $@
