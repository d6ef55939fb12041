# Two commands do everything: `make demo` and `make test`. Both set up .venv first, with the versions
# of requirements.lock. PYTHON=python3.12 takes another Python, which makes .venv anew.
PYTHON ?= python3
BIN := .venv/bin
VERSION := import sys; print(sys.version_info[:2])

# pip's output goes to a log that is shown when it fails.
define install
	@echo "Installing into .venv (log: .venv/pip.log)"
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint=requirements.lock $(1) \
	  >.venv/pip.log 2>&1 || { cat .venv/pip.log >&2; exit 1; }
endef

.PHONY: demo ablation test lint chat serve backbones lock clean

ifeq ($(origin PYTHON),command line)
ifneq ($(shell $(PYTHON) -c '$(VERSION)'),$(shell $(BIN)/python -c '$(VERSION)' 2>/dev/null))
CLEAR := --clear
.PHONY: .venv/ready
endif
endif

.venv/ready: requirements.txt requirements.lock pyproject.toml
	@$(PYTHON) -m venv $(CLEAR) .venv
	$(call install,--editable=.)
	@touch $@

.venv/ready-test: .venv/ready
	$(call install,--editable='.[test]')
	@touch $@

.venv/ready-serve: .venv/ready
	$(call install,--editable='.[demo]')
	@touch $@

# QUICK=1 does the same in three to four minutes with whatever quality that gives. SEED=1 trains with
# another seed, SEEDS=3 with three, one after another.
demo: .venv/ready
	$(BIN)/xllm demo --output=demo $(if $(QUICK),--quick) $(if $(SEED),--seed=$(SEED)) \
	  $(if $(SEEDS),--seeds=$(SEEDS))

# What tuning the LLM and packed bases change, on what `make demo` has trained.
ablation: .venv/ready
	$(BIN)/xllm ablation --output=demo $(if $(SEEDS),--seeds=$(SEEDS))

chat: .venv/ready
	$(BIN)/xllm chat --checkpoint=demo/runs/stage3

# The server and its web page, on what `make demo` has trained.
serve: .venv/ready-serve
	$(BIN)/xllm serve --checkpoint=demo/runs/stage3

# Many processes import the same files; a variable that keeps Python from compiling them once is
# emptied.
test: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright

# Writes the versions that requirements.txt and the extras of pyproject.toml resolve to, for every
# Python. Pins that still fit are kept; UPGRADE=1 takes the newest.
lock: .venv/ready
	$(call install,uv)
	$(BIN)/uv pip compile --quiet --universal --python-version=3.11 --all-extras --no-annotate \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command='make lock' \
	  $(if $(UPGRADE),--upgrade) --output-file=requirements.lock pyproject.toml

# Trains the shipped backbones of the synthetic world again (about five hours of one core).
backbones: .venv/ready
	mkdir -p backbones
	cd backbones && ../$(BIN)/xllm build-backbones --output=bases --tokenizer
	cd backbones && ../$(BIN)/xllm train --config=world_llm --workdir=runs/world_llm
	cd backbones && ../$(BIN)/xllm train --config=world_llm_slots --workdir=runs/world_llm_slots
	cd backbones && ../$(BIN)/xllm train --config=world_llm_requests --workdir=runs/world_llm_requests
	cd backbones && ../$(BIN)/xllm train --config=world_vision --workdir=runs/world_vision
	cd backbones && ../$(BIN)/xllm build-backbones --output=bases --export=runs
	cd backbones && ../$(BIN)/xllm world --output=pictures --images=16000 --seed=9
	cd backbones && ../$(BIN)/xllm train --config=world_llm --config.seed=7 --config.steps=6000 \
	  --workdir=runs/world_other_llm
	cd backbones && ../$(BIN)/xllm train --config=world_blip2 --workdir=runs/world_blip2
	cd backbones && ../$(BIN)/xllm train --config=world_bert --workdir=runs/world_bert
	cd backbones && ../$(BIN)/xllm train --config=world_text_encoder \
	  --workdir=runs/world_text_encoder
	cd backbones && ../$(BIN)/xllm train --config=world_text_places --workdir=runs/world_text_places
	cd backbones && ../$(BIN)/xllm train --config=world_autoencoder --workdir=runs/world_autoencoder
	cd backbones && ../$(BIN)/xllm build-backbones --output=bases --latents=runs
	cd backbones && ../$(BIN)/xllm train --config=world_diffusion --workdir=runs/world_diffusion
	cd backbones && ../$(BIN)/xllm build-backbones --output=bases --export=runs

clean:
	rm -rf .venv demo backbones
