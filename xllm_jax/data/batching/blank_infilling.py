"""The blank-infilling format: conversations, and plain text as the LLM's family trains on it alone.

Such text may lose spans that are to be filled in (arXiv 2103.10360, section 2.1).
"""

from __future__ import annotations

from xllm_jax.data.batching import conversation
from xllm_jax.data.record import PROMPT, Mode, Record
from xllm_jax.data.text import prompt


class Format(conversation.Format):
    """As conversations, but a text that stands alone loses spans, which are learnt."""

    def sequence(self, record: Record, mode: Mode) -> prompt.Prompt:
        """The prompt of one record."""
        example = record.example
        if example.task != "text" or example.instruction or example.media or example.history:
            return super().sequence(record, mode)
        family = self.resources.family
        return prompt.text_only(example, family, self.limits(mode), record.generator(PROMPT))
