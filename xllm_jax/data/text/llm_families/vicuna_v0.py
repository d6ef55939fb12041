"""Vicuna v0, the LLM of NExT-GPT's released checkpoint: an answer ends in a line `###`.

Its tokenizer cuts texts at added tokens, and a `###` behind one of these is another piece than the
one behind a line break: both end an answer.
"""

from __future__ import annotations

from xllm_jax.data.text.llm_families import causal

LINE = "\n###"
WORD = "###"


class Family(causal.Family):
    """A causal LLM whose answers end in text; </s> pads.

    Raises:
      UserError: no tokenizer in the folder.
    """

    def __init__(self, folder: str):
        super().__init__(folder)
        self.pad = self.ends[0]
        # As behind any other text: without what begins a text of its own.
        behind = self.tokenizer.encode(f".{LINE}")
        self._ending = tuple(behind[len(self.tokenizer.encode(".")) :])
        alone = self.tokenizer.encode(WORD)
        self.ends = tuple(dict.fromkeys([self._ending[-1], alone[-1], *self.ends]))

    @property
    def ending(self) -> tuple[int, ...]:
        """Ids of the line."""
        return self._ending
