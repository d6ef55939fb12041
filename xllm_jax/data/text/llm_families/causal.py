"""Causal decoders (LLaMA 3, Qwen, GLM-4, Vicuna v1): `<s> prompt answer </s>`.

What the tokenizer's own files put in front comes first (<s>, <|begin_of_text|>, [gMASK]<sop>, or
nothing); the words around a question, tags of roles included, are the template's (`prompt.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.text import causal_tokenizer
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.data.text.token_rows import Row

# What ends a turn; the first that the tokenizer has is what is learnt behind an answer.
ENDS = ("<|eot_id|>", "<|im_end|>", "<|user|>", "</s>", "<|end_of_text|>", "<|endoftext|>")
PADS = ("<|finetune_right_pad_id|>", "<pad>", "<|endoftext|>")
CONFIGS = ("generation_config.json", "config.json")
MOST_ROWS = 1 << 24  # of a word table; an id is a 32-bit number


class Family(LLMFamily):
    """A causal LLM with one number to a position.

    Raises:
      UserError: no tokenizer in the folder, or one without a token that ends an answer.
    """

    files = (*causal_tokenizer.FILES, *CONFIGS)

    def __init__(self, folder: str):
        self.tokenizer = causal_tokenizer.load(folder)
        self.start = self.tokenizer.start
        known = {piece: self.tokenizer.find(piece) for piece in ENDS}
        found = [index for index in known.values() if index is not None]
        told = _configured(Path(folder))
        if not found and not told:
            hint = f"One of {', '.join(ENDS)}, or eos_token_id in {CONFIGS[0]}"
            raise UserError("has no token that ends an answer", field=folder, hint=hint)
        self.ends = tuple(dict.fromkeys([*found[:1], *told]))
        pads = (self.tokenizer.find(piece) for piece in PADS)
        self.pad = next((index for index in pads if index is not None), self.ends[0])
        self.mask = self.pad  # causal tokenizers have no other sign that stands for no text
        self.specials = self.tokenizer.specials | {*self.start, *self.ends, self.pad}
        told = causal_tokenizer.read_json(Path(folder) / CONFIGS[-1]).get("vocab_size", 0)
        rows = max(told, self.tokenizer.pieces)
        odd = next((index for index in sorted(self.specials) if not 0 <= index < rows), None)
        if odd is not None or rows > MOST_ROWS:
            what = f"{odd} is no id of {rows} rows" if odd is not None else f"has {rows} rows"
            raise UserError(what, field=folder, hint="Download its files again")
        self.spare = range(self.tokenizer.pieces, rows)

    @property
    def ending(self) -> tuple[int, ...]:
        """Ids that are learnt behind an answer."""
        return self.ends[:1]

    def row(self, prompt: Sequence[int], answer: Sequence[int] | None = None) -> Row:
        """`start prompt answer ending`; the prompt's last token predicts the answer's first."""
        before = [*self.start, *prompt]
        targets = [] if answer is None else [*answer, *self.ending]
        if not before and answer:
            raise UserError("nothing stands before the answer", hint="Give a prompt")
        count = len(before) + len(targets)
        return Row(
            ids=np.asarray([*before, *targets], np.int32),
            positions=np.arange(count, dtype=np.int32)[:, None],
            context=np.zeros(count, bool),
            segments=np.ones(count, np.int32),
            answer_index=(len(before) - 1 + np.arange(len(targets))).astype(np.int32),
            targets=np.asarray(targets, np.int32),
            start=len(self.start),
        )

    def text_row(self, ids: Sequence[int], generator: np.random.Generator) -> Row:
        """All of a text is learnt, but for a first token that nothing stands before."""
        first = 0 if self.start else 1
        return self.row(ids[:first], ids[first:])


def _configured(folder: Path) -> list[int]:
    """Ids that end an answer by the word of the LLM's configuration."""
    for name in CONFIGS:
        told = causal_tokenizer.read_json(folder / name).get("eos_token_id")
        if told is not None:
            return [int(index) for index in (told if isinstance(told, list) else [told])]
    return []
