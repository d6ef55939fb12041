"""BERT's uncased WordPiece tokens for the Q-Former's text branch, read from `vocab.txt`.

The `tokenizers` library does the work; a test compares it with the published tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError
from xllm_jax.core.text_lines import split_lines


class WordPiece:
    """Greedy longest-match-first pieces of lower-cased words.

    Args:
      path: vocab.txt, one piece a line, or the folder that holds it.

    Attributes:
      begin, end, pad, unknown: ids of [CLS], [SEP], [PAD], [UNK].
      decode: id of [DEC], which BLIP-2 appends behind the vocabulary.

    Raises:
      UserError: no such file, or it lacks a special piece.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path = path / "vocab.txt" if path.is_dir() else path
        if not path.is_file():
            raise UserError("no such file", field=str(path), hint="data.vocabulary names it")
        self._path = path
        self._ids = {p: i for i, p in enumerate(split_lines(bounded.read_text(path)))}
        self._pieces_by_id = {i: p for p, i in self._ids.items()}
        missing = {"[CLS]", "[SEP]", "[PAD]", "[UNK]"} - self._ids.keys()
        if missing:
            raise UserError(f"lacks {sorted(missing)[0]}", field=str(path))
        self.begin, self.end = self._ids["[CLS]"], self._ids["[SEP]"]
        self.pad, self.unknown = self._ids["[PAD]"], self._ids["[UNK]"]
        self.decode = self._ids.get("[DEC]", len(self._ids))
        self._tokenizer = Tokenizer(models.WordPiece(self._ids, unk_token="[UNK]"))
        self._tokenizer.normalizer = normalizers.BertNormalizer()
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ones."""
        # Python lower-cases a sigma by its place in the word, as the reference does; Rust does not.
        # Lone surrogates stand for bytes that are no text, and Rust knows none.
        text = text.lower().encode("utf-8", "ignore").decode("utf-8")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_special(self, piece: str) -> int:
        """Id of one piece as it stands in the file, such as [MASK].

        Raises:
          UserError: the file lacks it.
        """
        if piece not in self._ids:
            raise UserError(f"lacks {piece}", field=str(self._path))
        return self._ids[piece]

    def piece(self, token: int) -> str:
        """Piece of an id, '' for an id that has none."""
        return self._pieces_by_id.get(token, "")

    def rows(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """[CLS] … [SEP] [PAD]*: ids int32 and a mask bool, both `[N, length]`."""
        ids = np.full((len(texts), length), self.pad, np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            tokens = [self.begin, *self.encode(text)[: length - 2], self.end]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask
