PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench gpu reference clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: .venv/ready  ## the environment alone, at .venv, with the project installed editable

REQUIREMENTS := requirements.txt requirements-wandb.txt requirements-export.txt requirements-dev.txt

.venv/ready: $(REQUIREMENTS) pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q $(REQUIREMENTS:%=-r %)
	$(BIN)/pip install --disable-pip-version-check -q --no-deps -e .
	touch $@

demo: setup  ## train on the built-in data set, validate, label a picture (about 5 minutes on 2 cores)
	$(BIN)/python train.py --config configs/demo.yaml --output runs/demo --overwrite
	$(BIN)/python validate.py --model-path runs/demo/best.pt --json runs/demo/validation.json
	$(BIN)/python infer.py --model-path runs/demo/best.pt --output runs/demo/predictions \
		--pic-path data/shapes/val2014/COCO_val2014_000000000056.jpg
	@echo "look at runs/demo/curves.png and runs/demo/predictions"

lint: setup  ## ruff, its formatter and mypy, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, types and tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup

bench: setup  ## every benchmark of a CPU that needs no data: prints tables, takes a while
	@for each in $(filter-out bench/gpu% bench/backbones% bench/cache.py bench/loading.py bench/scale.py,$(wildcard bench/*.py)); do echo "## $$each"; $(BIN)/python $$each || exit 1; done

DEVICE ?= cuda
gpu:  ## CUDA tests, and the benchmark of a GPU: 4 minutes; prints tables, writes results/gpu
ifeq ($(DEVICE),cuda)
	@nvidia-smi --list-gpus 2>/dev/null | grep -q GPU || \
		{ echo "make gpu needs an NVIDIA GPU, and nvidia-smi finds none: to try it without," \
		"make gpu DEVICE=cpu" >&2; exit 2; }
endif
	@$(MAKE) --no-print-directory setup
	$(BIN)/python -m pytest -m cuda
	$(BIN)/python bench/gpu.py --device $(DEVICE) \
		$(if $(filter cpu,$(DEVICE)),--quick --output runs/gpu)

VOC ?= VOCdevkit
WEIGHTS ?= tf_efficientnet_lite0.safetensors
reference: setup  ## does training here reach what it should? needs VOC=VOCdevkit WEIGHTS=LITE0.safetensors
	$(BIN)/python train.py $(VOC) --config configs/voc2007_lite0_160_features.yaml --missing-images skip \
		--model-path $(WEIGHTS) --reference voc2007_lite0 --seed 20 --output runs/reference --overwrite

clean:  ## remove the environment, runs and drawn data
	rm -rf .venv runs data .pytest_cache .mypy_cache .ruff_cache
