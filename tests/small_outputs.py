"""A stage whose answers hold pictures, which trains in seconds; captions without any picture."""

from __future__ import annotations

import json
from pathlib import Path

import small_clip
import small_stage

from xllm_jax.core.stage import Output, Part, Signals, Source

FIRST, COUNT = 521, 4  # the miniature's tokenizer has 521 pieces
TOKENS = 8  # of a caption
CAPTIONS = (
    "红色的圆",
    "蓝色的方块",
    "一个绿色的圆和一个方块",
    "red ball",
    "ball red ball",
    "图中有圆",
)


def tokenizer(folder: Path) -> str:
    """A tokenizer of CLIP's kind."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = small_clip.vocabulary()
    (folder / "vocab.json").write_text(json.dumps(pieces))
    lines = ["#version: 0.2", *map(" ".join, small_clip.MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return str(folder)


def captions(folder: Path) -> str:
    """A table of captions, whose pictures nobody opens."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{number}.jpg\t{text}" for number, text in enumerate(CAPTIONS * 4)]
    (folder / "train.tsv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n", "utf-8")
    return str(folder)


def stage(folder: Path, **changes):
    """The small stage with requests to draw; `changes` replace fields of the Stage."""
    made = small_stage.stage(**{"unroll": 1} | changes)
    made.parts |= {
        "signal_tokens": Part("outputs.signal_tokens.SignalTokens", "tiny", {"width": 32}),
        "image_projection": Part(
            "outputs.projection.TransformerProjection",
            "tiny",
            {"llm_width": 32, "width": 16, "queries": TOKENS, "output_width": 12},
        ),
        "text_encoder": Part(
            "clip_text.ClipText",
            "tiny",
            {"width": 12, "depth": 1, "heads": 2, "hidden": 24, "vocabulary": 600},
        ),
    }
    made.outputs = {"image": Output("image_projection", "text_encoder")}
    made.objective = changes.get("objective", "align")
    made.trainable = changes.get("trainable", (r"signal_tokens/.*", r"image_projection/.*"))
    made.data.sources = {
        "captions": Source("requests", captions(folder / "captions"), options={"reader": "table"})
    }
    made.data.batch_format = "conversation"
    made.data.signals = {"image": Signals(FIRST, COUNT, runs=3)}
    made.data.caption_tokenizer = tokenizer(folder / "tokenizer")
    made.data.caption_length = TOKENS
    made.data.rows, made.data.examples = 8, 16
    return made
