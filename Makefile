PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Wheels alone: what is built here runs a script of its author's. Of a lock no dependencies: it is complete, and for one on
# an extra pip would take the newest version, which is not the locked one (pypa/pip#9644).
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all:
# More processes than cores, as most tests wait for clocks; their order is that of tests/conftest.py.
PYTEST = -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --custom-compile-command "make lock"

.PHONY: up help test test-fp8 test-soak test-abuse test-restarts test-batch test-routing test-smuggling test-clients test-browser test-package test-docker test-kubernetes test-cluster test-nodes test-models test-compiled count lint types lock audit clean bench bench-quick bench-routing soak fuzz
.DEFAULT_GOAL := up

up: $(VENV)/.installed  ## A real vLLM on the CPU and the gateway in front of it (1 to 5 min to the first answer)
	@exec $(BIN)/vllm-gateway up $(UP)

help:  ## This list
	@awk -F ':.*  ## ' '/^[a-z0-9-]+:.*  ## / { printf "%-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: lint types  ## Lint, types and tests, those against the real vLLM too (4 min); COVERAGE=95 to measure as well
ifdef COVERAGE
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=$(COVERAGE)
else
	$(BIN)/python $(PYTEST)
endif

# A copy, as what is compiled in place wins over a file that has changed since.
test-compiled: $(VENV)/.installed-dev  ## All tests on the package as the image has it, compiled in a copy; needs a C compiler (6 min)
	rm -rf build/compiled && mkdir -p build/compiled
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --target-directory build/compiled
	cd build/compiled && GATEWAY_COMPILE=1 ../../$(BIN)/python setup.py --quiet build_ext --inplace
	cd build/compiled && PYTHONPATH=$$PWD ../../$(BIN)/python $(PYTEST)
	cd build/compiled && PYTHONPATH=$$PWD ../../$(BIN)/python -m tests.heavy.soak --seconds 20
	cd build/compiled && PYTHONPATH=$$PWD ../../$(BIN)/python -m tests.heavy.fuzz --seconds 20

count: $(VENV)/.installed-dev  ## Instructions of a request and an event, plain and compiled; needs valgrind and a C compiler (2 min)
	@$(BIN)/python -m tests.heavy.instructions

test-soak: $(VENV)/.installed-dev  ## Calls, faults and leavings, counted: the short run of `make soak` (1 min)
	@$(BIN)/python -m tests.heavy.soak --seconds 60

test-abuse: $(VENV)/.installed-dev  ## Hostile clients beside an honest one, each measured; ABUSE=--write makes the table anew (4 min)
	@$(BIN)/python -m tests.heavy.abuse $(ABUSE)
	@$(BIN)/python -m tests.heavy.abuse.shapes

test-browser: $(VENV)/.installed-dev  ## The page in Chromium; needs it, installs its driver, 150 MB; writes docs/page-*.png (3 min)
	$(BIN)/python -m pytest tests/heavy/browser/talk.py tests/heavy/browser/watch.py tests/heavy/browser/page.py

test-fp8: $(VENV)/.installed-dev  ## The demo model quantized by llm-compressor; installs it, 450 MB (4 min)
	$(BIN)/python -m pytest tests/heavy/fp8/datasets.py tests/heavy/fp8/checkpoints.py

test-kubernetes: $(VENV)/.installed-dev  ## The manifests rendered and checked; needs kubectl and Prometheus, installs their schemas (1 min)
	$(BIN)/python -m pytest tests/heavy/kubernetes/rendered.py tests/heavy/kubernetes/schemas.py tests/heavy/kubernetes/prometheus.py

test-cluster: $(VENV)/.installed-dev  ## The manifests' pods run on Docker under load, by a kubelet in small; needs it, kubectl and root (8 min)
	$(BIN)/python -m pytest tests/heavy/cluster/running.py

test-nodes: $(VENV)/.installed-dev  ## The demo model over two workers and two nodes; not in .ci/run (10 min)
	$(BIN)/python -m pytest tests/heavy/nodes.py

test-package: $(VENV)/.installed-dev  ## The packages of a release, built and installed as a stranger would (1 min)
	$(BIN)/python -m pytest tests/heavy/package.py

test-models: $(VENV)/.installed-dev  ## Models from a hub, in buckets, served from there; installs S3 servers and KServe's SDK (4 min)
	$(BIN)/python -m pytest tests/heavy/models/buckets.py tests/heavy/models/described.py tests/heavy/models/served.py

