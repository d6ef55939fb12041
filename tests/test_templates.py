"""Templates and LLMs: each template with each LLM, those that belong together and all others."""

from __future__ import annotations

import pytest
import test_causal_family
import test_llm_family
from small_runs import TOKENIZER

from xllm_jax.core.errors import UserError
from xllm_jax.data.text import templates
from xllm_jax.data.text.llm_families import causal, glm, vicuna_v0

ANY = {"paper", "plain"}
BELONG = {
    "chatglm": {"chatglm_zh"},
    "vicuna": {"vicuna_v1"},
    "vicuna_v0": {"vicuna_v0", "nextgpt"},
    "llama3": {"llama3"},
    "chatml": {"chatml"},
    "glm4": {"glm4"},
}
OWN = templates.Template("{question}?", "{question} {answer}", "{question}")
NOT_ONE = "a text"


@pytest.fixture(scope="module")
def families(tmp_path_factory, golden):
    """{LLM: its family, with a tokenizer of the published kind}."""
    folder, vicuna = tmp_path_factory.mktemp("templates"), str(golden / "nextgpt" / "tokenizer")
    made = {"chatglm": glm.Family(str(TOKENIZER)), "vicuna": causal.Family(vicuna)}
    made["vicuna_v0"] = vicuna_v0.Family(vicuna)
    for kind in test_causal_family.SPECIALS:
        made[kind] = causal.Family(str(test_causal_family.write_fast(folder / kind, kind)))
    return made


@pytest.mark.golden
@pytest.mark.parametrize("llm", BELONG)
@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_every_template_with_every_llm(name, llm, families):
    """It is taken where it belongs, and else refused in a line that names those that do."""
    family, fits = families[llm], BELONG[llm] | ANY
    if name in fits:
        assert templates.template_of(name, family) == templates.TEMPLATES[name]
        return
    with pytest.raises(UserError, match=rf"^data\.template: '{name}' is for \w") as told:
        templates.template_of(name, family)
    line = str(told.value)
    assert "\n" not in line and "package.module:NAME" in line and "docs/llms.md" in line
    offered = line.partition("Take ")[2].partition(", or one")[0].split(", ")
    assert set(offered) == fits


def test_every_template_is_of_an_llm_of_the_table():
    assert set.union(ANY, *BELONG.values()) == templates.TEMPLATES.keys()


def test_a_family_alone_tells_what_needs_no_tokenizer():
    for name, kind in (("vicuna_v1", glm), ("chatglm_zh", causal), ("vicuna_v0", causal)):
        with pytest.raises(UserError, match=rf"'{name}' is for .*, not for the family"):
            templates.check_family(name, kind.Family)
    templates.check_family("chatml", causal.Family)  # whether it fits, the tokenizer tells


class Derived(causal.Family):
    """A family that is made from a packaged one."""


def test_an_llm_of_another_package_takes_any_template_that_its_tokenizer_can_read():
    own = test_llm_family.Causal("")
    own.tokenizer.encode = lambda text: list(map(ord, text))
    for name, one in templates.TEMPLATES.items():
        if one.signs:
            with pytest.raises(UserError, match="the tokenizer has no"):
                templates.template_of(name, own)
        else:
            assert templates.template_of(name, own) == one
    with pytest.raises(UserError, match="not for the family 'causal'"):
        templates.check_family("chatglm_zh", Derived)


@pytest.mark.golden
def test_a_template_of_ones_own_goes_with_every_llm(families):
    for family in families.values():
        assert templates.template_of(f"{__name__}:OWN", family) is OWN
    for name, said in (("NOT_ONE", "is no Template"), ("NONE", "has no 'NONE'")):
        with pytest.raises(UserError, match=rf"^data\.template: .*{said}"):
            templates.template(f"{__name__}:{name}")
