"""BERT's uncased WordPiece tokens for the Q-Former's text branch, read from `vocab.txt`.

Written out here because it is short; a test compares it with the published tokenizer.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xllm_jax.core.errors import UserError

LONGEST_WORD = 100  # characters; longer words are unknown, as in the reference
IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


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
        self._ids = {p: i for i, p in enumerate(path.read_text("utf-8").splitlines())}
        self._pieces_by_id = {i: p for p, i in self._ids.items()}
        missing = {"[CLS]", "[SEP]", "[PAD]", "[UNK]"} - self._ids.keys()
        if missing:
            raise UserError(f"lacks {sorted(missing)[0]}", field=str(path))
        self.begin, self.end = self._ids["[CLS]"], self._ids["[SEP]"]
        self.pad, self.unknown = self._ids["[PAD]"], self._ids["[UNK]"]
        self.decode = self._ids.get("[DEC]", len(self._ids))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ones."""
        return [token for word in words(text) for token in self._pieces(word)]

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

    def _pieces(self, word: str) -> list[int]:
        if len(word) > LONGEST_WORD:
            return [self.unknown]
        found: list[int] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self._ids), None)
            if end is None:
                return [self.unknown]
            found.append(self._ids[prefix + word[start:end]])
            start = end
        return found


def words(text: str) -> list[str]:
    """Lower-cased words without accents; punctuation marks and ideographs stand alone."""
    text = "".join(_spaced(character) for character in text if not _control(character))
    text = unicodedata.normalize("NFD", text.lower())
    text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _punctuation(c) else c for c in text).split()


def _spaced(character: str) -> str:
    code = ord(character)
    if any(first <= code <= last for first, last in IDEOGRAPHS):
        return f" {character} "
    return " " if character.isspace() else character


def _control(character: str) -> bool:
    if character in "\t\n\r":
        return False
    return character in "\0\N{REPLACEMENT CHARACTER}" or (
        unicodedata.category(character).startswith("C")
    )


def _punctuation(character: str) -> bool:
    ascii_mark = character.isascii() and character.isprintable() and not character.isalnum()
    return (ascii_mark and character != " ") or unicodedata.category(character).startswith("P")
