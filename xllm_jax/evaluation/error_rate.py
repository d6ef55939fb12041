"""Scores of generated text against references."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from xllm_jax.core.errors import UserError

Pair = tuple[str, str]


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Smallest number of insertions, deletions and replacements that turn one into the other."""
    row = np.arange(len(second) + 1)
    for number, item in enumerate(first, start=1):
        differs = np.fromiter((item != other for other in second), np.int64, len(second))
        best = np.minimum(row[1:] + 1, row[:-1] + differs)
        # Insertions run along the row: entry j is the least of best_i + (j - i) over i <= j.
        columns = np.arange(len(second) + 1)
        row = np.minimum.accumulate(np.concatenate([[number], best]) - columns) + columns
    return int(row[-1])


def edit_counts(reference: Sequence, hypothesis: Sequence) -> tuple[int, int, int]:
    """(replacements, deletions, insertions) of the edits that make the hypothesis.

    Of the shortest ways, that with the most replacements: their number is then well defined.
    """
    # A replacement costs `unit`, all else a little more: the remainder counts what is no
    # replacement, and from it and the lengths follows the rest.
    unit = len(reference) + len(hypothesis) + 1
    columns = np.arange(len(hypothesis) + 1) * (unit + 1)
    row = columns
    for number, item in enumerate(reference, start=1):
        differs = np.fromiter((item != other for other in hypothesis), np.int64, len(hypothesis))
        best = np.minimum(row[1:] + unit + 1, row[:-1] + differs * unit)
        first = number * (unit + 1)
        row = np.minimum.accumulate(np.concatenate([[first], best]) - columns) + columns
    edits, others = divmod(int(row[-1]), unit)
    insertions = (others + len(hypothesis) - len(reference)) // 2
    return edits - others, others - insertions, insertions


def normalized(reference: str, hypothesis: str) -> Pair:
    """What was said, whatever its spelling: NFKC, lower case, no spaces, punctuation or symbols."""

    def clean(text: str) -> str:
        text = unicodedata.normalize("NFKC", text).lower()
        return "".join(c for c in text if unicodedata.category(c)[0] not in "ZPSC")

    return clean(reference), clean(hypothesis)


# <NOISE>, <spoken_noise>, [LAUGHTER], <sil/>: what a transcript says about the sound.
TAG = re.compile(r"<[/\w+* -]{1,32}>|\[[/\w+* -]{1,32}\]")


def untagged(reference: str, hypothesis: str) -> Pair:
    """As `normalized`, without the tags in angle or square brackets."""
    texts = (unicodedata.normalize("NFKC", text) for text in (reference, hypothesis))
    return normalized(*(TAG.sub("", text) for text in texts))


def raw(reference: str, hypothesis: str) -> Pair:
    """Both as they are."""
    return reference, hypothesis


def xllm(reference: str, hypothesis: str) -> Pair:
    """What the X-LLM repository compares (`tasks/speech2text.py`): only for comparison with it.

    The reference alone is lower-cased and loses some punctuation, and is cut to 20 characters.
    """
    reference = re.sub(r'[.!"()*#:;~]', " ", reference.lower())
    reference = re.sub(r"\s{2,}", " ", reference).rstrip("\n").strip(" ")
    reference = " ".join(reference.split(" ")[:50])[:20]
    return reference, hypothesis.strip().replace("[[训练时间]]", "2023年")


FORMS: dict[str, Callable[[str, str], Pair]] = {
    "normalized": normalized,
    "untagged": untagged,
    "raw": raw,
    "xllm": xllm,
}
# What a report says of each.
STATED = {
    "normalized": "NFKC, lower case, no spaces, punctuation or symbols; tags such as <NOISE> count",
    "untagged": "NFKC, lower case, no spaces, punctuation, symbols or tags such as <NOISE>",
    "raw": "every character as it is",
    "xllm": "as the X-LLM repository compares: references lower-cased and cut to 20 characters",
}


def character_errors(reference: str, hypothesis: str, form: str = "normalized") -> tuple[int, int]:
    """Edit distance in characters, and the length of the reference.

    Args:
      reference, hypothesis: texts; an empty hypothesis has lost every character.
      form: which form of both is compared, a name of FORMS.
    """
    if form not in FORMS:
        raise UserError(f"unknown form {form!r}", hint=f"Choices: {', '.join(FORMS)}")
    reference, hypothesis = FORMS[form](reference, hypothesis)
    return edit_distance(reference, hypothesis), len(reference)


def rate(counts: Iterable[tuple[int, int]]) -> float:
    """Error rate of (errors, reference length) pairs.

    Raises:
      UserError: the references are empty.
    """
    errors, length = 0, 0
    for one, many in counts:
        errors, length = errors + one, length + many
    if not length:
        raise UserError("the references hold no character", hint="Check the transcripts")
    return errors / length
