"""Characters a second of encoding text for data loading, against the slow way, on one core.

PYTHONPATH=. python benchmarks/tokenizer.py [--folder=TOKENIZER] [--texts=FILE, one a line]

The slow way is that of a Python tokenizer class in transformers: runs of spaces are replaced one
length after the other, text becomes pieces, and each piece is looked up by itself. Both ways are
timed in turn in one process, in CPU time, and their ids compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from xllm_jax.core.text_lines import split_lines
from xllm_jax.data.synthetic_world.text_stream import text_examples
from xllm_jax.data.text.chatglm_tokenizer import LINE, LONGEST_BLANK, TAB, ChatGLMTokenizer, blank

ROUNDS = 7


def slowly(tokenizer: ChatGLMTokenizer, text: str) -> list[int]:
    """Ids piece by piece; for text without special tokens."""
    text = text.replace("\n", LINE).replace("\t", TAB)
    for length in range(LONGEST_BLANK, 1, -1):
        text = text.replace(" " * length, blank(length))
    return [tokenizer.piece_id(piece) for piece in tokenizer._model.encode(text, out_type=str)]


def seconds(encode: Callable[[str], list[int]], texts: list[str]) -> float:
    """CPU seconds of one pass over the texts."""
    start = time.process_time()
    for text in texts:
        encode(text)
    return time.process_time() - start


def main() -> None:
    """Prints millions of characters a second of both ways, by length of text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("tests/golden/chatglm/tokenizer"))
    parser.add_argument("--texts", type=Path)
    flags = parser.parse_args()
    tokenizer = ChatGLMTokenizer(flags.folder)
    if flags.texts:
        texts = split_lines(flags.texts.read_text("utf-8"))
    else:
        texts = [example.answer for example in text_examples(0, 4000) if example.answer]
    for joined in (1, 10, 100):
        longer = ["".join(texts[i : i + joined]) for i in range(0, len(texts), joined)]
        assert all(tokenizer.encode(text) == slowly(tokenizer, text) for text in longer)
        ways = (tokenizer.encode, lambda text: slowly(tokenizer, text))
        rounds = [[seconds(way, longer) for way in ways] for _ in range(ROUNDS)]
        ours, theirs = (min(column) for column in zip(*rounds, strict=True))
        characters = sum(map(len, longer)) / 1e6
        print(
            f"texts of {1e6 * characters / len(longer):.0f} characters: ours "
            f"{characters / ours:.2f}, slow way {characters / theirs:.2f} million characters/s"
        )


if __name__ == "__main__":
    main()
