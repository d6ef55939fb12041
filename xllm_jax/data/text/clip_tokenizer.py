"""CLIP's ids, for the choice of image-text pairs and for captions that are to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xllm_jax.core import damage
from xllm_jax.core.errors import UserError

FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
FILES += ("special_tokens_map.json", "added_tokens.json", "config.json")


class ClipTokenizer:
    """CLIP's tokenizer, which transformers runs.

    Args:
      folder: with `vocab.json` and `merges.txt`, or with `tokenizer.json`.

    Attributes:
      end: id of the token that ends a text. largest: the largest id.

    Raises:
      UserError: the files are not there, or cannot be read.
    """

    def __init__(self, folder: str | Path):
        there = {file.name for file in Path(folder).glob("*")}
        if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
            hint = "Give a folder of openai/clip-vit-base-patch16 as --tokenizer"
            what = "has no vocab.json and merges.txt, and no tokenizer.json"
            raise UserError(what, field=str(folder), hint=hint)
        from transformers import CLIPTokenizer

        with damage.given_to_library(folder, *FILES, told="is no tokenizer of CLIP"):
            self._model = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
            self.end: int = int(self._model.eos_token_id)
            self.largest = max(self._model.get_vocab().values())
            self.encode([""], 2)

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Start, pieces, end and padding of every text: `[texts, length]` int32; cut to fit."""
        made = self._model(list(texts), padding="max_length", truncation=True, max_length=length)
        return np.asarray(made["input_ids"], np.int32).reshape(-1, length)

    def words(self, ids: np.ndarray) -> np.ndarray:
        """What stands between the start and the end of a text, of its ids `[length]`."""
        length = int(np.argmax(ids == self.end)) if self.end in ids else len(ids)
        return ids[1:length]

    def piece(self, token: int) -> str:
        """The text of one id."""
        return self._model.decode([token])
