# make demo and make test each install what they need into .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := work_dirs/demo

.PHONY: help install demo test lint format bench clean

help:
	@echo "make install  create $(VENV) with the package, its development tools and the demo's"
	@echo "make demo     train and compare a static and a KernelWarehouse network on digits"
	@echo "make test     run the tests"
	@echo "make lint     check style, types and generated tables"
	@echo "make bench    measure this machine's standard set; writes docs/benchmarks.md"
	@echo "make format   rewrite the sources in the house style"

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,demo,detection]"
	touch $@

demo: install
	rm -rf $(DEMO)/resnet18 $(DEMO)/kw_resnet18_1x
	$(BIN)/python -m kw.data.digits $(DEMO)/digits
	$(BIN)/python tools/train.py configs/demo/resnet18.yaml --work-dir $(DEMO)/resnet18
	$(BIN)/python tools/train.py configs/demo/kw_resnet18_1x.yaml --work-dir $(DEMO)/kw_resnet18_1x
	$(BIN)/python tools/test.py configs/demo/resnet18.yaml $(DEMO)/resnet18/best.pth
	$(BIN)/python tools/test.py configs/demo/kw_resnet18_1x.yaml $(DEMO)/kw_resnet18_1x/best.pth
	$(BIN)/python tools/compare_runs.py $(DEMO)/resnet18 $(DEMO)/kw_resnet18_1x --plot $(DEMO)/curves.png

test: install
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/render_tables.py --check

bench: install
	$(BIN)/python tools/benchmark.py --standard

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