test-docker: $(VENV)/.installed-dev  ## The Compose stacks; needs Docker, shellcheck, ports 8008 and 9000 (6 min)
	shellcheck run_vllm.sh examples/*.sh
	$(BIN)/python -m pytest tests/heavy/compose/rendered.py tests/heavy/compose/running.py tests/heavy/compose/gaudi.py tests/heavy/compose/runpod.py

test-restarts: $(VENV)/.installed-dev  ## Gateways restarted behind nginx, vLLM killed, links set down, three vLLM; needs nginx and root (5 min)
	$(BIN)/python -m pytest tests/heavy/restarts.py tests/heavy/links.py tests/heavy/trio.py tests/heavy/systemd.py

test-batch: $(VENV)/.installed-dev  ## A file of requests through a gateway and the real vLLM, both killed under it; needs root (3 min)
	$(BIN)/python -m pytest tests/heavy/batch.py

test-routing: $(VENV)/.installed-dev  ## Prefix hits of real vLLM, gateways behind nginx, upstreams killed and joined; needs nginx and root (4 min)
	$(BIN)/python -m pytest tests/heavy/routing.py tests/heavy/fleet.py

test-clients: $(VENV)/.installed-dev  ## The examples with real clients; installs them, 600 MB; needs a JDK and Node (5 min)
	$(BIN)/python -m pytest tests/heavy/clients/examples.py tests/heavy/clients/leaving.py tests/heavy/clients/failures.py tests/heavy/clients/languages.py tests/heavy/clients/described.py

test-smuggling: $(VENV)/.installed-dev  ## Malformed requests behind nginx and HAProxy; needs both (1 min)
	$(BIN)/python -m pytest tests/heavy/fronts.py
	@$(BIN)/python -m tests.heavy.fuzz --seconds 40

fuzz: $(VENV)/.installed-dev  ## Malformed requests made at random, some 350,000 (10 min)
	@$(BIN)/python -m tests.heavy.fuzz

soak: $(VENV)/.installed-dev  ## Calls with random faults and leavings, counted (10 min)
	@$(BIN)/python -m tests.heavy.soak

lint: $(VENV)/.installed-dev  ## Format, style, the rule of rooms and spelling (5 s)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/codespell *.md docs bench compose docker examples gateway kubernetes scripts tests run_vllm.sh

types: $(VENV)/.installed-dev  ## mypy, strict (20 s)
	$(BIN)/mypy

lock: $(VENV)/.installed-dev  ## The lock files anew, after a change of pyproject.toml (1 min)
	$(PIP) uv
	$(COMPILE) requirements/build.in -o requirements/build.lock
	$(COMPILE) pyproject.toml -o requirements/image.lock
	$(COMPILE) pyproject.toml --extra otel -c requirements/image.lock -o requirements/otel.lock
	$(COMPILE) pyproject.toml --extra models -c requirements/otel.lock -o requirements/models.lock
	$(COMPILE) pyproject.toml --extra dev --extra models --extra otel -c requirements/models.lock -c requirements/otel.lock -o requirements/dev.lock
	$(COMPILE) requirements/compile.in -c requirements/dev.lock -o requirements/compile.lock
	$(COMPILE) requirements/audit.in -o requirements/audit.lock
	$(COMPILE) requirements/package.in -c requirements/build.lock -o requirements/package.lock
	$(COMPILE) bench/requirements/vllm-router.in -o bench/requirements/vllm-router.lock
	$(COMPILE) bench/requirements/litellm.in -o bench/requirements/litellm.lock
	$(COMPILE) examples/requirements.in -o examples/requirements.lock
	$(COMPILE) tests/heavy/clients/schemathesis.in -o tests/heavy/clients/schemathesis.lock
	$(COMPILE) tests/heavy/browser/browser.in -o tests/heavy/browser/browser.lock
	$(COMPILE) tests/heavy/models/servers.in -o tests/heavy/models/servers.lock
	$(COMPILE) tests/heavy/models/kserve.in -o tests/heavy/models/kserve.lock
	$(COMPILE) tests/heavy/kubernetes/schemas.in -o tests/heavy/kubernetes/schemas.lock

audit: $(VENV)/audit/.installed  ## Known vulnerabilities of the locked packages (10 s)
	$(VENV)/audit/bin/python scripts/audit.py

$(VENV)/audit/.installed: $(VENV)/bin/python requirements/audit.lock
	$(PYTHON) -m venv $(VENV)/audit
	$(PIP:$(BIN)%=$(VENV)/audit/bin%) --no-deps --require-hashes -r requirements/audit.lock
	@touch $@

clean:  ## Remove what the other targets have put into the checkout
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python %d.%d is too old: install Python 3.11 or newer, or name one: make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "This Python has no venv: install it (Debian: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python requirements/build.lock requirements/image.lock pyproject.toml
	@echo "Setting up the gateway (30 packages, about 30 MB) in $(VENV)"
	$(PIP) --no-deps --require-hashes -r requirements/build.lock -r requirements/image.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.lock
	@echo "Setting up the development tools in $(VENV)"
	$(PIP) --no-deps --require-hashes -r requirements/dev.lock
	@touch $@

bench: $(VENV)/.installed  ## The benchmark against peers; needs nginx and wrk (10 min)
	@$(BIN)/python -m bench

bench-quick: $(VENV)/.installed  ## Three of the benchmark's arms; needs nginx and wrk (2 min)
	@$(BIN)/python -m bench --quick

bench-routing: $(VENV)/.installed  ## Routing over eight simulated servers, against peers'; ROUTING=--quick for a look (4 min)
	@$(BIN)/python -m bench.routing $(ROUTING)
