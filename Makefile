# make demo and make test each install what they need into .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := work_dirs/demo
DETECTOR := configs/demo/mask_rcnn_kw_resnet18_1x

# A notebook sets it for the commands that it starts; $(VENV) may not have that back end.
unexport MPLBACKEND

.PHONY: help install demo demo-detection pictures test test-slow test-integrations coverage lint docs format bench clean

help:
	@echo "make install  create $(VENV) with the package, its development tools and the demo's"
	@echo "make demo     compare static and KernelWarehouse networks of equal size on digits"
	@echo "make demo-detection  train a small Mask R-CNN on digits, on the demo's network"
	@echo "make pictures train the demo's network and draw the documentation's pictures anew"
	@echo "make test     run the tests"
	@echo "make test-slow  run further cases of them; before a release"
	@echo "make test-integrations  run the tests with other people's packages, in a venv of their own"
	@echo "make coverage run the tests and report the lines of kw/ that none of them reaches"
	@echo "make lint     check style, types, generated tables and the documentation"
	@echo "make docs     build the documentation's site; every warning is an error"
	@echo "make bench    measure this machine's standard set; writes docs/benchmarks.md"
	@echo "make format   rewrite the sources in the house style"

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--editable ".[dev,demo,detection,docs,export]"
	touch $@ $(VENV)/demo-installed

$(VENV)/demo-installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

# One seed; configs/demo/demo_seeds.yaml has five.
demo: $(VENV)/demo-installed
	rm -rf $(DEMO)/runs
	$(BIN)/python -m kw.data.two_inks $(DEMO)/two_inks
	$(BIN)/kw study run configs/demo/demo.yaml --work-dir $(DEMO)/runs --jobs 2
	$(BIN)/kw study summarize configs/demo/demo.yaml --work-dir $(DEMO)/runs \
		--json $(DEMO)/demo.json --plot $(DEMO)/curves.png

demo-detection: $(DEMO)/kw_resnet18_1x/best.pth
	rm -rf $(DEMO)/mask_rcnn_kw_resnet18_1x
	$(BIN)/python -m kw.data.digit_scenes $(DEMO)/digit_scenes
	$(BIN)/python tools/train.py $(DETECTOR).py --work-dir $(DEMO)/mask_rcnn_kw_resnet18_1x
	$(BIN)/python tools/test.py $(DETECTOR).py $(DEMO)/mask_rcnn_kw_resnet18_1x/best.pth
	$(BIN)/python tools/visualize.py detections $(DETECTOR).py \
		$(DEMO)/mask_rcnn_kw_resnet18_1x/best.pth --out $(DEMO)/detections

# The detector's backbone starts from the classification demo's network.
$(DEMO)/kw_resnet18_1x/best.pth: | install
	$(BIN)/python -m kw.data.digits $(DEMO)/digits
	$(BIN)/python tools/train.py configs/demo/kw_resnet18_1x.yaml --work-dir $(DEMO)/kw_resnet18_1x

pictures: install
	PYTHON=$(BIN)/python scripts/make_pictures.sh

# Compiled modules are kept, whatever the environment says: processes of tests import them again.
test test-slow coverage: export PYTHONDONTWRITEBYTECODE =

test: install
	$(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal

test-slow: install
	$(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal -m slow

# Other people's packages, in the versions of the file: about 7 GB with PyTorch.
test-integrations:
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet --editable ".[dev,export]" \
		--requirement scripts/integrations.txt
	.venv-integrations/bin/python -m pytest -q tests/test_integrations_core.py tests/test_with_*.py

coverage: install
	$(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal --cov --cov-report=term --cov-report=xml

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/render_tables.py --check
	$(BIN)/python scripts/render_results.py --check
	$(MAKE) docs

# Anew every time: what is kept of an earlier build does not warn again.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -E -q -j 2 -d build/doctrees docs site
	@echo "site/index.html"

bench: install
	PYTHON=$(BIN)/python scripts/benchmark.sh

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(DEMO) build dist site *.egg-info .coverage coverage.xml .mypy_cache .ruff_cache .pytest_cache
