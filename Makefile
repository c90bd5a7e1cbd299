# make ablation     the whole study on the embedded world, from nothing to tables (minutes on two cores)
# make test         the tests                    make lint      style of code and workflow
# make test-kernels the numeric tests again, with the lesser kernels (plain, AVX2) that this processor can run
# make smoke        a study in small, for real   make dry-run   every shipped study, planned only
# make slurm-test   the same on a real Slurm of one node, which is installed, started and removed (root, Debian)
# make documents-test   pages in a real browser, tables in a real LaTeX, which are installed if missing (root, Debian)
# make test-faults  kills and hostile inputs, half an hour of them on two cores; FAULTS=0.1: a tenth
# make bench        speed beside TRL, a quarter of an hour on two cores; BENCH="--quick" only tries whether it works
# make keys         the pages and JSON schemas of all keys, from the source
# make report       tables, figures and results/<study>/report.html of a study, from the runs that are there
# make provenance   provenance.html: which job made what, with which settings (Snakemake's own report)
# make docs         the documents as a site, site/index.html, which needs no network and no torch
# make paper        tables, figures and numbers.tex of a paper, from the committed numbers of studies; trains nothing
#
# Every target first sets up what it needs in $(VENV). Variables:
#   CONFIG=config/x.yaml   the study of `ablation`, `report` and `provenance`      CORES=4   how many cores to use
#   RETRAIN=true           let `ablation` train finished runs again whose settings have changed
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   torch without CUDA: a much smaller download

PYTHON ?= python3
VENV ?= .venv
CORES ?= all
CONFIG ?= config/config.yaml
TORCH_INDEX ?=

OVERLAYS := config/hh-rlhf-tiny.yaml config/neutrality.yaml config/quick-exp.yaml
STUDIES := $(filter-out config/datasets.yaml config/hypotheses.yaml $(OVERLAYS),$(wildcard config/*.yaml))
READY := $(VENV)/.ready
DOCS := $(VENV)-docs
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"
SNAKEMAKE := $(RUN) snakemake
# Jobs are forks of one process that has imported what they need (docs/decisions/0024-warm-starts.md).
WARM := $(RUN) python -m discobeta.warm snakemake
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.PHONY: ablation smoke test test-kernels slurm-test documents-test test-faults lint dry-run bench keys report provenance \
	paper docs clean
.NOTPARALLEL:

# One line that says how far it is, and the end of what fails; Snakemake's own words are in .snakemake/log.
QUIETLY := --logger discobeta

ablation: $(READY)
	@$(WARM) --cores $(CORES) $(QUIETLY) --configfile $(CONFIG) $(if $(RETRAIN),--config retrain=$(RETRAIN))
	@echo && $(RUN) discobeta headline --configfile $(CONFIG)

smoke: $(READY)
	@$(WARM) --cores $(CORES) $(QUIETLY) --configfile config/smoke.yaml
	@$(RUN) discobeta plan --configfile config/smoke.yaml | tail -n 1

report: $(READY)
	$(RUN) discobeta report --configfile $(CONFIG)

provenance: $(READY)
	$(SNAKEMAKE) --configfile $(CONFIG) --report provenance.html

paper: $(READY)
	$(RUN) discobeta paper

# One thread per test process: with more processes than cores, threads wait for each other.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 $(RUN) pytest
test: $(READY)
	$(PYTEST) --numprocesses auto

# torch takes the best kernels that the processor has, as in `make test`, unless told to take lesser ones; each rounds
# in its own way.
KERNELS := import torch; best = torch.backends.cpu.get_cpu_capability().lower(); of_x86 = ["default", "avx2", "avx512"]; \
	print(*(of_x86[: of_x86.index(best)] if best in of_x86 else []))
test-kernels: $(READY)
	@all=$$(env -u ATEN_CPU_CAPABILITY $(RUN) python -c '$(KERNELS)') && for kernels in $$all; do \
		echo "=== $$kernels kernels"; \
		ATEN_CPU_CAPABILITY=$$kernels $(PYTEST) --numprocesses auto -m numeric || exit; \
	done

# Tests that were skipped are listed with their reason: on a machine that cannot run a cluster, all are.
slurm-test: $(READY)
	$(PYTEST) --durations=0 tests/slurm

# Likewise: without a browser or LaTeX, and where none may be installed, the tests are skipped with the reason.
documents-test: $(READY)
	$(PYTEST) --durations=0 tests/documents

# Drawn by the names of the tests; SEED=2 draws other ones.
test-faults: $(READY)
	$(PYTEST) --numprocesses logical --dist loadgroup --durations=10 $(if $(SEED),--hypothesis-seed=$(SEED)) tests/faults

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) snakefmt --check workflow
	$(SNAKEMAKE) --lint --configfile config/config.yaml
	$(SNAKEMAKE) --lint --configfile config/qwen3-0.6b.yaml

define dry_run
$(SNAKEMAKE) --dry-run --nolock --quiet rules --configfile $(1)

endef
dry-run: $(READY)
	$(foreach study,$(STUDIES),$(call dry_run,$(study)))
	$(call dry_run,config/hh-rlhf.yaml config/hh-rlhf-tiny.yaml)
	$(call dry_run,config/config.yaml config/neutrality.yaml)
	$(call dry_run,config/config.yaml config/quick-exp.yaml)
	$(foreach world,$(wildcard config/worlds/*.yaml),$(call dry_run,config/world.yaml $(world)))

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet
	@! grep -rlE '<(script|link|img)[^>]+(src|href)="?https?:' site --include='*.html' # nothing from elsewhere
	@echo "site/index.html, or with its search: python3 -m http.server --directory site"

# Nothing else should run on the machine meanwhile.
bench: $(READY)
	$(RUN) python benchmarks/bench.py $(BENCH)

keys: $(READY)
	$(RUN) python -m discobeta.design.keys

# What a study computed is not removed here: it may have taken days.
clean:
	rm -rf $(VENV) $(DOCS) site .pytest_cache .ruff_cache build src/*.egg-info

# Before anything is downloaded.
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
define check_python
@$(PYTHON) -c '$(IS_NEW_ENOUGH)' 2>/dev/null || \
	{ echo "discobeta needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=python3.11 ..." >&2; exit 2; }
endef

# torch comes first and on its own, so that its index serves nothing else.
$(READY): pyproject.toml constraints.txt
	$(check_python)
	@echo "Installing into $(VENV), once; this takes minutes, most of them for downloads."
	@echo "1 of 3: a virtual environment, by $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@echo "2 of 3: torch, $(if $(TORCH_INDEX),from $(TORCH_INDEX),with CUDA where there is a build with it: some 3 GB;" \
		"without a GPU TORCH_INDEX=https://download.pytorch.org/whl/cpu takes 0.2 GB)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	@echo "3 of 3: discobeta with transformers, Snakemake and what else it needs: some 0.3 GB"
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@echo "Installed; the next command does not do it again."
	@touch $@

EXTRA_DOCS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
$(DOCS)/.ready: pyproject.toml constraints.txt
	$(check_python)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		$$($(PYTHON) -c '$(EXTRA_DOCS)')
	@touch $@
