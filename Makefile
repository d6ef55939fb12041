# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint chat backbones clean

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

.venv/ready-test: .venv/ready
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $@

# QUICK=1 does the same in about three minutes with whatever quality that gives.
demo: .venv/ready
	$(BIN)/python launch/demo.py --output=demo $(if $(QUICK),--quick)

chat: .venv/ready
	$(BIN)/python launch/chat.py --checkpoint=demo/runs/stage3

test: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Trains the shipped backbones of the embedded world again (about an hour on two cores).
backbones: .venv/ready
	mkdir -p backbones
	cd backbones && ../$(BIN)/python ../launch/build_backbones.py --output=bases --tokenizer
	cd backbones && ../$(BIN)/python ../launch/train.py --config=../configs/world_llm.py --workdir=runs/world_llm
	cd backbones && ../$(BIN)/python ../launch/train.py --config=../configs/world_vision.py --workdir=runs/world_vision
	cd backbones && ../$(BIN)/python ../launch/train.py --config=../configs/world_bert.py --workdir=runs/world_bert
	cd backbones && ../$(BIN)/python ../launch/build_backbones.py --output=bases --export=runs

clean:
	rm -rf .venv demo backbones
