# Two commands matter: `make course` and `make test`. `make` alone lists the rest.
VENV ?= .venv
# Processes of `make test`, a thread each
WORKERS ?= 2
PY := $(VENV)/bin/python
# The first of these that is Python 3.11 or newer and can make environments; PYTHON=/path/to/python3 names another
CANDIDATES := python3.13 python3.12 python3.11 python3.14 python3 python
find = for p in $(CANDIDATES); do "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec echo "$$p"; done; \
  for p in $(CANDIDATES); do command -v "$$p" && exit; done
ifneq ($(origin PYTHON),command line)
PYTHON = $(shell $(find))
else
EXACT := --exact
endif

# What the reader gave to `make course`, taken as written: only the command line counts, and nothing in it is expanded
GIVEN := $(foreach v,DATA INPUT OUTPUT INSTRUCTION PROFILE,$(if $(filter command,$(origin $(v))),$(if $(value $(v)),$(v))))
$(foreach v,$(GIVEN),$(eval override $(v) := $$(value $(v)))$(eval export $(v)))
FLAG_DATA := --data
FLAG_INPUT := --input
FLAG_OUTPUT := --output
FLAG_INSTRUCTION := --instruction
FLAG_PROFILE := --profile
arguments = $(foreach v,$(GIVEN),$(FLAG_$(v)) "$$$(v)")
variables = $(if $(filter DATA,$(GIVEN)),FTCOURSE_CORPUS="$$DATA") $(if $(filter PROFILE,$(GIVEN)),FTCOURSE_PROFILE="$$PROFILE")

.PHONY: help setup course lab lessons test test-labelstudio docs bench clean
.DEFAULT_GOAL := help

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo "Your own data: make course DATA=tickets.csv [INPUT=column OUTPUT=column INSTRUCTION='what to do']"
	@echo "Public data:   make course DATA=e2e (or banking77); a quick try: PROFILE=test"

setup: ## the environment in .venv: 1 to 6 minutes once, then under a second
	@py="$(PYTHON)"; if [ -z "$$py" ] || ! command -v "$$py" >/dev/null; then \
	  echo "No Python was found$${py:+ under the name $$py}. Install Python 3.11 or newer (Debian and Ubuntu: apt install python3 python3-venv;"; \
	  echo "macOS: brew install python; all: python.org), or name yours: make setup PYTHON=/path/to/python3"; exit 1; fi; \
	"$$py" tools/setup.py --venv "$(VENV)" $(EXACT)

course: setup ## lesson 00 from top to bottom: baseline, fine-tune, scores, report; under 10 minutes on two cores
	@$(variables) $(PY) tools/course.py $(arguments)

lab: setup ## JupyterLab on the lessons; starts in seconds
	@echo "Starting JupyterLab on nbs/ (stop it with Ctrl-C) …"
	@"$(abspath $(VENV))/bin/jupyter" lab --notebook-dir=nbs

lessons: setup ## run every lesson and save what it shows: hours on two cores; what the cases have computed is kept
	@$(PY) tools/lessons.py
	@$(VENV)/bin/nbdev-clean

test: setup ## every test: about 50 minutes on two cores
	@$(PY) tools/setup.py --browser
	@echo "Running every test, the lessons among them: about 50 minutes on two cores …"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -q --durations=25 -n $(WORKERS) --dist loadgroup

test-labelstudio: setup ## lessons 05b and 08b against a real Label Studio on this machine: installed once (5 to 6 minutes, 1 GB), then 1 to 4 minutes
	@$(PY) tools/labelstudio.py

docs: setup ## the site, without Quarto, into _proc/_docs: about 10 seconds
	@$(PY) tools/pages.py

bench: setup ## speed beside sacreBLEU, rouge-score, datasketch, and Hugging Face's chat templates, Trainer and generate; the memory planner's error, the LoRA layer beside peft's: about 45 minutes; ROUNDS=5 for more rounds
	@echo "Measuring the metrics (2 minutes), reading and encoding (3), near copies among 100,000 rows (2), the memory planner (about 5), our LoRA layer (about 2), then training (about half an hour on two cores); leave the machine alone meanwhile …"
	@missed=0; for b in metrics formats quality memory lora training; do $(PY) tests/benchmarks/bench_$$b.py $(if $(ROUNDS),--rounds "$(ROUNDS)") || missed=1; done; exit $$missed

clean: ## take away what was built; the environments in .venv and .venv-labelstudio and your runs/ stay
	rm -rf _proc _docs _site build dist .pytest_cache .hypothesis nbdev.yml sidebar.yml
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.venv-labelstudio/*' -prune -exec rm -rf {} +
