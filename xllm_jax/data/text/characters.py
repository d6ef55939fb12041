"""Characters of the ASR model: ids ↔ text, with fairseq's special ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from xllm_jax.core import atomic, bounded
from xllm_jax.core.errors import UserError
from xllm_jax.core.text_lines import split_lines

BLANK, PAD, END, UNKNOWN = range(4)  # fairseq: <s> (the CTC blank), <pad>, </s>, <unk>
FIRST = 4


def split(text: str) -> list[str]:
    """Characters of a text; spaces between words are spelling, not speech."""
    return [character for character in text if not character.isspace()]


def token_count(text: str) -> int:
    """Tokens that an utterance of `text` fires: its characters and the end token."""
    return len(split(text)) + 1


class CharacterVocabulary:
    """Characters in the order of their ids, which start behind the special ones.

    Raises:
      UserError: a character twice, or an entry that is not one character.
    """

    def __init__(self, characters: Sequence[str], field: str = "data.characters"):
        self.characters = tuple(characters)
        self._ids = {c: number for number, c in enumerate(self.characters, start=FIRST)}
        if len(self._ids) != len(self.characters):
            twice = Counter(self.characters).most_common(1)[0][0]
            raise UserError(f"lists {twice!r} twice", field=field)
        wrong = next((c for c in self.characters if len(c) != 1 or c in " \t\r\n"), None)
        if wrong is not None:
            raise UserError(f"{wrong!r} is not one character", field=field, hint="One a line")

    @classmethod
    def load(cls, path: str | Path) -> CharacterVocabulary:
        """Reads one character a line; what follows it on the line (fairseq's count) is ignored.

        Raises:
          UserError: no such file, or a bad line.
        """
        if not Path(path).is_file():
            raise UserError("no such file", field=str(path), hint="data.characters names it")
        lines = split_lines(bounded.read_text(Path(path)))
        # Characters that Unicode counts as spaces or line ends may be entries, and keep their ids.
        entries = (line.strip(" \t").replace("\t", " ").partition(" ")[0] for line in lines)
        return cls([entry for entry in entries if entry], str(path))

    @classmethod
    def build(cls, texts: Iterable[str], least: int = 1) -> CharacterVocabulary:
        """Every character that occurs at least `least` times, the most frequent first."""
        counts = Counter(c for text in texts for c in split(text))
        kept = [c for c, count in counts.items() if count >= least]
        return cls(sorted(kept, key=lambda c: (-counts[c], c)))

    def save(self, path: str | Path) -> None:
        """Writes one character a line."""
        atomic.write_text(Path(path), "".join(f"{c}\n" for c in self.characters))

    def __len__(self) -> int:
        """Ids in all, special ones included."""
        return FIRST + len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, the end token last."""
        return [*(self._ids.get(c, UNKNOWN) for c in split(text)), END]

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end token; blanks and padding are left out, unknown is '�'."""
        text = []
        for token in map(int, ids):
            if token == END:
                break
            if token == UNKNOWN or token >= len(self):
                text.append("\N{REPLACEMENT CHARACTER}")
            elif token >= FIRST:
                text.append(self.characters[token - FIRST])
        return "".join(text)
