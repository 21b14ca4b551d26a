PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
DEMO_RUN := runs/demo

.PHONY: demo test test-gpu check env clean

demo: env  ## train on real images, no download, and write a report
	rm -rf $(DEMO_RUN)
	$(RUN) train.py --config recipes/demo.yaml --run-dir $(DEMO_RUN)
	$(RUN) evaluate.py $(DEMO_RUN)

test: env check  ## style, types, and the whole test suite
	$(RUN) -m pytest -n 2 --dist worksteal

test-gpu: env  ## what needs an NVIDIA GPU, and the tests of train.py and of augmentation there
	CIFAR_DIST_TEST_GPU=1 $(RUN) -m pytest tests/test_gpu.py tests/test_train.py tests/data/test_augment.py

check: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

env: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.lock
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV)
