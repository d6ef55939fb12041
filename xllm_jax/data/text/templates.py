"""Templates: the words around a question, and which LLMs each is for.

`data.template` names a row of `TEMPLATES`, or as 'package.module:NAME' a `Template` anywhere. A row
that belongs to some LLMs says which; with another one it is refused, since an LLM that was tuned on
another form answers badly, or past its end, and says nothing of it.
"""

from __future__ import annotations

import dataclasses
import re

from xllm_jax.core import lookup
from xllm_jax.core.errors import UserError
from xllm_jax.data.text import llm_family
from xllm_jax.data.text.llm_family import LLMFamily

FIELD = "data.template"
SIGN = r"<\|\w+\|>"  # of a role or a turn, one token to the LLMs that know it
HELPFUL = (
    "A chat between a curious {one} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {one}'s questions."
)


@dataclasses.dataclass(frozen=True)
class Template:
    """The words around a question.

    Attributes:
      question: the only round of a prompt; `{question}` stands for the question.
      earlier: one earlier round, with `{round}`, `{question}` and `{answer}`.
      last: the round to be answered, after earlier ones.
      system: what stands before all rounds.
      families: names of the LLM families that it is for; () is for any LLM.
      llms: which LLMs these are, for people.

    `{media}` is where files go that no marker of the text places; without it they come first.
    """

    question: str
    earlier: str
    last: str
    system: str = ""
    families: tuple[str, ...] = ()
    llms: str = ""

    @property
    def signs(self) -> tuple[str, ...]:
        """Signs of roles in it, which an LLM has as single tokens."""
        return tuple(dict.fromkeys(re.findall(SIGN, f"{self.system}{self.earlier}{self.last}")))


def chat(
    user: str,
    assistant: str,
    end: str,
    system: str = "",
    space: str = "",
    families: tuple[str, ...] = ("causal",),
    llms: str = "",
) -> Template:
    """A template whose rounds are all alike.

    Args:
      user, assistant: what stands before a question and before an answer.
      end: what stands behind an earlier answer.
      system: what stands before all rounds.
      space: what stands before an earlier answer; the tokenizer puts it before the last one.
      families, llms: as of `Template`.
    """
    last = f"{user}{{media}}{{question}}{assistant}"
    earlier = f"{user}{{question}}{assistant}{space}{{answer}}{end}"
    return Template(last, earlier, last, system, families, llms)


TEMPLATES = {
    # paper, appendix A.3
    "paper": Template(
        question="Question: {question} \n Answer:",
        earlier="Question: {question} \n Answer: {answer}\n",
        last="Question: {question} \n Answer:",
    ),
    # repository, xllm.py; the form its LLM was tuned on
    "chatglm_zh": Template(
        question="问：{question}\n答：",
        earlier="[Round {round}]\n问：{question}\n答：{answer}\n",
        last="[Round {round}]\n问：{question}\n答：",
        families=("glm",),
        llms="ChatGLM-6B",
    ),
    # the question as it is
    "plain": Template(question="{question}", earlier="{question}\n{answer}\n", last="{question}"),
    # LLaMA and its kin; what the tokenizer puts in front is not repeated here
    "vicuna_v0": chat(
        "###Human: ",
        "###Assistant:",
        "",
        HELPFUL.format(one="human"),
        " ",
        ("vicuna_v0",),
        "Vicuna v0",
    ),
    "vicuna_v1": chat(
        "USER: ",
        " ASSISTANT:",
        "</s>",
        HELPFUL.format(one="user") + " ",
        " ",
        llms="Vicuna v1.1 to v1.5 and LLaMA 1 and 2",
    ),
    "nextgpt": chat(
        "Human: ",
        "\n### Assistant: ",
        "\n### ",
        "### ",
        families=("vicuna_v0",),
        llms="NExT-GPT's Vicuna v0",
    ),
    "llama3": chat(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        llms="LLaMA 3",
    ),
    "chatml": chat(
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
        llms="Qwen2.5 and Qwen3",
    ),
    "glm4": chat("<|user|>\n", "<|assistant|>\n", "", llms="GLM-4"),
}


def template(name: str) -> Template:
    """The named template: a row of `TEMPLATES`, or 'package.module:NAME'.

    Raises:
      UserError: unknown name, or no template there.
    """
    if ":" in name:
        _, found = lookup.imported(name, FIELD)
        if not isinstance(found, Template):
            raise UserError(f"{name} is no Template", field=FIELD, hint=f"See {__name__}")
        return found
    if name not in TEMPLATES:
        raise UserError(
            f"unknown template {name!r}", field=FIELD, hint=f"Choices: {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def template_of(name: str, family: LLMFamily) -> Template:
    """The named template, for an LLM whose tokenizer is known.

    Raises:
      UserError: there is none of this name, or it is for other LLMs: for another family, with signs
        of roles that the tokenizer would read letter by letter, or without those that it has.
    """
    found = template(name)
    _check_family(name, type(family), family)
    lacking = [sign for sign in found.signs if not _knows(family, sign)]
    if lacking:
        what = f"{name!r} is {_owner(found)}: the tokenizer has no {lacking[0]}"
        raise UserError(what, field=FIELD, hint=_hint(type(family), family))
    if found.families and not found.signs:
        known = [n for n, one in TEMPLATES.items() if one.signs and _all_known(family, one)]
        if known:
            sign = TEMPLATES[known[0]].signs[0]
            what = f"{name!r} is {_owner(found)}: this tokenizer has {sign}, a sign of {known[0]!r}"
            raise UserError(what, field=FIELD, hint=_hint(type(family), family))
    return found


def check_family(name: str, family: type[LLMFamily]) -> None:
    """Compares a template with the family of the LLM; one of another package takes any.

    Args:
      name: of the template.
      family: as `llm_family.find` finds it.

    Raises:
      UserError: there is no such template, or it is for another family.
    """
    _check_family(name, family)


def _check_family(name: str, family: type[LLMFamily], known: LLMFamily | None = None) -> None:
    found, kind = template(name), packaged(family)
    if kind and found.families and kind not in found.families:
        what = f"{name!r} is {_owner(found)}, not for the family {kind!r}"
        raise UserError(what, field=FIELD, hint=_hint(family, known))


def packaged(family: type[LLMFamily]) -> str:
    """Name of the packaged family that a class is, or is made from; '' of another one."""
    start = f"{llm_family.FAMILIES}."
    names = (base.__module__ for base in family.__mro__)
    return next((n.removeprefix(start) for n in names if n.startswith(start)), "")


def _owner(found: Template) -> str:
    return f"for {found.llms}" if found.llms else "of another family"


def _knows(family: LLMFamily, sign: str) -> bool:
    return len(family.tokenizer.encode(sign)) <= 2  # sentencepiece puts a space before it


def _all_known(family: LLMFamily, found: Template) -> bool:
    return all(_knows(family, sign) for sign in found.signs)


def _hint(kind: type[LLMFamily], family: LLMFamily | None = None) -> str:
    """The templates that fit, as far as is known."""
    named = packaged(kind)
    fits = [
        name
        for name, one in TEMPLATES.items()
        if not (named and one.families) or named in one.families
    ]
    if family is not None:
        signed = [name for name in fits if TEMPLATES[name].signs]
        known = [name for name in signed if _all_known(family, TEMPLATES[name])]
        free = [n for n in fits if not TEMPLATES[n].signs]
        free = [n for n in free if not (known and TEMPLATES[n].families)]
        fits = [*known, *free]
    return f"Take {', '.join(fits)}, or one of your own: package.module:NAME (docs/llms.md)"
