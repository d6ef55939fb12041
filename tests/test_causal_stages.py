"""The LLM of a stage swapped by flags: a small LLaMA trains the miniature's stages 2 and 3."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import small_runs
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from xllm_jax.core import checkpoint

ROOT = Path(__file__).parents[1]
SPECIALS = ["<s>", "</s>", "<pad>"]
FLAGS = (
    "--config.parts.llm.network=causal.Causal",
    "--config.parts.llm.fields.alpha=None",
    "--config.parts.llm.fields.depth=2",
    "--config.parts.llm.fields.key_heads=2",
    "--config.parts.llm.fields.vocab=600",
    "--config.data.llm_family=causal",
    "--config.data.template=vicuna_v1",
    "--config.data.length=448",
    "--config.data.rows=4",
    "--config.data.examples=4",
    "--config.data.threads=1",
    "--config.init.vision_encoder=",
    "--config.init.image_interface=",
    "--config.init.llm=",
    "--config.unroll=1",
    "--config.log_every=1",
    "--config.validation.every=0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world, and a tokenizer of the form that LLaMA's are published in."""
    folder = tmp_path_factory.mktemp("causal")
    world = small_runs.make_world(folder, train_instructions=24)
    texts = [path.read_text("utf-8") for path in world.rglob("*.json")]
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet),
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    (folder / "tokenizer").mkdir()
    made.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def run(name: str, *arguments: str) -> str:
    done = forked.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def trained(folder: Path, stage: str, workdir: Path, *more: str) -> list[float]:
    """Losses of the miniature's stage, trained on the small LLaMA."""
    config = f"--config={ROOT / 'configs' / stage}.py:tiny"
    data = (f"--config.data.root={folder / 'world'}", f"--config.data.tokenizer={folder}/tokenizer")
    run("train", config, f"--workdir={workdir}", *FLAGS, *data, *more)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_stage_2_trains_on_a_small_llama(folder):
    """The loss falls, only the interface trains, and the run describes a held-out picture."""
    workdir = folder / "run"
    quick = ("--config.optimizer.warmup_steps=1", "--config.optimizer.peak=5e-3")
    losses = trained(folder, "stage2_image", workdir, "--config.steps=6", *quick)
    assert len(losses) >= 5 and np.isfinite(losses).all() and losses[-1] < losses[0]
    moved = checkpoint.open_leaves(workdir / "final")
    assert moved and all(path.startswith("image_interface/") for path in moved)
    image = next((folder / "world").rglob("*.jpg"))
    for search in ((), ("--decode=beam", "--beams=2")):
        said = run(
            "generate",
            f"--checkpoint={workdir}",
            f"--image={image}",
            "--prompt=图中有什么？",
            "--max_tokens=5",
            *search,
        )
        assert said.endswith("\n")


def test_stage_3_trains_on_it(folder):
    """Pictures, clips and speech at once; adapters alone move, of a new interface as well."""
    fresh = ("video_interface", "speech_encoder", "speech_interface")
    losses = trained(
        folder,
        "stage3_instruction",
        folder / "stage3",
        *(f"--config.init.{name}=" for name in fresh),
        "--config.parts.video_interface.network=perceiver.PerceiverInterface",
        "--config.parts.video_interface.fields.queries=8",
        "--config.data.embeddings.video=8",
        f"--config.data.characters={folder / 'world' / 'characters.txt'}",
        "--config.data.length=640",
        "--config.steps=3",
    )
    assert len(losses) == 3 and np.isfinite(losses).all()
    moved = checkpoint.open_leaves(folder / "stage3" / "final")
    adapters = tuple(f"{name}_interface/adapter/" for name in ("image", "video", "speech"))
    assert all(any(path.startswith(one) for path in moved) for one in adapters)
    whole = {path for path in moved if not path.startswith(adapters)}
    assert not any(path.startswith("llm/") for path in whole)
