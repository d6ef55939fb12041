"""NExT-GPT's training text against the recorded conversations."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xllm_jax.convert.verify.nextgpt_formats import PAD, Cases
from xllm_jax.data.example import Example
from xllm_jax.data.text import nextgpt_format, prompt, templates

pytestmark = pytest.mark.golden
KINDS = ("encode", "generate", "tx2t", "t2x", "mosit")


@pytest.fixture(scope="module")
def cases(golden):
    return Cases(golden / "nextgpt")


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_become_the_recorded_ids(kind, cases):
    assert len(cases.cases[kind]) == 20
    for case in cases.cases[kind]:
        turns = cases.turns(kind, case)
        ids, labels = nextgpt_format.encode(turns, cases.tokenizer)
        assert (ids, labels) == (case["input_ids"], case["targets"])
        if "texts" in case:
            assert [turn.text for turn in turns] == case["texts"]


def test_captions_are_the_recorded_ones(cases):
    for case in cases.cases["process_caption"]:
        assert nextgpt_format.caption(case["in"]) == case["out"]


def test_what_stands_before_all_turns(cases):
    recorded, tokenizer = cases.cases["prefix"], cases.tokenizer
    start = [*tokenizer.start, *tokenizer.encode(nextgpt_format.PREFIX)]
    assert start == recorded["text"]
    start = [
        *tokenizer.start,
        *tokenizer.encode(nextgpt_format.PREFIX + nextgpt_format.OPEN),
    ]
    assert [*start, -1] == recorded["media"]


def test_the_template_has_the_same_words(cases):
    """Of a prompt's last round; the model's earlier answers end in a line ###."""
    (case, *_) = (one for one in cases.cases["tx2t"] if len(one["texts"]) > 2)
    said = [turn["value"] for turn in case["conversation"][:3]]
    style = templates.template("nextgpt")
    first = prompt.words(Example("e"), said[0], style)
    assert first.replace(prompt.MEDIA, "") == nextgpt_format.PREFIX + case["texts"][0]
    later = prompt.words(Example("e", history=((said[0], said[1]),)), said[2], style)
    wanted = nextgpt_format.PREFIX + "".join(case["texts"][:2]) + " " + case["texts"][2]
    assert later.replace(prompt.MEDIA, "") == wanted


def test_which_runs_survive_the_truncation(cases, golden):
    lengths = json.loads((golden / "nextgpt" / "formats.json").read_text())["config"]["max_length"]
    for case in cases.cases["run_survives_truncation"]:
        name = case["modality"]
        rows = [
            cases.encoded("generate", one)
            for one in cases.cases["generate"]
            if one["modality"] == name
        ]
        _, labels, _ = nextgpt_format.batch(rows, lengths["generate"], PAD)
        run = [cases.tokenizer.find(piece) for piece in nextgpt_format.signals(name).split()]
        assert np.sum(labels == run[0], axis=1).tolist() == case["rows_with_first"]
        assert np.sum(labels == run[-1], axis=1).tolist() == case["rows_with_last"]
        whole = [one > 0 for one in case["rows_with_last"]]
        assert whole == case["trainable_row"]
