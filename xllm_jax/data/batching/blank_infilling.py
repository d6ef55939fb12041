"""The blank-infilling format: conversations, and text alone as LLMs of a family are trained on it.

Such text may lose spans that are to be filled in (arXiv 2103.10360, section 2.1). And what a
picture shall show is mostly learnt with all its words hidden, as by a conditional masked language
model (arXiv 1904.09324): where one word after the other tells nothing, each place has to know its
own. Signal tokens are such places.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from xllm_jax.data.batching import conversation
from xllm_jax.data.record import PROMPT, Mode, Record
from xllm_jax.data.text import prompt
from xllm_jax.data.text.llm_family import LLMFamily

HIDDEN = 0.75  # share of written answers to requests to draw whose words are hidden


class Format(conversation.Format):
    """As conversations, but a text that stands alone loses spans, which are learnt."""

    def sequence(self, record: Record, mode: Mode) -> prompt.Prompt:
        """The prompt of one record."""
        example, generator = record.example, record.generator(PROMPT)
        if example.task == "draw" and not example.outputs:
            made = super().sequence(record, mode)
            return hide(made, self.resources.family) if generator.random() < HIDDEN else made
        if example.task != "text" or example.instruction or example.media or example.history:
            return super().sequence(record, mode)
        return prompt.text_only(example, self.resources.family, self.limits(mode), generator)


def hide(made: prompt.Prompt, family: LLMFamily) -> prompt.Prompt:
    """A prompt whose answer is learnt without reading any word of it."""
    places, words = made.answer_index[1:], made.targets[:-1]
    ids = made.ids.copy()
    ids[places[~np.isin(words, list(family.specials))]] = family.mask
    return dataclasses.replace(made, ids=ids)
