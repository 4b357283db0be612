# make setup      the virtual environment, once
# make demo       a data set, a data set of packs, a trained model, in a few minutes on two cores
# make test       the tests; make test-slow, the slow ones and those for a GPU; make check, lint and types

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
SAMPLES ?= 4000
STEPS ?= 700

.PHONY: setup demo demo-short test test-slow check format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[preprocess,train,codecs,s3,report,dev]'
	@touch $@

demo: setup
	@echo '== 1/4 captioned pictures of shapes, and a tokenizer for their captions'
	@$(BIN)/python -m preprocess synthesize $(DEMO)/raw --samples $(SAMPLES)
	@echo '== 2/4 scan, plan, pack: from tars to finished packs'
	@$(BIN)/python -m preprocess run configs/preprocess/demo.toml --output $(DEMO)/dataset \
		--tokenizer $(DEMO)/raw/tokenizer --sources.shapes.paths '$(DEMO)/raw/tars/*.tar'
	@echo '== 3/4 train a small SigLIP2 + Llama on the mapped packs'
	@$(BIN)/python -m trainer train configs/train/demo.toml --dataset $(DEMO)/dataset --out $(DEMO)/run --steps $(STEPS)
	@echo '== 4/4 validation, with the right pictures and with wrong ones'
	@echo 'data set  $(DEMO)/dataset  (report: $(DEMO)/dataset/report/report.txt)'
	@echo 'run       $(DEMO)/run  (curves: $(BIN)/tensorboard --logdir $(DEMO)/run/tensorboard)'
	@$(BIN)/python -m trainer eval $(DEMO)/run
	@echo 'try next:'
	@echo '  $(BIN)/python -m preprocess inspect $(DEMO)/dataset --pack 0'
	@echo '  $(BIN)/python -m preprocess verify $(DEMO)/dataset'
	@echo '  your own tars: configs/preprocess/captions.toml'

demo-short:
	@$(MAKE) --no-print-directory demo DEMO=demo/short SAMPLES=400 STEPS=50

# Two processes on two cores: one thread each, or they wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m 'not slow and not gpu' -q

test-slow: setup
	$(BIN)/pytest -m 'slow or gpu' -q

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .hypothesis *.egg-info
