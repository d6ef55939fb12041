"""What a judge is asked about two answers, and what its replies are worth: LLaVA's way and ours.

LLaVA (arXiv 2304.08485, section 5.1) shows a text-only judge what is in the image, the question,
the reference answer as the first and the model's as the second, and the rule of the question's
kind. The first line of the reply is two scores. A model's number is the mean of its scores over the
mean of the reference's, times 100; its script counts a reply that it cannot read as -1 for both.

Ours asks in both orders, takes a question whose two replies can be read, and counts the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xllm_jax.core.text_lines import split_lines
from xllm_jax.evaluation import bootstrap
from xllm_jax.evaluation.scorers import Score, average

LOWEST, HIGHEST = 1.0, 10.0  # points of an answer
UNREADABLE = (-1.0, -1.0)
NUMBER = re.compile(r"(?<![\w./-])\d+(?:\.\d+)?(?![\w/])")
SYSTEM = "You grade answers to questions about images, carefully and without favor."
TASK = (
    "Two assistants have answered the question above about an image that you cannot see. The "
    "context describes it: captions, and objects with their boxes (left, top, right, bottom, as "
    "shares of the image). {stress} Give each answer a score from 1 (useless) to 10 (excellent). "
    "Which answer comes first means nothing, and neither does length for its own sake. Write the "
    "two scores on the first line, the first assistant's and then the second's, with one space "
    "between them and nothing else. Give your reasons on the lines below."
)
STRESS = {
    "conv": "See whether each answer is true of the image and answers what was asked.",
    "detail": "See how fully and how exactly each answer describes the image, and whether it "
    "tells of things that are not there.",
    "complex": "See whether each answer reasons soundly from what is in the image to what was "
    "asked.",
}
RULES = {
    kind: {"role": "Assistant", "prompt": TASK.format(stress=stress)}
    for kind, stress in STRESS.items()
}


class Case(NamedTuple):
    """One question to be judged.

    Attributes:
      key: of the question.
      kind: 'conv', 'detail' or 'complex'.
      context: what is known of the image.
      question, reference, answer: as the judge reads them.
    """

    key: str
    kind: str
    context: str
    question: str
    reference: str
    answer: str


def described(image: Mapping[str, Any]) -> str:
    """The context of an image: its captions, a line each, and its objects with their boxes."""
    boxes = (f"{one['category']}: {one['bbox']}" for one in image["instances"])
    return "\n".join(image["captions"]) + "\n\n" + "\n".join(boxes)


def content(case: Case, rule: Mapping[str, str], swapped: bool = False) -> str:
    """What the judge reads, in LLaVA's order: context, question, both answers, the rule.

    Args:
      case: the question.
      rule: of its kind, 'role' and 'prompt'.
      swapped: the model's answer comes first.
    """
    answers = (case.answer, case.reference) if swapped else (case.reference, case.answer)
    parts = [f"[Context]\n{case.context}", f"[Question]\n{case.question}"]
    for number, answer in enumerate(answers, start=1):
        name = f"{rule['role']} {number}"
        parts += [f"[{name}]\n{answer}", f"[End of {name}]"]
    return "\n\n".join([*parts, f"[System]\n{rule['prompt']}"]) + "\n\n"


def llava_pair(reply: str) -> tuple[float, float]:
    """The two scores as LLaVA's script reads them, -1 for both where it cannot."""
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, words)
    except ValueError:
        return UNREADABLE
    return first, second


def pair(reply: str) -> tuple[float, float] | None:
    """The two scores, None where the first line that says something has not exactly two numbers
    from 1 to 10."""
    line = next((line for line in split_lines(reply) if line.strip()), "")
    found = [float(number) for number in NUMBER.findall(line)]
    if len(found) != 2 or not all(LOWEST <= one <= HIGHEST for one in found):
        return None
    return found[0], found[1]


def llava(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """LLaVA's numbers: of (reference, model) pairs, the mean of both and their ratio times 100.

    Returns:
      {'score', 'reference', 'model', 'questions', 'unreadable'}; the first three None where there
      is nothing, or nothing to divide by.
    """
    found = {"questions": len(pairs), "unreadable": sum(one == UNREADABLE for one in pairs)}
    if not pairs:
        return {"score": None, "reference": None, "model": None, **found}
    reference, model = (float(value) for value in np.asarray(pairs, np.float64).mean(0))
    score = 100 * model / reference if np.isfinite(reference) and reference else None
    return {"score": score, "reference": reference, "model": model, **found}


class Judged(NamedTuple):
    """The scores of a question whose replies in both orders could be read.

    Attributes:
      key, kind: of the question.
      first: (reference, model) where the reference came first.
      second: the same where the model came first.
    """

    key: str
    kind: str
    first: tuple[float, float]
    second: tuple[float, float]

    @property
    def mean(self) -> tuple[float, float]:
        """(reference, model) over both orders."""
        one, other = self.first, self.second
        return (one[0] + other[0]) / 2, (one[1] + other[1]) / 2

    @property
    def bias(self) -> float:
        """How many points more the place in front gets."""
        return (self.first[0] - self.first[1] + self.second[1] - self.second[0]) / 2

    @property
    def agrees(self) -> bool:
        """Whether both orders prefer the same answer, or none."""
        return np.sign(self.first[1] - self.first[0]) == np.sign(self.second[1] - self.second[0])


def relative(judged: Sequence[Judged]) -> Score:
    """The model's points over the reference's, times 100."""
    sums = np.array([one.mean[::-1] for one in judged], np.float64).reshape(-1, 2)
    ends = np.array([[LOWEST, HIGHEST], [HIGHEST, LOWEST]])
    return Score(sums, _ratio, ends, _ratio(sums))


def _ratio(sums: np.ndarray) -> np.ndarray:
    return 100 * bootstrap.rate(sums)


def bias(judged: Sequence[Judged]) -> bootstrap.Estimate:
    """How many points more the place in front gets, with its interval."""
    values = np.array([one.bias for one in judged], np.float64)
    pairs = np.stack([values, np.ones_like(values)], axis=1)
    most = HIGHEST - LOWEST
    return bootstrap.estimate(pairs, bootstrap.rate, ends=np.array([[-most, 1.0], [most, 1.0]]))


def agreement(judged: Sequence[Judged]) -> bootstrap.Estimate:
    """Share of questions in which both orders prefer the same answer."""
    return average([one.agrees for one in judged]).estimate()


def outcomes(judged: Sequence[Judged]) -> dict[str, int]:
    """{'wins', 'ties', 'losses'} of the model, by the mean over both orders."""
    signs = [float(np.sign(one.mean[1] - one.mean[0])) for one in judged]
    return {"wins": signs.count(1.0), "ties": signs.count(0.0), "losses": signs.count(-1.0)}
