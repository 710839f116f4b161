# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export RAY_HEAD_FLAGS ?=

TRAIN_FLAGS ?= --dataset digits

.PHONY: help setup train test quick soak lint clean

help:
	@echo "make train   set everything up, start a local Ray, submit the main job on the embedded digits, show progress"
	@echo "             (TRAIN_FLAGS='--dataset digits --num-workers 2' for other flags of ali_dist.launch)"
	@echo "make test    set everything up and run all tests (under 20 minutes on 2 cores)"
	@echo "make quick   the quick tests only (under 5 minutes)"
	@echo "make soak    the tests of minutes each (lost nodes, hosts cut off, the largest networks), then 100 random faults in one run (hours)"
	@echo "make lint    ruff's checks"

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, not " + sys.version) if sys.version_info < (3, 11) else 0'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

train: setup
	@python -m ali_dist.prepare --dataset digits
	@launch/local.sh launch/submit.sh $(TRAIN_FLAGS)

test: setup
	@ruff check .
	@python -m pytest -n 3 --dist loadgroup -m 'not soak'

quick: setup
	@python -m pytest -n 2 --dist loadgroup

soak: setup
	@python -m ali_dist.prepare --dataset digits
	@python -m pytest -m soak
	@python -m ali_dist.bench soak

lint: setup
	@ruff check . && ruff format --check .

clean:
	rm -rf $(VENV)
