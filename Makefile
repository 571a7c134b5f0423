# demo · test · e2e-test · cluster-test · compose-test · check · docs · bench · measure · up · down
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
COMPOSE ?= docker compose
# Where it is set, every start compiles all of torch again, which takes longer than the rest of it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test e2e-test cluster-test compose-test check docs bench measure up down chromium s3 lab

demo: $(READY)
	$(BIN)/python -m jobs.demo

SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder
# Machines made of namespaces, and what real services do when they are killed.
CLUSTER_TESTS ?= tests

# Three at a time, also on two cores: much of a test is waiting for Ray's and MLflow's processes to start.
test: check chromium s3
	$(BIN)/python -m pytest -m "not cluster and not e2e" $(SIDE_BY_SIDE)

# What a user does, from the wheel, the docs and the browser, and on real data.
e2e-test: $(READY) chromium s3
	$(BIN)/python -m pytest -m "e2e and not cluster" $(SIDE_BY_SIDE)

# Clusters of machines that have only the network in common. Needs root; otherwise it is skipped.
cluster-test: $(READY) s3 lab
	timeout --signal INT --kill-after 60 1800 $(BIN)/python -m pytest -m "cluster and not e2e" \
	  $(CLUSTER_TESTS) --durations 0

# The whole way through docker-compose.yml in containers, twice, in half an hour; the images need as
# much. COMPOSE=podman-compose builds them for podman, which runs them as root.
compose-test: $(READY) chromium
	$(COMPOSE) build
	$(BIN)/python -m pytest -rP tests/deploy/test_compose_way.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, in build/site; a broken link fails it.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# One of the peers, MosaicML's streaming, pins an older NumPy: it has an environment of its own, with
# the same versions of everything else.
bench: $(READY) .venv-bench/.ready
	@for name in pack_anything loop_overhead exactly_once faults data_opening data_loading search_overhead \
	  search_to_target; do \
	  echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

.venv-bench/.ready: $(READY)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-bench
	grep -v '^numpy==' requirements.lock > .venv-bench/constraints.txt
	$(BIN)/uv pip install --quiet --python .venv-bench/bin/python -r pyproject.toml --extra bench \
	  --constraint .venv-bench/constraints.txt
	@touch $@

# make measure RECIPE=digits DATA=DIR: trains it with three seeds and writes what it
# reached into the recipe's comment.
measure: $(READY)
	$(BIN)/python benchmarks/measure.py $(RECIPE) --data $(DATA)

up: $(READY)
	$(BIN)/tessera up

down: $(READY)
	$(BIN)/tessera down

# The browser tests drive a real Chromium; where it can't be installed they are skipped, and say so.
chromium:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && { apt-get update -qq; apt-get install -qq -y chromium; } >/dev/null 2>&1; } \
	  || echo "no chromium here: the browser tests will be skipped"

# The tests of object stores talk to a real S3 server, Ceph's; where it can't be installed they are
# skipped, and say so.
s3:
	@command -v radosgw >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && { apt-get update -qq; apt-get install -qq -y radosgw ceph-mon ceph-osd; } >/dev/null 2>&1; } \
	  || echo "no S3 server here: its tests will be skipped"

# The machines of the cluster tests are Linux namespaces on a bridge.
lab:
	@command -v ip >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && { apt-get update -qq; apt-get install -qq -y iproute2; } >/dev/null 2>&1; } \
	  || echo "no ip here: the tests of clusters will be skipped"

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' \
	  || { echo "Tessera needs Python 3.11 to 3.13: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@
