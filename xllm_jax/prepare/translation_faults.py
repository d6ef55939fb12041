"""What is wrong with a translation: reasons for which a text is left out."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from xllm_jax.data.rows.translated import chinese, same

LEAST = 12  # characters that a translation of any text may have
LOOP = re.compile(r"(.{1,12}?)\1{3,}")
SHARED, LONG = 3, 8  # texts that may not get one long answer, characters of a long answer
WORD = re.compile(r"[a-z']+")
FUNCTION_WORDS = frozenset(
    WORD.findall(
        """a an the is are was were am be been being has have had do does did can could will would
        there this that these those it its he she they him her his their them you your we our i my
        of in on at to by for from with without and or but not no yes as up down out off over under
        near next what who whom whose which where when why how many much some any all one two three
        """
    )
)


def judged(outputs: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Tells usable translations from others.

    Args:
      outputs: {text: what a translator made of it}; '' where it made nothing.

    Returns:
      ({text: translation}, {text: 'empty', 'overlong', 'untranslated' or 'repeated'}).
    """
    reasons = {text: why for text, output in outputs.items() if (why := fault(text, output))}
    rest = {text: output.strip() for text, output in outputs.items() if text not in reasons}
    reasons |= dict.fromkeys(_answered_alike(rest), "repeated")
    return {text: said for text, said in rest.items() if text not in reasons}, reasons


def fault(text: str, output: str) -> str:
    """What is wrong with one translation, '' if nothing is."""
    if not same(output):
        return "empty"
    if _loops(output) and not _loops(text):
        return "repeated"
    if len(output.strip()) > LEAST + len(text):
        return "overlong"
    words = WORD.findall(text.lower())
    copied = set(WORD.findall(output.lower())).intersection(words)
    if not chinese(output) or 2 * sum(word in copied for word in words) > len(words) > 0:
        return "untranslated"
    return ""


def _loops(text: str) -> bool:
    """Whether a few signs follow each other again and again; digits may."""
    return LOOP.search("".join(sign for sign in same(text) if not sign.isdigit())) is not None


def _answered_alike(outputs: Mapping[str, str]) -> set[str]:
    """Texts that got one long answer though they share no word: an excuse, or a stuck model."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for text, output in outputs.items():
        if len(output) >= LONG:
            groups[same(output)].append(text)
    return {
        text
        for group in groups.values()
        if len(group) >= SHARED and _most_shared(group) < max(2, len(group) / 4)
        for text in group
    }


def _most_shared(texts: list[str]) -> int:
    """In how many of some texts their most frequent word stands, function words aside."""
    words = (set(WORD.findall(text.lower())) - FUNCTION_WORDS for text in texts)
    return max(Counter(word for found in words for word in found).values(), default=0)
