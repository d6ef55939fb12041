"""GLM's family: ChatGLM-6B, `context [gMASK] <sop> answer <eop>`, two numbers to a position."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from xllm_jax.data.text import blank_infilling
from xllm_jax.data.text.chatglm_tokenizer import MODEL_FILE, ChatGLMTokenizer
from xllm_jax.data.text.glm_layout import positions_of
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.data.text.token_rows import Row

TRAINED = "[[训练时间]]"  # what ChatGLM replaces by the year
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
# The end of a text that what follows may change: a name that the tokenizer writes as blanks or a
# line break when it has come whole, the word that is replaced, and punctuation before a character.
_BEGUN = "|".join(re.escape(TRAINED[:size]) for size in range(len(TRAINED) - 1, 0, -1))
OPEN = re.compile(rf"\s*(?:<[^<>]{{0,{len('|blank_80|')}}}|{_BEGUN}|[{''.join(FULL_WIDTH)}])$")
# X-LLM's demo renames the model and its makers in every answer, in this order.
XLLM_NAMES = (
    ("ChatGLM-6B", "百灵（Lark）"),
    ("ChatGLM", "百灵（Lark）"),
    ("清华大学 KEG 实验室和智谱 AI 公司", "中科院自动化所认知计算小组"),
    ("清华大学 KEG 实验室", "中科院自动化所"),
    ("智谱 AI 公司", "认知计算小组"),
    ("中科院自动化所和智谱AI", "中科院自动化所"),
    ("智谱AI", ""),
)


class Family(LLMFamily):
    """GLM: bidirectional context, and behind it the answer, counted by the block position alone.

    Raises:
      UserError: no tokenizer in the folder.
    """

    position_step = (0, 1)
    files = (MODEL_FILE, "tokenizer_config.json", "config.json")

    def __init__(self, folder: str):
        self.tokenizer = ChatGLMTokenizer(folder)
        self.tokens = self.tokenizer.specials
        self.ends, self.pad = (self.tokens.eop,), self.tokens.pad
        self.mask = self.tokens.mask
        self.specials = frozenset(vars(self.tokens).values())
        self.spare = range(self.tokenizer.pieces, self.tokenizer.vocab)

    def row(self, prompt: Sequence[int], answer: Sequence[int] | None = None) -> Row:
        """`prompt [gMASK] <sop> answer <eop>`; [gMASK] predicts <sop>, the first that is learnt."""
        context = [*prompt, self.tokens.gmask]
        rest = [self.tokens.sop] + ([*answer, self.tokens.eop] if answer is not None else [])
        count, mask = len(context) + len(rest), len(context) - 1
        targets = [] if answer is None else rest
        return Row(
            ids=np.asarray(context + rest, np.int32),
            positions=positions_of(mask + 1, count, mask),
            context=np.arange(count) <= mask,
            segments=np.ones(count, np.int32),
            answer_index=(mask + np.arange(len(targets))).astype(np.int32),
            targets=np.asarray(targets, np.int32),
        )

    def text_capacity(self, length: int, answers: int) -> int:
        """As many tokens as fit when short spans add their mask, <sop> and <eop> at worst."""
        return max(min(length * 2 // 3 - 3, answers - 2), 2)

    def text_row(self, ids: Sequence[int], generator: np.random.Generator) -> Row:
        """A row of blank infilling: spans of the text are cut out and learnt."""
        return blank_infilling.example(ids, self.tokens, generator)

    def finish(self, text: str) -> str:
        """Full-width punctuation next to Chinese characters, as ChatGLM does."""
        return process_response(text)

    def settled(self, text: str) -> str:
        """All but what a piece, a replaced word or a punctuation mark may still be changed by."""
        return process_response(OPEN.sub("", text.rstrip()))


def process_response(text: str, names: Sequence[tuple[str, str]] = ()) -> str:
    """Finishes an answer as ChatGLM does: full-width punctuation next to Chinese characters.

    Args:
      text: decoded answer.
      names: (old, new) replacements in order; XLLM_NAMES is what the reference's demo does.
    """
    text = text.strip().replace(TRAINED, "2023年")
    for old, new in names:
        text = text.replace(old, new)
    for half, full in FULL_WIDTH.items():
        text = re.sub(rf"(?<=[\u4e00-\u9fff]){re.escape(half)}", full, text)
        text = re.sub(rf"{re.escape(half)}(?=[\u4e00-\u9fff])", full, text)
    return text
