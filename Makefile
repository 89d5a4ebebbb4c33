# What a person types. Everything happens in .venv; the machine is left alone, except that as root
# on Debian or Ubuntu missing system packages (venv, sshd, iproute2) are installed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .peers
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo install test test-all test-torch check lint types proto bench compare clean system
.PHONY: figures-distbelief figures-seed

help:
	@echo "make demo      install into .venv and train on the digits: 2 servers, 2 workers, this machine"
	@echo "make test      all tests that take less than ten minutes, SSH hosts included (as root)"
	@echo "make test-all  the slow ones, too"
	@echo "make test-torch  those that need torch, which it installs into .venv"
	@echo "make check     lint, types and tests"
	@echo "make bench     measure what the README says: start-up and shutdown, and dsgd beside its peers"
	@echo "make compare   measure the algorithms beside each other, and beside torch"
	@echo "make figures-distbelief  DistBelief's figures 3 to 5: HOSTS='gpu[1-8]' WORKERS=1,2,4,8"
	@echo "make figures-seed  error by epoch and second for some numbers of workers; CALTECH=/a/folder"
	@echo "make proto     generate the code of dsgd_cli/wire/dsgd.proto"

demo: $(VENV)/.installed
	$(BIN)/dsgd train cluster_templates/localhost.yaml

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml tests/make_venv.sh
	sh tests/make_venv.sh $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . --config-settings editable_mode=compat
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' --config-settings editable_mode=compat
	touch $@

system:
	sh tests/install_system.sh

test: $(VENV)/.dev system
	$(PYTEST) -m "not slow" -n 2 --dist loadfile

test-all: test
	$(PYTEST) -m slow

# A virtual environment that has torch runs these tests with all the others, too.
$(VENV)/.torch: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[torch]' --config-settings editable_mode=compat
	touch $@

test-torch: $(VENV)/.torch
	$(PYTEST) -m torch

check: lint types test

lint: $(VENV)/.dev
	$(BIN)/ruff check dsgd_cli tests
	$(BIN)/ruff format --check dsgd_cli tests

types: $(VENV)/.dev
	$(BIN)/mypy

proto: $(VENV)/.dev
	$(BIN)/python -m dsgd_cli.wire.generate

$(PEERS)/.installed: tests/benchmarks/peers/requirements.txt tests/make_venv.sh
	sh tests/make_venv.sh $(PYTHON) $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

bench: $(VENV)/.dev $(PEERS)/.installed system
	$(BIN)/python -m tests.benchmarks.start_and_stop
	$(BIN)/python -m tests.benchmarks.compare --peers $(PEERS)/bin/python

compare: $(VENV)/.dev $(PEERS)/.installed
	$(BIN)/python -m tests.benchmarks.algorithms --peers $(PEERS)/bin/python

# The figures of others, as the reports of sweeps: on this machine, or where HOSTS says. OPTIONS is
# for whatever else your hosts need, and for more to vary (the figures show medians over seeds):
# OPTIONS='--set ssh.user=ml --set env=existing seed=0,1,2'.
WORKERS ?= 1,2,4
HOSTS ?= local
SWEEP = $(BIN)/dsgd sweep --set 'hosts=$(HOSTS)'

figures-distbelief: $(VENV)/.installed
	$(SWEEP) cluster_templates/distbelief.yaml workers=$(WORKERS) algorithm=downpour,sandblaster \
	  'optimizer={sgd: {learning_rate: 0.05}},{adagrad: {learning_rate: 0.02}}' $(OPTIONS)

# The network for Caltech-101, then the recurrent one. Photographs are not shipped: without a folder
# of them, the same layers learn the digits, and their figures are called after those.
CALTECH ?=
DIGITS = --set name=caltech101-layers-digits --set train.data=digits --set train.until.accuracy=0.97 \
  --set train.optimizer.adagrad.learning_rate=0.005
figures-seed: $(VENV)/.torch
	$(if $(CALTECH),,@echo "CALTECH names no folder: the layers for Caltech-101, on the digits")
	$(SWEEP) cluster_templates/caltech101.yaml workers=$(WORKERS) \
	  $(if $(CALTECH),--set train.data.images=$(CALTECH),$(DIGITS)) $(OPTIONS)
	$(SWEEP) cluster_templates/seq2seq.yaml workers=$(WORKERS) $(OPTIONS)

clean:
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
