"""Named steps that bring transcripts into one form before characters are compared.

A form is a name of `error_rate.FORMS` (among them 'xllm', the reference's own) or steps joined by
'+': 'nfkc+lower+spaces+punctuation' leaves symbols and digits as they are. Both sides take the same
steps, in the order in which they are named.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from xllm_jax.core.errors import UserError
from xllm_jax.evaluation import error_rate

Step = Callable[[str], str]

DIGITS = "零一二三四五六七八九"
SMALL, LARGE = ("", "十", "百", "千"), ("", "万", "亿")
LONGEST = 12  # digits of what is read as an amount; longer ones are numbers of something
NUMBER = re.compile(r"([0-9]+)(?:\.([0-9]+))?(%?)(年?)")


def without(*categories: str) -> Step:
    """A step that drops the characters of some Unicode categories, named by first letters."""
    return lambda text: "".join(c for c in text if unicodedata.category(c)[0] not in categories)


def digits(text: str) -> str:
    """Every Arabic digit as the Chinese one: 2023 is 二零二三."""
    return "".join(DIGITS[int(c)] if c in "0123456789" else c for c in text).replace("〇", "零")


def cardinal(number: int) -> str:
    """How an amount below 10**12 is read: 105 is 一百零五, 12 is 十二.

    Two is always 二: that people say 两 before some words, no rule of this length knows.
    """
    if not number:
        return DIGITS[0]
    said, gap = "", False
    for place in reversed(range(3)):
        group = number // 10000**place % 10000
        if group:
            said += (DIGITS[0] if said and (gap or group < 1000) else "") + _below_10000(group)
            said += LARGE[place]
        gap = not group
    return said.removeprefix("一") if said.startswith("一十") else said


def _below_10000(number: int) -> str:
    said, gap = "", False
    for place in reversed(range(4)):
        digit = number // 10**place % 10
        if digit:
            said += (DIGITS[0] if gap and said else "") + DIGITS[digit] + SMALL[place]
        gap = not digit
    return said


def numbers(text: str) -> str:
    """Arabic numbers as they are read aloud: 25% is 百分之二十五, 3.14 is 三点一四.

    Read digit by digit: years (four digits before 年), what starts with 0, and more than `LONGEST`
    digits.
    """

    def said(found: re.Match[str]) -> str:
        whole, part, percent, year = found.groups()
        single = (len(whole) > 1 and whole[0] == "0") or len(whole) > LONGEST
        single = single or (bool(year) and len(whole) == 4)
        spoken = digits(whole) if single else cardinal(int(whole))
        spoken += f"点{digits(part)}" if part else ""
        return f"{'百分之' if percent else ''}{spoken}{year}"

    return digits(NUMBER.sub(said, text))


STEPS: dict[str, Step] = {
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "lower": str.lower,
    "tags": lambda text: error_rate.TAG.sub("", text),
    "spaces": without("Z", "C"),
    "punctuation": without("P"),
    "symbols": without("S"),
    "digits": digits,
    "numbers": numbers,
}
# What a report says of each.
STATED = {
    "nfkc": "Unicode NFKC",
    "lower": "lower case",
    "tags": "no tags such as <NOISE>",
    "spaces": "no spaces or control characters",
    "punctuation": "no punctuation",
    "symbols": "no symbols",
    "digits": "digits one by one as Chinese",
    "numbers": "numbers as they are read in Chinese",
}


def form(name: str) -> Callable[[str, str], error_rate.Pair]:
    """What brings (reference, hypothesis) into a form.

    Raises:
      UserError: no such form or step.
    """
    if name in error_rate.FORMS:
        return error_rate.FORMS[name]
    steps = [STEPS[step] for step in _names(name)]

    def applied(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return lambda reference, hypothesis: (applied(reference), applied(hypothesis))


def stated(name: str) -> str:
    """A form in words, for reports; errors as of `form`."""
    if name in error_rate.STATED:
        return error_rate.STATED[name]
    return ", then ".join(STATED[step] for step in _names(name))


def _names(name: str) -> list[str]:
    names = name.split("+")
    for one in names:
        if one not in STEPS:
            hint = f"Forms: {', '.join(error_rate.FORMS)}; or steps with + between: "
            hint += ", ".join(STEPS)
            raise UserError(f"unknown form {one!r}", field="cer", hint=hint)
    return names
