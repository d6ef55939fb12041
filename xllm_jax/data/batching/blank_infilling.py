"""The blank-infilling format: conversations, and text alone as LLMs of a family are trained on it.

Such text may lose spans that are to be filled in (arXiv 2103.10360, section 2.1). And what a
picture shall show is mostly said twice, the second time with all its words hidden, as by a
conditional masked language model (arXiv 1904.09324): where one word after the other tells nothing,
each place has to know its own. Signal tokens behind a caption are such places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xllm_jax.data.batching import conversation
from xllm_jax.data.record import PROMPT, Mode, Record
from xllm_jax.data.text import prompt
from xllm_jax.data.text.llm_family import LLMFamily

AGAIN = 0.75  # share of written answers to requests to draw that are said again, hidden


class Format(conversation.Format):
    """As conversations, but a text that stands alone loses spans, which are learnt."""

    def sequence(self, record: Record, mode: Mode) -> prompt.Prompt:
        """The prompt of one record."""
        example, generator = record.example, record.generator(PROMPT)
        if example.task == "draw" and not example.outputs:
            if generator.random() >= AGAIN:
                return super().sequence(record, mode)
            said = dataclasses.replace(example, answer=f"{example.answer} ")
            made = super().sequence(dataclasses.replace(record, example=said), mode)
            words = self.resources.family.tokenizer.encode(example.answer)
            return hidden_behind(made, words, self.resources.family)
        if example.task != "text" or example.instruction or example.media or example.history:
            return super().sequence(record, mode)
        return prompt.text_only(example, self.resources.family, self.limits(mode), generator)


def hidden_behind(made: prompt.Prompt, words: Sequence[int], family: LLMFamily) -> prompt.Prompt:
    """A prompt whose answer goes on with words that are learnt and not read.

    Args:
      made: a sequence with its answer and its end.
      words: ids of what follows the answer.
      family: of the LLM.
    """
    count, last = len(words), len(made.ids) - 1  # of the end, which moves back
    steps = np.arange(1, count + 1)[:, None] * np.asarray(family.position_step, np.int32)
    return dataclasses.replace(
        made,
        ids=np.concatenate(
            [made.ids[:-1], np.full(count, family.mask), made.ids[-1:]], dtype=np.int32
        ),
        positions=np.concatenate([made.positions, made.positions[-1] + steps], dtype=np.int32),
        context=np.concatenate([made.context, np.zeros(count, bool)]),
        segments=np.concatenate([made.segments, np.ones(count, np.int32)]),
        answer_index=np.concatenate([made.answer_index, last + np.arange(count)], dtype=np.int32),
        targets=np.concatenate([made.targets[:-1], words, made.targets[-1:]], dtype=np.int32),
        index={
            name: np.concatenate([places, np.full(count, -1, np.int32)])
            for name, places in made.index.items()
        },
    )
