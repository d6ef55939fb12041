"""Recorded training text of NExT-GPT: conversations to ids, labels and batches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.convert.verify.recording import Replay, read_json
from xllm_jax.core.errors import UserError
from xllm_jax.data.text import nextgpt_format
from xllm_jax.data.text.causal_tokenizer import SentencePieceTokenizer

CASES = "formats_cases.json"
ARRAYS = ("input_ids", "targets", "attention_mask")
PAD = 2


class Cases:
    """The recorded cases and their tokenizer, with the tokens that NExT-GPT adds."""

    def __init__(self, folder: Path):
        self.folder = folder

    @functools.cached_property
    def cases(self) -> dict[str, Any]:
        """All of the file."""
        return read_json(self.folder / CASES)

    @functools.cached_property
    def tokenizer(self) -> SentencePieceTokenizer:
        """The recording's tokenizer."""
        return SentencePieceTokenizer(self.folder / "tokenizer", self.cases["added_tokens"])

    def turns(self, kind: str, case: dict[str, Any]) -> list[nextgpt_format.Turn]:
        """What is said in a case."""
        if kind == "encode":
            return nextgpt_format.describe(case["caption"], case["prompt"])
        if kind == "generate":
            words = nextgpt_format.caption(case["raw_caption"])
            return nextgpt_format.draw(words, case["modality"])
        return nextgpt_format.conversation(case["conversation"])

    def encoded(self, kind: str, case: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels of a case, compared with what stands beside it.

        Raises:
          UserError: they differ.
        """
        turns = self.turns(kind, case)
        if "texts" in case and [turn.text for turn in turns] != case["texts"]:
            raise UserError("other words than were recorded", field=f"{CASES}: {kind}")
        ids, labels = nextgpt_format.encode(turns, self.tokenizer)
        if (ids, labels) != (case["input_ids"], case["targets"]):
            raise UserError("other ids than were recorded", field=f"{CASES}: {kind}")
        return ids, labels


def batches(replay: Replay) -> None:
    """The batch of each kind, truncated as recorded."""
    cases = Cases(replay.folder)
    lengths = replay.about()["config"]["max_length"]
    for name in replay.names("*/input_ids"):
        replay.attempt(_batch, name.removesuffix("/input_ids"), cases, lengths)


def _batch(replay: Replay, name: str, cases: Cases, lengths: dict[str, int]) -> None:
    kind, _, modality = name.partition("_")
    chosen = [one for one in cases.cases[kind] if not modality or one["modality"] == modality]
    rows = [cases.encoded(kind, case) for case in chosen]
    made = nextgpt_format.batch(rows, lengths[kind], PAD)
    for array, computed in zip(ARRAYS, made, strict=True):
        replay.compare(f"{name}/{array}", np.asarray(computed))
