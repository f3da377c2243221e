# make up     a real vLLM on the CPU and the gateway in front of it
# make test   lint, types and tests, those against the real vLLM included
# make lock   the lock files anew, after a change of pyproject.toml
# make audit  known vulnerabilities of what is locked, where the package index tells of them
# make bench  the benchmark against peers (make bench-quick: two of them, in two minutes)
# make soak   ten minutes of calls, faults and leavings, counted (make test-soak: one minute)
# make test-restarts  gateways restarted behind nginx, vLLM killed under the gateway; needs nginx
# make test-smuggling  requests as bytes that try to be other than they seem, behind nginx and HAProxy, then spoilt at random; needs both
# make fuzz   ten minutes of the latter, some 350,000 requests
# make test-clients  real clients (OpenAI's, Anthropic's, LangChain and others) run the examples, leave and fail; installs them (600 MB)
# make test-browser  the page in Debian's Chromium, in front of the real vLLM; writes docs/page-*.png; needs chromium, installs its driver (150 MB)
# make test-fp8  datasets read, the demo model quantized by llm-compressor and served; installs it (450 MB)
# make test-docker  the Compose stacks rendered, and the CPU's really run; needs Docker, shellcheck, ports 8008 and 9000
# make clean  removes what the other targets have put into the checkout

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Wheels alone: what is built here runs a script of its author's. Of a lock no dependencies: it is complete, and for one on
# an extra pip would take the newest version, which is not the locked one (pypa/pip#9644).
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all:
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock"

.PHONY: up test test-fp8 test-soak test-restarts test-smuggling test-clients test-browser test-docker lint types lock audit clean bench bench-quick soak fuzz
.DEFAULT_GOAL := up

up: $(VENV)/.installed
	@exec $(BIN)/vllm-gateway up $(UP)

test: lint types
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses 2 --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=95

test-soak: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.heavy.soak --seconds 60

test-browser: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/heavy/browser/page.py

test-fp8: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/heavy/fp8/datasets.py tests/heavy/fp8/checkpoints.py

test-docker: $(VENV)/.installed-dev
	shellcheck run_vllm.sh examples/*.sh
	$(BIN)/python -m pytest tests/heavy/compose/rendered.py tests/heavy/compose/running.py tests/heavy/compose/gaudi.py

test-restarts: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/heavy/restarts.py

test-clients: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/heavy/clients/examples.py tests/heavy/clients/leaving.py tests/heavy/clients/failures.py tests/heavy/clients/described.py

test-smuggling: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/heavy/fronts.py
	@$(BIN)/python -m tests.heavy.fuzz --seconds 40

fuzz: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.heavy.fuzz

soak: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.heavy.soak

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo --no-cache

types: $(VENV)/.installed-dev
	$(BIN)/mypy

lock: $(VENV)/.installed-dev
	$(PIP) uv
	$(COMPILE) requirements/build.in -o requirements/build.lock
	$(COMPILE) pyproject.toml -o requirements/image.lock
	$(COMPILE) pyproject.toml --extra otel -c requirements/image.lock -o requirements/otel.lock
	$(COMPILE) pyproject.toml --extra dev --extra otel -c requirements/otel.lock -o requirements/dev.lock
	$(COMPILE) requirements/audit.in -o requirements/audit.lock
	$(COMPILE) bench/requirements/vllm-router.in -o bench/requirements/vllm-router.lock
	$(COMPILE) bench/requirements/litellm.in -o bench/requirements/litellm.lock
	$(COMPILE) examples/requirements.in -o examples/requirements.lock
	$(COMPILE) tests/heavy/clients/schemathesis.in -o tests/heavy/clients/schemathesis.lock
	$(COMPILE) tests/heavy/browser/browser.in -o tests/heavy/browser/browser.lock

audit: $(VENV)/audit/.installed
	$(VENV)/audit/bin/python scripts/audit.py

$(VENV)/audit/.installed: $(VENV)/bin/python requirements/audit.lock
	$(PYTHON) -m venv $(VENV)/audit
	$(PIP:$(BIN)%=$(VENV)/audit/bin%) --no-deps --require-hashes -r requirements/audit.lock
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python %d.%d is too old: install Python 3.11 or newer, or name one: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "This Python has no venv: install it (Debian: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python requirements/build.lock requirements/image.lock pyproject.toml
	@echo "Setting up the gateway (26 packages, about 30 MB) in $(VENV)"
	$(PIP) --no-deps --require-hashes -r requirements/build.lock -r requirements/image.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.lock
	@echo "Setting up the development tools in $(VENV)"
	$(PIP) --no-deps --require-hashes -r requirements/dev.lock
	@touch $@

bench: $(VENV)/.installed
	@$(BIN)/python -m bench

bench-quick: $(VENV)/.installed
	@$(BIN)/python -m bench --quick
