# Two commands do everything; both set up what is missing first:
#   make table                run the chosen experiments, say what is being done, and print their results page
#   make test                 check that notebooks are clean and exported, run nbdev_test and pytest
# Choosing what `make table` and `dvc repro` run:
#   make coco DATA=<folder>   the COCO experiments on a COCO folder (likewise make leeds); RECIPE=<name> chooses one of their recipes
#   make sample               the embedded sample again
# Parts of it:
#   make table TABLE=4        only the rows of one of the paper's tables (and `dvc repro evaluate@<row>-<seed>` only one run)
#   make measure              only what the rows cost in time and memory; needs no data
#   make pages                only the pages of what has been run so far
# Also:
#   make setup                only set up
#   make lab                  JupyterLab on the notebooks
#   make survive              kill, interrupt and break training runs in all ways (minutes; make test does it in one)
#   make gpu                  all that has to be known about a GPU, in nine minutes, into results/gpu/; GPU='--wheels FOLDER --data FOLDER' (needs no make setup)
#   make render               run the notebooks whose code changed, and keep their figures
#   make chapters             each chapter's list of notebooks, from their titles
#   make site                 the documentation site, into outputs/site/html/ (check it: make site-check)
#   make publish              keep metrics, costs and pages in results/, and write README.md
PYTHON ?= python3.11
VENV ?= .venv
# Folders may have spaces and quotes in their names: no such name is a target, and recipes read them as the shell's own variables.
override VENV := $(if $(filter /%,$(firstword $(VENV))),$(VENV),$(CURDIR)/$(VENV))
export PATH := $(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The mark names the checkout that the environment serves, and what it was made from.
MARK := $(VENV)/srl_pose.installed
WANT := $(CURDIR) $(shell cat pyproject.toml constraints.txt | cksum)
export VENV MARK WANT DATA RECIPE TABLE

.PHONY: table measure pages test survive gpu setup environment lab coco leeds sample publish readme chapters render site site-check

# outputs/SET/RECIPE of params.yaml
HERE = outputs/$$(sed -n 's/^set: *\([^ ]*\).*/\1/p' params.yaml)/$$(sed -n 's/^recipe: *\([^ ]*\).*/\1/p' params.yaml)

table: setup
	@srl-pose table $(if $(TABLE),"$$TABLE")

measure: setup
	@dvc repro --single-item code measure

pages: setup
	@mkdir -p $(HERE)/metrics $(HERE)/../measured
	@dvc repro --single-item code table
	@cat $(HERE)/tables/results.md

# A chapter at a time: what a process imports and keeps for one notebook after the other would grow to gigabytes.
test: export OMP_NUM_THREADS := 1
test: export PYTHONFAULTHANDLER := 1
test: setup
	@set -e; for chapter in nbs/*/; do echo "$$chapter"; nbdev_test --path "$$chapter" --n_workers 2 --timing; done
	nbdev_test --path nbs --skip_folder_re . --n_workers 2 --timing
	python -m pytest -n 2 tests

gpu:
	bash scripts/gpu.sh $(GPU)

survive: setup
	OMP_NUM_THREADS=1 python -m pytest -m kill tests/test_survive.py

setup:
	@[ "$$(cat "$$MARK" 2>/dev/null)" = "$$WANT" ] || $(MAKE) --no-print-directory environment
	@scripts/git.sh

environment:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no $(PYTHON); say which Python >= 3.11: make PYTHON=..." >&2; exit 1; }
	@[ -x "$$VENV/bin/python" ] || "$(PYTHON)" -m venv "$$VENV" || { rm -rf "$$VENV"; exit 1; }
	@rm -f "$$MARK"
	@echo "Installing the pinned packages into $$VENV (about 6 GB with torch; a few minutes) ..."
	@python -m pip install --quiet --constraint constraints.txt setuptools \
		&& python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]' \
		|| { echo "error: the packages could not be installed into $$VENV: see above. This needs the network (a package" \
			"index) and about 6 GB of disk. Nothing else was changed; the same command tries again." >&2; exit 1; }
	@printf '%s\n' "$$WANT" > "$$MARK"

coco leeds sample: setup
	@srl-pose select $@ $${DATA:+--data "$$DATA"} $${RECIPE:+--recipe "$$RECIPE"}

lab: setup
	jupyter lab nbs

site: setup
	@python scripts/site.py build

site-check: setup
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { echo "error: no Chromium (apt install chromium)" >&2; exit 1; }
	@python scripts/site.py check

publish: setup
	@srl-pose publish
	@$(MAKE) --no-print-directory readme

render: setup
	@python scripts/render.py && nbdev_clean

chapters: setup
	@python scripts/chapters.py

readme: setup chapters
	@mkdir -p outputs && rm -rf README_files
	papermill --cwd nbs --no-progress-bar --log-level ERROR nbs/index.ipynb outputs/README.ipynb
	jupyter nbconvert --log-level ERROR --to markdown --output-dir . --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_input_tags=hide_input outputs/README.ipynb
	@sed -i.bak -e 's#](\.\./#](#g' -e 's#!\[png\]#![how data flows through the block]#' README.md && rm README.md.bak
