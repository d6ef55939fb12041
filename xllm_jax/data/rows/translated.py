"""Examples in Chinese: the texts of any reader exchanged for translations that lie on disk.

    FOLDER/SPLIT.jsonl     {"text": "a dog runs", "translation": "一只狗在跑"} on each line
    FOLDER/SPLIT.npy       `[lines]` uint64, ascending: hashes of the texts of the lines

The recipe 'translated' writes both, and every reader of English texts takes FOLDER, or one such
.jsonl, by its option `captions`. Texts that differ in nothing but case, spaces and punctuation have
one translation. Texts without English words (numbers, Chinese) stay as they are, as do transcripts:
they are what the speech says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import files
from xllm_jax.data.rows.lazy import Lazy, Rows

LOOKED_AT = 100  # examples, spread over the source, of which some must have a translation
AGAIN = "Build it again: xllm build-data --recipe=translated"


class Untranslated(UserError):
    """A readable record whose text has no translation: it is left out, and no fault of the data."""


def same(text: str) -> str:
    """What texts have in common that say the same: their letters, and numbers as they stand."""
    kept = []
    for place, sign in enumerate(text):
        punctuation = unicodedata.category(sign).startswith("P")
        inside = place and text[place - 1].isdigit() and text[place + 1 : place + 2].isdigit()
        if not sign.isspace() and (not punctuation or inside or sign == "%"):
            kept.append(sign)
    return "".join(kept).lower()


def chinese(text: str) -> int:
    """How many Chinese characters a text has."""
    return sum(
        "\u3400" <= sign <= "\u9fff" or "\U00020000" <= sign <= "\U0003ffff" for sign in text
    )


def translatable(text: str) -> bool:
    """Whether a text has words to be translated: most of its letters are not Chinese."""
    return 2 * chinese(text) < sum(sign.isalpha() for sign in text)


def texts(example: Example, but: tuple[str, ...] = ()) -> Iterator[str]:
    """The texts of an example that need a translation.

    Args:
      example: of a reader.
      but: references that are known; all examples of one image have the same, perhaps many.
    """
    if example.task != "asr":
        rounds = (text for pair in example.history for text in pair)
        references = example.references if example.references != but else ()
        found = (example.instruction, example.answer, *references, *rounds)
        yield from filter(translatable, found)


def write(file: Path, table: Mapping[str, str]) -> None:
    """Writes a table of texts and translations, and the hashes that find a text in it.

    Args:
      file: FOLDER/SPLIT.jsonl.
      table: {text: translation}.
    """
    keys = np.asarray([_key(text) for text in table], np.uint64)
    order, pairs = np.argsort(keys, kind="stable"), list(table.items())
    with atomic.whole(file) as partial, partial.open("w", encoding="utf-8") as opened:
        for text, said in (pairs[place] for place in order):
            row = {"text": text, "translation": said}
            opened.write(json.dumps(row, ensure_ascii=False) + "\n")
    atomic.write_array(file.with_suffix(".npy"), keys[order])


def told_apart(captions: str) -> tuple[str, str]:
    """(a file of the reader's own form, a translation of this form) of what `captions` names."""
    mine = captions.endswith(".jsonl") or Path(captions).is_dir()
    return ("", captions) if mine else (captions, "")


def examples(found: Sequence[Example], captions: str, split: str) -> Sequence[Example]:
    """Examples of a reader in Chinese; on access, one without a translation is `Untranslated`.

    Args:
      found: the reader's.
      captions: folder or .jsonl file of the layout above; '' leaves them in English.
      split: the reader's, which chooses the file of a folder.

    Raises:
      UserError: no such translation, or one of another source.
    """
    if not captions:
        return found
    table = Table(
        Path(captions) if captions.endswith(".jsonl") else Path(captions, f"{split}.jsonl")
    )
    made = Lazy(len(found), lambda index: _example(found[index], table))
    known = [_translated(found, int(place), table) for place in _spread(len(found))]
    known = [one for one in known if one is not None]
    if known and not any(known):
        what = f"translates none of {len(known)} records that were looked at"
        raise UserError(what, field=str(table.file), hint="Is it of another source or kind?")
    return made


class Table:
    """Translations found by their texts, read from the file when they are asked for.

    Args:
      file: FOLDER/SPLIT.jsonl.

    Raises:
      UserError: no such file, or one that does not fit its hashes.
    """

    def __init__(self, file: Path):
        self.file, self._rows = file, Rows(file)
        try:
            self._keys = files.array(file.with_suffix(".npy"), "array of hashes", mapped=True)
        except UserError as error:
            raise UserError(error.what, field=error.field, hint=AGAIN) from None
        some = {0, len(self._rows) // 2, len(self._rows) - 1} if len(self._rows) else set()
        fits = self._keys.shape == (len(self._rows),)
        if not fits or any(int(self._keys[i]) != _key(self._rows[i]["text"]) for i in some):
            raise UserError("does not fit the hashes beside it", field=str(file), hint=AGAIN)

    def get(self, text: str) -> str | None:
        """The text in Chinese; None where there is no translation."""
        if not translatable(text):
            return text
        key = np.uint64(_key(text))
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return None
        row = self._rows[place]
        return row["translation"] if same(row["text"]) == same(text) else None


def _example(one: Example, table: Table) -> Example:
    if one.task == "asr":
        return one

    def said(text: str) -> str:
        found = table.get(text)
        if found is None:
            raise Untranslated("has no translation", field=one.key)
        return found

    references: Iterable[str | None] = map(table.get, one.references)
    return dataclasses.replace(
        one,
        instruction=said(one.instruction),
        answer=said(one.answer),
        history=tuple((said(asked), said(answered)) for asked, answered in one.history),
        references=tuple(text for text in references if text is not None),
    )


def _spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, LOOKED_AT).astype(int)) if count else np.zeros(0)


def _translated(found: Sequence[Example], place: int, table: Table) -> bool | None:
    """Whether a record has a translation; None where it needs none, or cannot be read."""
    try:
        one = found[place]
    except Exception:  # reported when it is drawn
        return None
    try:
        return _example(one, table) is not None if any(texts(one)) else None
    except Untranslated:
        return False


def _key(text: str) -> int:
    hashed = hashlib.blake2b(same(text).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(hashed.digest(), "big")
