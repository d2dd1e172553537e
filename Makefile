# imgexp: everything a person types. Needs Python 3.10–3.13, GNU make 4 or newer, git.
ifneq ($(filter 3.%,$(MAKE_VERSION)),)
  $(error This is make $(MAKE_VERSION); imgexp needs GNU make 4 or newer (macOS: `brew install make`, then `gmake`))
endif

VENV ?= .venv
export VENV
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYDEVD_DISABLE_FILE_VALIDATION = 1

SHELL := /bin/sh
.SHELLFLAGS := -ec
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help train check test torture gpu lab export readme clean

# $(call environment,EXTRAS): the environment in VENV, made or renewed only when its inputs changed; sets $$bin.
# Its stamp holds the inputs (packaging files, this checkout, the place of the environment) and the extras it has.
define environment
say() { printf '%s\n' "imgexp: $$*"; }
die() { printf '%s\n' "imgexp: $$*" >&2; exit 1; }
here=$$(pwd -P)
case $$VENV in
  '~/'*) venv=$$HOME/$${VENV#'~/'} ;;
  /*)    venv=$$VENV ;;
  *)     venv=$$here/$$VENV ;;
esac
bin=$$venv/bin; stamp=$$venv/imgexp.stamp; want='$(1)'; have=; known=; place=
inputs="$$(cat settings.ini setup.py pyproject.toml | cksum | tr ' ' -) $$here"
if [ -f "$$stamp" ]; then
  known=$$(sed -n 1p "$$stamp"); place=$$(sed -n 2p "$$stamp"); have=$$(sed -n 3p "$$stamp")
fi
case ,$$have, in *,all,*|*,"$$want",*) extras=$$have ;; *) extras=$${have:+$$have,}$$want ;; esac
runs() { [ -x "$$bin/python" ] && "$$bin/python" -m pip --version >/dev/null 2>&1; }
if [ "$$known" != "$$inputs" ] || [ "$$place" != "$$venv" ] || [ "$$extras" != "$$have" ] || ! "$$bin/python" -c '' 2>/dev/null; then
  if [ -d "$$venv" ] && [ ! -f "$$venv/pyvenv.cfg" ] && [ -n "$$(ls -A "$$venv")" ]; then
    die "VENV=$$VENV is a folder with other things in it; name a new one or an environment"
  fi
  if ! runs || { [ -n "$$known" ] && [ "$$place" != "$$venv" ]; }; then
    py=; unfit=
    for p in $$PYTHON python3.11 python3.12 python3.13 python3.10 python3 python; do
      "$$p" -c 'import sys; sys.exit(not (3,10) <= sys.version_info[:2] <= (3,13))' 2>/dev/null || continue
      if "$$p" -c 'import venv, ensurepip' 2>/dev/null; then py=$$p; break; else unfit=$$p; fi
    done
    if [ -z "$$py" ] && [ -n "$$unfit" ]; then
      die "$$unfit cannot make environments (its venv or ensurepip is missing); on Debian: apt install $$unfit-venv"
    fi
    [ -n "$$py" ] || die "no Python 3.10 to 3.13 found; install one (3.11 is best), or name it: make PYTHON=/path/to/python"
    say "making an environment in $$VENV with $$($$py --version)"
    "$$py" -m venv --clear "$$venv"
  fi
  case ,$$extras, in *,all,*) cost='about 7 minutes and 9 GB the first time' ;; *) cost='about 4 minutes and 7 GB the first time' ;; esac
  say "installing imgexp$${extras:+ [$$extras]} into $$VENV ($$cost)"
  rm -f "$$stamp"
  "$$bin/python" -m pip install -q --no-input -e ".$${extras:+[$$extras]}" >"$$venv/pip.log" 2>&1 || {
    cat "$$venv/pip.log" >&2
    die "pip could not install imgexp into $$VENV: its message stands above"
  }
  printf '%s\n' "$$inputs" "$$venv" "$$extras" >"$$stamp"
fi
PATH=$$bin:$$PATH; export PATH; unset VIRTUAL_ENV PYTHONHOME
endef

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'
	echo "  VENV=path puts the environment elsewhere (now: $$VENV)"

train: ## train on half of the embedded digits; ARGS="-p epochs 2" changes parameters of nbs/03_train.ipynb
	@$(call environment,)
	folder=$${IMGEXP_ROOT:-.}/runs; mkdir -p "$$folder"
	notebook=$${folder#./}/$$(date +%Y%m%d-%H%M%S)-03_train-$$(od -An -N4 -tx1 /dev/urandom | tr -d ' \n').ipynb
	IMGEXP_RUN_LOG=$$(mktemp); export IMGEXP_RUN_LOG; trap 'rm -f "$$IMGEXP_RUN_LOG"' EXIT
	bar=--no-progress-bar; if [ -t 2 ]; then bar=--progress-bar; fi
	say "training: papermill nbs/03_train.ipynb $$notebook -p subset 0.5 $(ARGS)"
	"$$bin/papermill" nbs/03_train.ipynb "$$notebook" -p subset 0.5 $(ARGS) $$bar --log-level ERROR
	run=$$(cut -f1 "$$IMGEXP_RUN_LOG" | grep -- '-03_train-' | tail -n 1)
	"$$bin/imgexp" runs show "$$run" | sed '/^parameters/,$$d'
	run=$${folder#./}/$$(basename "$$run")
	mv "$$notebook" "$$run/notebook.ipynb"
	echo "notebook   $$run/notebook.ipynb"

test: ## everything that is checked: notebooks clean and exported, nbdev_test, pytest
	@$(call environment,all)
	"$$bin/python" tests/check.py
	tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM
	export IMGEXP_ROOT="$$tmp" WANDB_MODE=offline
	before=$$(ls -A runs)
	cores=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
	workers=$$(( cores < 2 ? 1 : cores < 8 ? 2 : 4 ))
	say "running the notebooks as tests ($$workers at a time)"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( (cores + workers - 1) / workers ))}; export OMP_NUM_THREADS
	"$$bin/nbdev_test" --n_workers $$workers --timing
	say "running tests/ ($$((workers + 1)) files at a time: many tests wait for other processes)"
	"$$bin/python" -m pytest tests -q -n $$((workers + 1)) --dist loadfile --no-loadscope-reorder
	[ "$$(ls -A runs)" = "$$before" ] || die 'the tests left something in runs/'

check: ## after each change: exports, code statistics, the fast tests (two minutes)
	@$(call environment,all)
	"$$bin/python" tests/check.py
	"$$bin/python" tests/counts.py
	tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM
	export IMGEXP_ROOT="$$tmp" WANDB_MODE=offline
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}; export OMP_NUM_THREADS
	"$$bin/python" -m pytest tests -q -m fast -n 2 --dist loadfile $(ARGS)

torture: ## kill -9 twenty times for each feature of training: does every run end as if undisturbed? (2.5 hours)
	@$(call environment,all)
	"$$bin/python" tests/torture.py $(ARGS)

gpu: ## on an NVIDIA GPU: tests, exact resume, loader, steps beside others, transfer (35 minutes); ARGS="--only loader"
	@if [ -z "$${VENV_GIVEN:=$(filter command environment,$(origin VENV))}" ] && "$${PYTHON:-python3}" -c 'import torch, imgexp.train, pytest' 2>/dev/null; then
	  exec "$${PYTHON:-python3}" bench/gpu.py $(ARGS)
	fi
	$(call environment,all)
	"$$bin/python" bench/gpu.py $(ARGS)

lab: ## open the notebooks in JupyterLab
	@$(call environment,lab)
	root=; if [ "$$(id -u)" = 0 ]; then root=--allow-root; fi
	exec "$$bin/jupyter" lab $$root --ServerApp.root_dir="$$here" --LabApp.default_url=/lab/tree/nbs/index.ipynb

export: ## after editing notebooks: write imgexp/ and README.md from them, and clean them
	@$(call environment,all)
	"$$bin/nbdev_clean"
	"$$bin/nbdev_export"
	"$$bin/python" tests/params_cells.py
	"$$bin/python" tests/readme.py

readme: ## write README.md from nbs/index.ipynb
	@$(call environment,all)
	"$$bin/python" tests/readme.py

clean: ## remove build leftovers and caches; runs and the environment stay
	@rm -rf build dist _docs _proc .pytest_cache
	find imgexp tests nbs bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} + 2>/dev/null || true
