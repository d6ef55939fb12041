"""VQA's accuracy (Antol et al., "VQA: Visual Question Answering", 2015, and VQA v2's evaluation).

An answer is worth min(1, n / 3) where n people gave it, averaged over the sets of nine that leave
one of the ten out. Before that, both sides lose punctuation and articles, numbers become digits and
contractions get their apostrophes; where all people gave the same text, as VQA's own code has it,
nothing is changed on either side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from xllm_jax.evaluation import caption_metrics

ENOUGH = 3  # people who gave an answer that is fully right
ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
SIGNS = ';/[]"{}()=+\\_-><@`,?!'
COMMA = re.compile(r"\d,\d")
# VQA's code means periods that are not between digits, and writes what finds each before a
# non-digit; and it removes no more than 32 of a text.
PERIOD, PERIODS = re.compile(r"\.(?!\d)"), 32
# The contractions that it knows, by their ends.
ENDS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "n't've": "could had might should would",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'ve": "could might must not should they we what where who would you",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}


def _contractions() -> dict[str, str]:
    """{contraction with one apostrophe left out: the contraction}."""
    whole = [f"{word}{end}" for end, words in ENDS.items() for word in words.split()]
    places = [(word, at) for word in whole for at, sign in enumerate(word) if sign == "'"]
    found = {word[:at] + word[at + 1 :]: word for word, at in places}
    return found | {"somebody'd": "somebodyd"}  # as VQA's code has it, the other way round


CONTRACTIONS = _contractions()


def normalized(text: str) -> str:
    """An answer as VQA's evaluation compares it."""
    between_digits, made = bool(COMMA.search(text)), text
    for sign in SIGNS:
        beside_space = f"{sign} " in text or f" {sign}" in text
        made = made.replace(sign, "" if beside_space or between_digits else " ")
    made = PERIOD.sub("", made, PERIODS)
    words = [DIGITS.get(word, word) for word in made.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, given: Sequence[str]) -> float:
    """What an answer is worth, from 0 to 1.

    Args:
      answer: the model's.
      given: people's answers, ten in VQA. A set with a single one asks for that very answer.
    """
    answer, *given = (" ".join(text.split("\n")).replace("\t", " ").strip()
                      for text in (answer, *given))  # fmt: skip
    if len(set(given)) > 1:
        answer, given = normalized(answer), [normalized(text) for text in given]
    return _agreement(answer, given)


def text_accuracy(answer: str, given: Sequence[str]) -> float:
    """The same of texts without spaces, punctuation, letter case and 的, for Chinese answers."""
    return _agreement(caption_metrics.short(answer), [caption_metrics.short(one) for one in given])


def _agreement(answer: str, given: Sequence[str]) -> float:
    same = [one == answer for one in given]
    if len(same) == 1:
        return float(same[0])
    return sum(min(1.0, (sum(same) - own) / ENOUGH) for own in same) / len(same)


NORMALIZATIONS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "vqa": accuracy,
    "text": text_accuracy,
}
