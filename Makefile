# Nothing has to be typed before these: `make pipeline` and `make test` make the environment themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev,notebooks
# The newest TransformerLens that is supported beside the pinned one; the model tests run on both.
TL4 = 4.3.0

.PHONY: help setup pipeline test test-fast check fix bench bench-train bench-quality test-tl4 test-peers test-services real demo-hub readme clean

help:
	@echo "make pipeline   collect, train, evaluate, ablate and compare on the built-in model (minutes, no network)"
	@echo "make test       all tests        make test-fast  the quick ones"
	@echo "make check      format, lint, types, import layers"
	@echo "make bench      measure speed and memory against the original's way"
	@echo "make bench-train, bench-quality   speed and quality of training against the peers"
	@echo "make real       the pipeline on a real language model and real texts (20 minutes, fetches 370 MB once)"
	@echo "make demo-hub   publish a run to a Hub on this machine, and load it back in a fresh process"
	@echo "make readme     write docs/commands.md and the list in README.md anew from --help"
	@echo "make test-peers the peers in an environment of their own: their trainers, files, evaluation and API against ours"
	@echo "make test-services   the service's tests on PostgreSQL and Redis"
	@echo "make test-tl4   the model tests with TransformerLens $(TL4), in an environment of their own"

setup: $(VENV)/.ready

# torch first and by its exact version: a looser requirement would pull a build with gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' -c $(CONSTRAINTS)
	@touch $@

pipeline: setup
	$(BIN)/mechint pipeline

# Two workers on two cores: with more threads than cores, small steps wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or not slow"
	$(BIN)/python -m unittest -q tests.test_pipeline
	$(BIN)/python check_paths.py

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_layers.py

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# As the commands run: without it, rounds in which anything else wants the cores measure the waiting (docs/log.md).
bench: setup
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/collection.py
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/ablation.py

# The peers live in an environment of their own (build/peers-venv), which these make themselves.
bench-train: setup
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/train.py

# Days of one core from scratch, most of it the peers'; goes on where it was stopped. `make bench-quality
# ARCHITECTURES=topk` is an evening. Where a coefficient is searched for, --first is near it, which saves trainings.
ARCHITECTURES ?= standard topk batchtopk matryoshka_batchtopk jumprelu gated
FIRST_standard = 0.56 0.95 0.31
FIRST_gated = 0.88 1.4 0.52
FIRST_jumprelu = 0.12 0.23
OWN_matryoshka_batchtopk = --widths 64 128 256 512 1024
bench-quality: setup
	$(BIN)/python benchmarks/quality.py peers --architectures $(ARCHITECTURES) --lrs 3e-3 7e-3 1e-2
	$(foreach name,$(ARCHITECTURES),$(BIN)/python benchmarks/quality.py ours --name preset --architecture $(name) \
	  $(if $(FIRST_$(name)),--first $(FIRST_$(name))) -- --preset mechint $(OWN_$(name)) &&) true
	$(BIN)/python benchmarks/quality.py ours --name "lr 4e-3" --architecture jumprelu --targets 64 --first 0.04 \
	  -- --preset mechint --lr 4e-3 --decay-share 0.6
	$(BIN)/python benchmarks/quality.py table

# The service's tests once more on PostgreSQL and Redis (Debian: postgresql, redis-server), which are started for them.
test-services: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/with_services.py $(BIN)/python -m pytest -q -n 2 --dist loadfile \
	  -m "slow or not slow" tests/test_server_*.py

# A real language model and real texts, fetched once into build/real: the pipeline on them, and what it measures.
ROWS ?= 300000
real: setup
	$(BIN)/python examples/real.py --rows $(ROWS)

# A Hub of its own on this machine: publishes the newest run there, or a small one made for it, and loads it back.
demo-hub: setup
	$(BIN)/python examples/demo_hub.py

readme: setup
	$(BIN)/python -m mechint.cli.reference

build/constraints-tl4.txt: constraints.txt
	@mkdir -p build
	sed 's/^transformer-lens==.*/transformer-lens==$(TL4)/' constraints.txt > $@

test-tl4: build/constraints-tl4.txt
	$(MAKE) setup VENV=.venv-tl4 CONSTRAINTS=build/constraints-tl4.txt EXTRAS=dev
	OMP_NUM_THREADS=1 .venv-tl4/bin/python -m pytest -q -n 2 --dist loadfile -m "slow or not slow" \
	  tests/test_models.py tests/test_families.py tests/test_suffix.py tests/test_ablation.py tests/test_saelens_hooked.py

# In an environment that holds the peers: that they train as the benchmarks call them, that SAELens's evaluation and API agree
# with ours, and that what we write they load, and the reverse.
test-peers: setup
	$(BIN)/python benchmarks/peers.py
	build/peers-venv/bin/python -m pip install --quiet --disable-pip-version-check pytest pytest-xdist beartype -c $(CONSTRAINTS)
	OMP_NUM_THREADS=1 build/peers-venv/bin/python -m pytest -q -n 2 --dist loadfile -m "slow or not slow" \
	  tests/test_benchmarks.py tests/test_peer_*.py tests/test_saelens_hub.py -k "peer or dashboards"

clean:
	rm -rf .venv .venv-tl4 build *.egg-info .pytest_cache .ruff_cache .hypothesis
