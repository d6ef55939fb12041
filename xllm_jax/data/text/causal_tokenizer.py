"""Ids and text of causal decoders, from `tokenizer.json` or sentencepiece's `tokenizer.model`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError

FAST, SLOW = "tokenizer.json", "tokenizer.model"
FILES = (FAST, SLOW, "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")


class FastTokenizer:
    """A `tokenizer.json`, which the library `tokenizers` runs.

    Args:
      folder: with the file.

    Attributes:
      start: ids that it puts in front of a text, such as <s>.
      specials: ids that stand for no text.
      pieces: the ids from here on have no meaning.

    Raises:
      UserError: the file cannot be read.
    """

    def __init__(self, folder: Path):
        try:
            self._model = tokenizers.Tokenizer.from_file(str(folder / FAST))
        except Exception as error:  # the library raises nothing more special
            what = f"is no tokenizer ({' '.join(str(error).split())[:200]})"
            hint = "Download it again"
            raise UserError(what, field=str(folder / FAST), hint=hint) from error
        self._model.no_padding()
        self._model.no_truncation()
        self.start = tuple(self._model.encode("").ids)
        added = self._model.get_added_tokens_decoder()
        self.specials = frozenset(index for index, token in added.items() if token.special)
        self.pieces = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens and ids that have none."""
        known = [int(token) for token in ids if self._model.id_to_token(int(token)) is not None]
        return self._model.decode(known, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """Piece of an id, '' for an id that has none."""
        return self._model.id_to_token(token) or ""

    def find(self, piece: str) -> int | None:
        """Id of a piece; None when there is none."""
        return self._model.token_to_id(piece)


class SentencePieceTokenizer:
    """A `tokenizer.model` of LLaMA and Vicuna with the tokens that were added to it.

    Args:
      folder: with the file.
      added: {token: id} beside those of `added_tokens.json` and `tokenizer_config.json`.

    Attributes:
      legacy: a text is cut at added tokens, loses spaces and line breaks beside them, and each part
        begins like a text of its own, as in transformers before 4.31; else only the first does.
      start, specials, pieces: as of `FastTokenizer`.

    Raises:
      UserError: the file cannot be read.
    """

    def __init__(self, folder: Path, added: Mapping[str, int] | None = None):
        path = str(folder / SLOW)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except Exception as error:  # the library raises nothing more special
            raise UserError("is no tokenizer", field=path, hint="Download it again") from error
        config = read_json(folder / "tokenizer_config.json")
        self.legacy: bool = config.get("legacy", True) is not False
        bos, eos, unk = self._model.bos_id(), self._model.eos_id(), self._model.unk_id()
        self.start = (bos,) if config.get("add_bos_token", True) and bos >= 0 else ()
        self.specials = frozenset(token for token in (bos, eos, unk) if token >= 0)
        size = self._model.get_piece_size()
        found = read_json(folder / "added_tokens.json") | _decoder(config) | dict(added or {})
        self._added = {piece: index for piece, index in found.items() if index >= size}
        own = {self._model.id_to_piece(token): token for token in self.specials}
        self._cut = {**own, **self._added}
        names = sorted(self._cut, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, names)))
        self._names = {index: piece for piece, index in self._added.items()}
        self.pieces = 1 + max([size - 1, *self._names])

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return [token for part in self._parts(text) for token in part]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens and ids that have none; added ones keep a space."""
        parts: list[str] = []
        run: list[int] = []
        for token in (*map(int, ids), None):
            if token in self.specials:
                continue
            if token is not None and 0 <= token < self._model.get_piece_size():
                run.append(token)
                continue
            parts += [self._model.decode(run)] if run else []
            parts += [self._names[token]] if token in self._names else []
            run = []
        return (" " if self.legacy else "").join(parts)

    def piece(self, token: int) -> str:
        """Piece of an id, '' for an id that has none."""
        inside = 0 <= token < self._model.get_piece_size()
        return self._model.id_to_piece(token) if inside else self._names.get(token, "")

    def find(self, piece: str) -> int | None:
        """Id of a piece; None when there is none."""
        if piece in self._cut:
            return self._cut[piece]
        index = self._model.piece_to_id(piece)
        return index if self._model.id_to_piece(index) == piece else None

    def _parts(self, text: str) -> Iterator[list[int]]:
        start, first = 0, True
        for match in (*self._split.finditer(text), None):
            part = text[start : match.start() if match else None]
            if self.legacy:
                part = part if first else part.lstrip()
                part = part.rstrip() if match else part
            yield self._text(part, first or self.legacy)
            if match:
                yield [self._cut[match.group()]]
                start, first = match.end(), False

    def _text(self, text: str, begins: bool) -> list[int]:
        if begins or not text:
            return self._model.encode(text)
        # Behind an added token, without the space that begins a text.
        return self._model.encode(f"{self._mark}{text}")[len(self._marked) :]

    @functools.cached_property
    def _marked(self) -> list[int]:
        return self._model.encode(self._mark)

    @functools.cached_property
    def _mark(self) -> str:
        return self._model.id_to_piece(self._model.unk_id())


def load(folder: str | Path) -> FastTokenizer | SentencePieceTokenizer:
    """The tokenizer of a folder: its `tokenizer.json`, or else its `tokenizer.model`.

    Raises:
      UserError: the folder has neither, or it cannot be read.
    """
    folder = Path(folder)
    if (folder / FAST).is_file():
        return FastTokenizer(folder)
    if (folder / SLOW).is_file():
        return SentencePieceTokenizer(folder)
    hint = "Give the folder of the LLM's tokenizer"
    raise UserError(f"has no {FAST} and no {SLOW}", field=str(folder), hint=hint)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file.

    Raises:
      UserError: it is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        found = bounded.read_json(path)
    except (ValueError, RecursionError) as error:
        raise UserError("is not JSON", field=str(path), hint="Download it again") from error
    return found if isinstance(found, dict) else {}


def _decoder(config: Mapping[str, Any]) -> dict[str, int]:
    """{token: id} of `added_tokens_decoder`."""
    tokens = config.get("added_tokens_decoder") or {}
    return {token["content"]: int(index) for index, token in tokens.items()}
