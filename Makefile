# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAMILY ?= gemma2
PROMPT ?= 12+30=

# The release of torch that the exports are tested with; pyproject.toml allows newer ones. A CPU build is enough.
TORCH := torch==2.13.0

.PHONY: demo test lint docs slow test-oldest test-optimum test-lm-eval test-browser test-clients fuzz-api screenshots gpu-check gpu-kit test-ray clean

demo: $(VENV)/export
	$(BIN)/python export.py --family $(FAMILY) --force
	$(BIN)/python -m runtime generate dist/$(FAMILY) --prompt "$(PROMPT)" --show-routing
	$(BIN)/python -m runtime generate dist/$(FAMILY) --chat --prompt "$(PROMPT)" --show-routing

# A file's tests stay on one worker, which makes its systems once; workers share the cores. Files run in their order, since the
# longest ones hold a single test, and the usual order would run those at the end, one worker alone.
test: $(VENV)/test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations=25

lint: $(VENV)/test build/house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd build/house && PYTHONPATH=. ../../$(BIN)/lint-imports ../../pyproject.toml --no-cache
	$(BIN)/python .ci/audit.py

# The API reference, from docstrings: build/docs/index.html. pdoc is told to be quiet about what it cannot know: modules that
# their packages contain too, annotations of named tuples that are strings, and commands/optimum.py, which imports Optimum.
PDOC := -W 'ignore:The module specification' -W 'ignore:Error parsing type annotation' -W 'ignore:Cannot determine where' \
	-W "ignore:Couldn't import" -m pdoc
docs: $(VENV)/docs build/house
	rm -rf build/docs
	cd build/house && PYTHONPATH=. ../../$(BIN)/python $(PDOC) --output-directory ../docs \
		$$(find -L fusionroute -name '*.py' | sed 's,/__init__,,; s,[.]py$$,,; s,/,.,g' | sort) \
		'!.*[.]__main__' '!fusionroute[.]fr_export[.]commands[.]optimum'

# The package as a wheel lays it out, in links to the folders here: tools that read code and run nothing see `fusionroute` there.
build/house:
	mkdir -p $@/fusionroute
	ln -sfn ../../../fusionroute.py $@/fusionroute/__init__.py
	for folder in runtime calibration fr_export; do ln -sfn ../../../$$folder $@/fusionroute/$$folder; done

# Real sizes and other environments; see docs/testing.md.
slow: $(VENV)/test
	$(BIN)/python -m pytest -m slow

# The light runtime alone on the oldest supported ONNX Runtime.
test-oldest: $(VENV)/test .venv-oldest/ready
	rm -rf dist/oldest
	FUSIONROUTE_BUNDLES=$$($(BIN)/python -m tests.support.exporting dist/oldest 2>/dev/null) .venv-oldest/bin/python -m pytest tests/runtime \
		--ignore tests/runtime/providers --ignore tests/runtime/tensorrt

# What is written for Optimum, read by Optimum, which needs an older transformers.
test-optimum: .venv-optimum/ready
	.venv-optimum/bin/python -m pytest -m slow tests/optimum

# Bundles in lm-evaluation-harness, beside transformers' models of the same checkpoints.
test-lm-eval: .venv-lm-eval/ready
	.venv-lm-eval/bin/python -m pytest -m slow tests/lm_eval

# The playground and pages of answers in a headless Chromium, which the system must have (Debian: chromium).
test-browser: .venv-browser/ready
	.venv-browser/bin/python -m pytest -m slow tests/browser

# OpenAI's clients for Python and Node.js against `fusionroute serve`; Node.js and npm must be there (Debian: nodejs, npm).
test-clients: $(VENV)/test tests/clients/node_modules
	$(BIN)/python -m pytest -m slow tests/clients

# Requests drawn from the server's OpenAPI schema, and its answers held against it.
fuzz-api: $(VENV)/test .venv-fuzz/ready
	rm -rf dist/fuzz
	FUSIONROUTE_BUNDLES=$$($(BIN)/python -m tests.support.exporting dist/fuzz 2>/dev/null) .venv-fuzz/bin/python -m pytest -m slow tests/openapi

# Replicas under Ray Serve, one of them killed; the figures are printed.
test-ray: $(VENV)/test .venv-ray/ready
	rm -rf dist/ray
	FUSIONROUTE_BUNDLES=$$($(BIN)/python -m tests.support.exporting dist/ray 2>/dev/null) .venv-ray/bin/python -m pytest -m slow -s tests/ray

# The pictures of them in the docs: `make screenshots BUNDLE=dist/mine`.
screenshots: .venv-browser/ready
	.venv-browser/bin/python -m tests.browser.screenshots $(BUNDLE) docs

# What only a GPU can tell, in one report; without one it says what it skipped. `make gpu-check BUNDLE=dist/mine` checks that bundle.
gpu-check: $(VENV)/test
	$(BIN)/python -m benchmarks.gpu_check $(addprefix --bundle ,$(BUNDLE)) $(addprefix --minutes ,$(MINUTES))

# The same for a machine without network: a folder with everything, and a script. `make gpu-kit OUT=kit PART=60` cuts it into parts
# of at most 60 MB; KIT='--python 3.10 --machine aarch64' makes it for another Python and processor.
gpu-kit: $(VENV)/test
	$(BIN)/python -m benchmarks.gpu_kit $(OUT) $(addprefix --part ,$(PART)) $(addprefix --bundle ,$(BUNDLE)) $(KIT)

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/export: $(VENV)/python pyproject.toml
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[cpu,export]'
	touch $@

$(VENV)/test: $(VENV)/export
	$(BIN)/python -m pip install --quiet --editable '.[cpu,export,test]'
	touch $@

$(VENV)/docs: $(VENV)/test
	$(BIN)/python -m pip install --quiet --editable '.[cpu,export,test,docs]'
	touch $@

.venv-oldest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet onnxruntime==1.23.2 pytest hypothesis --editable .
	touch $@

.venv-optimum/ready: pyproject.toml
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet $(TORCH)
	.venv-optimum/bin/python -m pip install --quiet "optimum-onnx[onnxruntime]==0.1.0" pytest hypothesis --editable '.[cpu,export]'
	touch $@

.venv-lm-eval/ready: pyproject.toml
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install --quiet $(TORCH)
	.venv-lm-eval/bin/python -m pip install --quiet "lm-eval[hf]==0.4.13" pytest hypothesis --editable '.[cpu,export]'
	touch $@

.venv-browser/ready: pyproject.toml
	$(PYTHON) -m venv .venv-browser
	.venv-browser/bin/python -m pip install --quiet $(TORCH)
	.venv-browser/bin/python -m pip install --quiet playwright httpx pytest hypothesis --editable '.[cpu,export,serve]'
	touch $@

.venv-fuzz/ready: pyproject.toml
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install --quiet schemathesis==4.32.5 httpx pytest hypothesis --editable '.[cpu,serve]'
	touch $@

tests/clients/node_modules: tests/clients/package-lock.json
	npm ci --prefix tests/clients --ignore-scripts --no-audit --no-fund
	touch $@

.venv-ray/ready: pyproject.toml
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet httpx pytest hypothesis --editable '.[cpu,ray]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-optimum .venv-lm-eval .venv-browser .venv-fuzz .venv-ray tests/clients/node_modules dist
