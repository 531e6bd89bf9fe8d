# Every target sets up .venv by itself: Python >= 3.11, a C compiler and PyPI are enough.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.opdlm-installed
export OMP_NUM_THREADS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo docs test test-slow test-pages test-lowest test-faults test-fuzz test-real test-vllm lint wheel sbom audit clean env

demo: env
	@$(BIN)/python -m opdlm demo runs/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-slow: env
	$(BIN)/python -m pytest -m "slow and not gpu and not vllm and not real"

# The commands of every page, with small budgets.
test-pages: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/docs -m "slow or not slow" -k "not as_written"

# The lowest versions that pyproject.toml allows, in an environment of their own.
test-lowest:
	@[ -x .venv-lowest/bin/python ] || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -r requirements-lowest.lock
	.venv-lowest/bin/python -m pip install -q --no-deps -e .
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto tests/modeling tests/checkpoints tests/distill

# Kills, full disks, signals, damaged files and double starts, a thousand (ten minutes on an idle core). A
# command that was killed goes on from its file.
test-faults: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py --json docs/results/faults.json

# Hostile and odd settings, recipes, data, command lines, templates, checkpoints and requests (minutes).
test-fuzz: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --json docs/results/fuzz.json

# OPDLM_REAL: a folder whose sub-folders are checkpoints (python examples/smollm2.py FOLDER/smollm2 makes one).
test-real: env
	$(BIN)/python -m pytest -m real

# vLLM pins its own torch and transformers, so it has an environment of its own. --no-deps: the lock is
# complete, and leaves out what must not be there. One process per file: vLLM decides about Triton once.
test-vllm:
	@set -e; \
	wanted=$$({ pwd; cat pyproject.toml requirements-vllm.lock; } | cksum); \
	if [ "$$(cat .venv-vllm/.opdlm-installed 2>/dev/null)" != "$$wanted" ]; then \
	  echo "Setting up .venv-vllm (a few minutes and about 4 GB the first time)"; \
	  .venv-vllm/bin/python -c "import pip" 2>/dev/null || $(PYTHON) -m venv --clear .venv-vllm; \
	  .venv-vllm/bin/python -m pip install -q --no-deps -r requirements-vllm.lock; \
	  .venv-vllm/bin/python -m pip install -q --no-deps -e .; \
	  echo "$$wanted" > .venv-vllm/.opdlm-installed; \
	fi
	@for file in tests/vllm/test_vllm*.py; do OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm $$file || exit 1; done

# The site, in build/site; a warning or a dead link is an error. To read it: python -m http.server -d build/site
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy opdlm examples benchmarks
	$(BIN)/lint-imports

wheel: env
	rm -rf dist
	$(BIN)/python -m build

# The tools have an environment of their own, so that they change nothing that is locked.
.venv-audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install -q "cyclonedx-bom>=7.5,<8" "pip-audit>=2.10,<3" || { rm -rf .venv-audit; exit 1; }

sbom: .venv-audit
	mkdir -p dist
	.venv-audit/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible -o dist/sbom.json

audit: .venv-audit
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps -r requirements.lock || { \
	  echo "The audit found something above, or could not ask pypi.org, which needs the network." >&2; exit 1; }

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find opdlm tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp holds a checksum of what decides the environment's contents; the path is part of it because
# an editable install points at its checkout. torch goes first and alone, so that whichever build of it
# pip's configuration offers (CPU, CUDA) is kept by everything after.
env:
	@set -e; \
	wanted=$$({ pwd; cat pyproject.toml requirements.lock; } | cksum); \
	if [ "$$(cat $(STAMP) 2>/dev/null)" = "$$wanted" ]; then exit 0; fi; \
	python=$(BIN)/python; $$python -c "" 2>/dev/null || python="$(PYTHON)"; \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($$python -c 'import platform; print(platform.python_version())' 2>/dev/null || echo missing); \
	  echo "opdlm needs Python 3.11 or newer, and $$python is $$found:" \
	    "name another one, for example make PYTHON=python3.12 demo." >&2; exit 1; }; \
	echo "Setting up .venv (a few minutes and about 2 GB the first time)"; \
	[ "$$python" = $(BIN)/python ] || $$python -m venv --clear .venv; \
	$(BIN)/python -c "import pip" 2>/dev/null || $(BIN)/python -m ensurepip; \
	rm -f $(STAMP); \
	$(BIN)/python -m pip install -q "$$(grep '^torch==' requirements.lock)"; \
	$(BIN)/python -m pip install -q -r requirements.lock; \
	$(BIN)/python -m pip install -q --no-deps -e .; \
	echo "$$wanted" > $(STAMP)
