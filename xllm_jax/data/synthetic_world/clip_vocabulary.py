"""The mini text encoder's vocabulary, in the two files of CLIP's byte-pair tokenizer.

Nothing is learnt: the merges put the bytes of each of the world's characters together, then the
characters of each of its words, so that a pair never seen is two words that are known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from xllm_jax.core import atomic
from xllm_jax.data.synthetic_world.requests import RELATIONS, sample_request
from xllm_jax.data.synthetic_world.scene import COLORS, PLACES, SHAPES

START, END = "<|startoftext|>", "<|endoftext|>"
LAST = "</w>"  # marks the last piece of a run of letters
WORDS = (*COLORS, *SHAPES, *PLACES, *RELATIONS, "大的", "小的", "一个", "两个", "三个", "图中")
CONFIG = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 32,
    "do_lower_case": True,
    "add_prefix_space": False,
    "errors": "replace",
    "bos_token": START,
    "eos_token": END,
    "unk_token": END,
    "pad_token": END,
}


def write(folder: Path) -> Path:
    """Writes vocab.json, merges.txt and tokenizer_config.json into a folder, and returns it."""
    rng = np.random.default_rng(0)
    said = "".join(sample_request(rng, "all", bool(i % 2)).said for i in range(4000))
    merges = list(dict.fromkeys([*_of_characters(sorted(set(said))), *_of_words(WORDS)]))
    alphabet = list(byte_letters().values())
    pieces = [*alphabet, *(letter + LAST for letter in alphabet)]
    pieces += dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {piece: number for number, piece in enumerate([*pieces, START, END])}
    text = json.dumps(vocabulary, ensure_ascii=False)
    atomic.write_text(folder / "vocab.json", f"{text}\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    atomic.write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    atomic.write_json(folder / "tokenizer_config.json", CONFIG)
    atomic.remove_partial(folder, {"vocab.json", "merges.txt", "tokenizer_config.json"})
    return folder


def byte_letters() -> dict[int, str]:
    """{byte: the printable letter that stands for it in byte-level BPE (GPT-2's table)}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _of_characters(characters: Iterable[str]) -> Iterable[tuple[str, str]]:
    for character in characters:
        pieces = [byte_letters()[byte] for byte in character.encode()]
        yield from _joined(pieces)


def _of_words(words: Iterable[str]) -> Iterable[tuple[str, str]]:
    for word in words:
        yield from _joined(["".join(byte_letters()[b] for b in char.encode()) for char in word])


def _joined(pieces: list[str]) -> Iterable[tuple[str, str]]:
    """Merges from left to right, inside of a run and at its end."""
    for place in range(1, len(pieces)):
        before = "".join(pieces[:place])
        yield before, pieces[place]
        if place == len(pieces) - 1:
            yield before, pieces[place] + LAST
