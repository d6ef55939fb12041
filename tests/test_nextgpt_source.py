"""Lists of NExT-GPT: T-T+X of the first version, generation of the second."""

from __future__ import annotations

import json

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.core.output_settings import Signals
from xllm_jax.data.sources import nextgpt


@pytest.fixture
def read(tmp_path):
    def opened(records, **options):
        (tmp_path / "train.json").write_text(json.dumps(records), "utf-8")
        return nextgpt.examples(str(tmp_path), **options)

    return opened


def turns(*texts, **last):
    who = ("human", "gpt")
    made = [{"from": who[n % 2], "value": text} for n, text in enumerate(texts)]
    made[-1] |= last
    return made


def first(*texts, caption="", kind="text"):
    made = turns(*texts, caption=caption, output_modality=kind)
    for turn in made[:-1]:
        turn |= (
            {"input_modality": "text"} if turn["from"] == "human" else {"output_modality": "text"}
        )
    return {"mm_name": "a.jpg", "source_data": "cc3m", "conversation": made}


@pytest.mark.golden
def test_recorded_conversations_of_the_second_version_are_read(golden, read):
    """Its lists hold captions beside the turns, of which the recording has the turns alone."""
    cases = json.loads((golden / "nextgpt/formats_rewrite.json").read_text("utf-8"))
    talks = [case["conversation"] for case in cases["kinds"]["generation"]]
    asked, answers = ([one[n]["value"].strip() for one in talks] for n in (0, 1))
    kinds = [nextgpt.MARKER.findall(answer) for answer in answers]
    assert len(talks) > 9 and all(len(one) == 1 for one in kinds)
    records = [
        {"conversations": talk, f"{kind}_captions": f"caption {number}"}
        for number, (talk, (kind,)) in enumerate(zip(talks, kinds))
    ]
    found = list(read(records, cleaned=False))
    assert [one.instruction for one in found] == asked
    assert [one.answer for one in found] == answers
    wanted = [((kind, f"caption {number}"),) for number, (kind,) in enumerate(kinds)]
    assert [one.outputs for one in found] == wanted


@pytest.mark.golden
@pytest.mark.parametrize("kind", nextgpt.KINDS)
def test_recorded_runs_of_the_second_version_are_those_with_a_word_between(golden, kind):
    cases = json.loads((golden / "nextgpt/formats_rewrite.json").read_text("utf-8"))
    ids = cases["signal_runs"][kind]["ids"]
    signals = Signals(ids[0], (len(ids) + 1) // 2, between=ids[1])
    assert list(signals.ids) == ids


@pytest.mark.golden
def test_recorded_conversations_are_read(golden, tmp_path):
    """Every conversation of the recording, turn by turn."""
    cases = json.loads((golden / "nextgpt/formats_cases.json").read_text("utf-8"))
    records = [
        {"conversation": case["conversation"]}
        for case in cases["t2x"] + cases["tx2t"]
        if all(turn.get("input_modality", "text") == "text" for turn in case["conversation"])
    ]
    assert len(records) > len(cases["t2x"]) / 2
    (tmp_path / "train.json").write_text(json.dumps(records), "utf-8")
    found = list(nextgpt.examples(str(tmp_path), cleaned=False))
    wanted = [
        (human["value"].strip(), gpt["value"].strip(), gpt["output_modality"], gpt["caption"])
        for record in records
        for human, gpt in zip(record["conversation"][::2], record["conversation"][1::2])
    ]
    assert len(found) == len(wanted)
    for one, (question, answer, kind, caption) in zip(found, wanted):
        assert one.instruction == question
        text = kind == "text"
        assert one.outputs == (() if text else ((kind, caption),))
        assert one.answer == (answer if text else f"{answer} <{kind}>".strip())


@pytest.mark.golden
def test_captions_are_cleaned_as_recorded(golden):
    cases = json.loads((golden / "nextgpt/formats_cases.json").read_text("utf-8"))
    assert [nextgpt.clean(c["in"]) for c in cases["process_caption"]] == [
        c["out"] for c in cases["process_caption"]
    ]


def test_the_second_version(read):
    said = turns("Draw a dog", "Sure! <image> And <image>", "And now?", "No.")
    (both, plain) = read(
        [{"output_image": "a", "image_captions": ["A Dog", "b"], "conversations": said}]
    )
    assert both.outputs == (("image", "a dog"), ("image", "b"))
    assert both.answer == "Sure! <image> And <image>" and both.task == "draw"
    assert plain.history == (("Draw a dog", "Sure!  And"),) and plain.task == "dialogue"


def test_one_kind_alone_can_be_asked_for(read):
    records = [first("a", "b", caption="c", kind=kind) for kind in ("image", "video")]
    assert [one.outputs[0][0] for one in read(records, modality="image")] == ["image"]
    with pytest.raises(UserError, match=r"options\.modality"):
        read(records, modality="smell")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (first("a", "b", caption=" ", kind="image"), "no caption"),
        (first("a", "b", caption="c", kind="smell"), "unknown modality"),
        ({"conversation": turns("a", "b", "c")}, "3 turns"),
        ({"conversation": turns("a", "b")}, "output_modality"),
        ({"conversations": turns("a", "b <image>")}, "image_captions"),
        ({"conversations": turns("a", "b <image>"), "image_captions": ["x", "y"]}, "number"),
        ({"conversations": [{"from": "gpt", "value": "a"}] * 2}, "human"),
        ({"x": 1}, "missing key"),
        (3, "not an object"),
        ({"conversation": [None, None]}, "not an object"),
    ],
)
def test_a_broken_record_costs_itself(read, record, message):
    found = read([first("a", "b"), record, first("c", "d")])
    assert len(found) == 3
    assert [found[n].instruction for n in (0, 2)] == ["a", "c"]
    with pytest.raises(UserError, match=message) as error:
        found[1]
    assert "\n" not in str(error.value)


def test_a_turn_that_shows_a_file_is_left_out_by_name(read):
    record = first("a", "b", caption="c", kind="image")
    record["conversation"][0]["input_modality"] = "image"
    found = read([record, first("c", "d")])
    with pytest.raises(UserError, match="not released"):
        found[0]
