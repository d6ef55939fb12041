"""Suites on published data: each sample once, whatever hosts there are; scores, controls, gains."""

from __future__ import annotations

import dataclasses
import json

import pytest
import reader_fixtures as fixtures
import suite_data

from xllm_jax.configs.suites import asr as asr_config
from xllm_jax.configs.suites import captions as captions_config
from xllm_jax.configs.suites import vqa as vqa_config
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.core.suite import AnswerSuite, CaptionSuite
from xllm_jax.data.example import Example
from xllm_jax.evaluation import answer_store
from xllm_jax.evaluation.suites import run
from xllm_jax.evaluation.suites.run import Place

TOLD = {"test_ios": "AISHELL-2 test-ios (S)"}


def test_speech_is_scored_by_hand(tmp_path):
    config = suite_data.speech(tmp_path, 9)
    config.lengths = (6, 9)
    said = {f"U{n:04d}": suite_data.sentence(n) for n in range(9)}
    heard = dict(said) | {"U0000": "", "U0001": "零" + said["U0001"][1:], "U0002": "unreadable"}
    shown = run.run(
        "asr",
        config,
        suite_data.model(lambda e: heard[e.key]),
        Place(tmp_path / "out"),
    )
    found = suite_data.results(tmp_path / "out")["sets"]["test_ios"]
    total = sum(map(len, said.values()))
    lost = len(said["U0000"]) + len(said["U0002"])
    assert found["errors"] == {"replaced": 1, "deleted": lost, "inserted": 0}
    assert found["value"] == pytest.approx((1 + lost) / total, abs=1e-6)
    assert (found["failed"], found["samples"], found["characters"]) == (1, 9, total)
    assert {n: g["samples"] for n, g in found["lengths"].items()} == {
        "0–5": 3,
        "6–8": 3,
        "9 and more": 3,
    }
    assert {n: g["samples"] for n, g in found["speakers"].items()} == dict.fromkeys(
        ["S0", "S1", "S2"], 3
    )
    worst = [group["value"] for group in found["speakers"].values()]
    assert worst == sorted(worst, reverse=True)
    for kind in ("txt", "md", "html"):
        text = (tmp_path / f"out/results.{kind}").read_text("utf-8")
        assert "AISHELL" in text and f"{100 * found['value']:.2f}" in text
    assert shown in (tmp_path / "out/results.txt").read_text("utf-8")
    lines = (tmp_path / "out/answers/test_ios.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["key"] for line in lines] == list(said)
    assert "cannot be read" in json.loads(lines[2])["failed"]


@pytest.mark.parametrize("utterances", [1, 7, 13])
def test_hosts_share_a_folder_and_give_the_same_numbers(utterances, tmp_path):
    config = suite_data.speech(tmp_path, utterances)
    whole = {}
    for count in (1, 2, 3):
        folder, asked = tmp_path / str(count), []
        model = suite_data.model(suite_data.misheard, asked=asked)
        ends = [run.run("asr", config, model, Place(folder, "", h, count)) for h in range(count)]
        assert sorted(asked) == [f"U{n:04d}" for n in range(utterances)]
        shards = -(-utterances // config.shard)
        assert [end is not None for end in ends] == [h >= min(count, shards) - 1
                                                     for h in range(count)]  # fmt: skip
        whole[count] = [(folder / name).read_bytes() for name in
                        ("results.json", "results.md", "answers/test_ios.jsonl")]  # fmt: skip
    assert whole[1] == whole[2] == whole[3]


def test_an_interrupted_evaluation_continues(tmp_path):
    config, asked = suite_data.speech(tmp_path, 10), []

    def stops(example: Example) -> str:
        if example.key == "U0009":
            raise KeyboardInterrupt
        return suite_data.misheard(example)

    with pytest.raises(KeyboardInterrupt):
        run.run("asr", config, suite_data.model(stops, asked=asked), Place(tmp_path / "out"))
    assert len(asked) == 8 and not (tmp_path / "out/results.json").exists()
    again = suite_data.model(suite_data.misheard, asked=asked)
    run.run("asr", config, again, Place(tmp_path / "out"))
    assert sorted(asked) == [f"U{n:04d}" for n in range(10)]
    other = suite_data.model(suite_data.misheard, "other")
    with pytest.raises(UserError, match="answers to test_ios of another model"):
        run.run("asr", config, other, Place(tmp_path / "out"))
    with pytest.raises(UserError, match="of another model or other questions"):
        run.run("asr", dataclasses.replace(config, limit=3), again, Place(tmp_path / "out"))
    run.run("asr", dataclasses.replace(config, cer="raw"), again, Place(tmp_path / "out"))
    assert len(asked) == 10


def test_two_runs_are_compared_utterance_by_utterance(tmp_path):
    config = suite_data.speech(tmp_path, 40)
    first = suite_data.model(suite_data.misheard)
    second = suite_data.model(lambda e: e.answer, "right")
    run.run("asr", config, first, Place(tmp_path / "first"))
    run.run("asr", config, second, Place(tmp_path / "second", str(tmp_path / "first")))
    before = suite_data.results(tmp_path / "first")["sets"]["test_ios"]
    after = suite_data.results(tmp_path / "second")["sets"]["test_ios"]
    assert after["value"] == 0 and after["baseline"]["value"] == before["value"] > 0
    gain = after["gain"]
    assert gain["value"] == pytest.approx(before["value"], abs=1e-6)
    assert gain["low"] > 0 and gain["p"] < 0.001
    assert "+" in (tmp_path / "second/results.txt").read_text("utf-8")
    with pytest.raises(UserError, match="no answers to any"):
        run.run("asr", config, second, Place(tmp_path / "second", str(tmp_path)))
    few = dataclasses.replace(config, limit=5)
    with pytest.raises(UserError, match="other samples"):
        run.run("asr", few, second, Place(tmp_path / "few", str(tmp_path / "first")))


def test_a_bad_sample_costs_itself_and_a_bad_model_everything():
    examples = [Example(str(number)) for number in range(9)]
    answer = suite_data.model(lambda e: "unreadable" if e.key in "37" else e.key).load()
    answers, failed = answer_store.tried(answer, examples)
    assert answers == ["0", "1", "2", "", "4", "5", "6", "", "8"]
    assert [bool(why) for why in failed] == [text == "" for text in answers]
    with pytest.raises(UserError, match="0: cannot be read"):
        answer_store.tried(suite_data.model(lambda e: "unreadable").load(), examples)


def test_what_a_model_does_not_take_is_left_out(tmp_path):
    fixtures.visdial(tmp_path / "visdial")
    config = asr_config.get_config("tiny")
    config.root = str(tmp_path)
    for source in config.sets.values():
        source.split = "train"
    both = run.suite("asr").tasks(config, suite_data.model(str))
    assert [[m for m, _ in rows[0].media] for rows in both.values()] == [
        ["speech"],
        ["image", "speech"],
    ]
    assert {e.task for rows in both.values() for e in rows} == {"asr"}
    assert {e.instruction for rows in both.values() for e in rows} == {"请识别语音内容。"}
    config.instruction = "写下来。"
    again = run.suite("asr").tasks(config, suite_data.model(str))
    assert {e.instruction for rows in again.values() for e in rows} == {"写下来。"}
    assert [e.answer for e in both["questions_image"]] == [e.answer for e in both["questions"]]
    hears = dataclasses.replace(suite_data.model(str), modalities=("speech",))
    assert list(run.suite("asr").tasks(config, hears)) == ["questions"]
    config.only = ("questions_image",)
    with pytest.raises(UserError, match="takes speech alone"):
        run.suite("asr").tasks(config, hears)


def test_captions_in_both_countings_with_their_control(tmp_path):
    fixtures.ai_challenger(tmp_path / "ai")
    fixtures.msrvtt(tmp_path / "msrvtt")
    config = CaptionSuite(
        root=str(tmp_path),
        sets={
            "ai": Source("ai_challenger", "ai", "train", {"per_caption": False}),
            "clips": Source("msrvtt", "msrvtt", "train", {"per_caption": False}),
        },
    )
    asked = []
    model = suite_data.model(lambda e: asked.append(e.instruction) or e.references[0])
    run.run("captions", config, model, Place(tmp_path / "out"))
    assert set(asked) == {"请描述这张图。", "请描述这个视频。"}
    metrics = suite_data.results(tmp_path / "out")["sets"]["ai"]["metrics"]
    assert list(metrics) == [f"{m} {s}" for s in ("characters", "words")
                             for m in ("cider", "bleu4", "rouge_l")]  # fmt: skip
    assert metrics["rouge_l characters"]["value"] == metrics["bleu4 characters"]["value"] == 1
    assert metrics["rouge_l characters"]["shuffled"]["value"] == pytest.approx(7 / 8, abs=1e-6)
    assert metrics["rouge_l words"]["shuffled"]["value"] == 0


def test_questions_by_vqas_accuracy(tmp_path):
    fixtures.vqav2(tmp_path / "vqav2")
    config = AnswerSuite(
        root=str(tmp_path),
        sets={"vqav2": Source("vqav2", "vqav2", "train")},
        prompt="{question} 请用一个词回答。",
    )
    asked = []

    def answer(example: Example) -> str:
        asked.append(example.instruction)
        return example.answer if example.key != "10" else "不知道"

    run.run("vqa", config, suite_data.model(answer), Place(tmp_path / "out"))
    assert set(asked) == {"什么？ 请用一个词回答。"}
    found = suite_data.results(tmp_path / "out")["sets"]["vqav2"]["metrics"]["accuracy"]
    assert found["value"] == 0.8 and found["shuffled"]["value"] == 0
    assert found["groups"]["other"]["samples"] == 5
    config.prompt = "什么？"
    with pytest.raises(UserError, match="no place for the question"):
        run.suite("vqa").tasks(config)


def test_sets_that_are_not_there(tmp_path, capsys):
    config = suite_data.speech(tmp_path, 3)
    config.sets["absent"] = Source("aishell", "nowhere", "test")
    assert list(run.samples(config)) == ["test_ios"]
    assert "absent" in capsys.readouterr().out
    for only, told in ((("absent",), "nowhere"), (("test_iso",), "no such set 'test_iso'")):
        with pytest.raises(UserError, match=told):
            run.samples(dataclasses.replace(config, only=only))
    with pytest.raises(UserError, match="none of its sets is there"):
        run.samples(dataclasses.replace(config, root=str(tmp_path / "else")))


def test_a_record_without_a_reference_is_left_out_and_named(tmp_path, capsys):
    config = suite_data.speech(tmp_path, 200)
    file = tmp_path / "ios/test/trans.txt"
    file.write_text(file.read_text("utf-8") + "\nU9999", "utf-8")
    assert len(run.samples(config)["test_ios"]) == 200
    assert "1 records have no usable reference" in capsys.readouterr().out
    file.write_text(file.read_text("utf-8") + "".join(f"\nU999{n}" for n in range(8)), "utf-8")
    with pytest.raises(UserError, match="has a name and nothing else"):
        run.samples(config)


@pytest.mark.parametrize("made", [asr_config, captions_config, vqa_config])
@pytest.mark.parametrize("size", ["real", "tiny"])
def test_packaged_suites_name_readers_and_titles(made, size):
    from xllm_jax.core import limits, lookup
    from xllm_jax.data import mixture

    config = made.get_config(size)
    limits.check(config)
    assert config.titles.keys() == config.sets.keys()
    for source in config.sets.values():
        lookup.module(mixture.READERS, source.reader)
