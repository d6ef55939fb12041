"""LLaVA-test with a judge of ours: both formulas, bad lines, ties, bias, failures, offline."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import reader_fixtures as fixtures
import small_runs
import suite_data
from fake_judge import serving

from xllm_jax.configs.suites import llava_test as llava_config
from xllm_jax.core.errors import UserError
from xllm_jax.core.suite import JudgedSuite, JudgeSettings, TranslationSettings
from xllm_jax.data.example import Example
from xllm_jax.evaluation import judge
from xllm_jax.evaluation.suites import run
from xllm_jax.evaluation.suites.run import Place

KINDS = ("conv", "detail", "complex")
COUNT = 12


@pytest.fixture
def config(tmp_path) -> JudgedSuite:
    """Twelve questions about four images."""
    root = tmp_path / "data/llava_test"
    asked, said, zh = [], [], []
    for number in range(COUNT):
        image = f"{number % 4:012d}.jpg"
        row = {"question_id": number, "image": image, "category": KINDS[number % 3]}
        asked.append(row | {"text": f"What is it {number}?"})
        zh.append(row | {"text": f"这是什么{number}？"})
        said.append({"question_id": number, "text": f"reference {number}"})
    known = [
        {"image": f"{n:012d}.jpg", "captions": [f"caption {n}", "more"],
         "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}]}
        for n in range(4)
    ]  # fmt: skip
    for name, rows in (
        ("qa90_questions", asked),
        ("qa90_gpt4_answer", said),
        ("caps_boxes_coco2014_val_80", known),
        ("zh", zh),
    ):
        fixtures.write(root / f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
    fixtures.pictures(root / "images", *(f"{n:012d}.jpg" for n in range(4)))
    made = llava_config.get_config()
    made.root, made.judge = str(tmp_path / "data"), JudgeSettings("", "fake", parallel=3, wait=0.01)
    return made


def answer(example: Example) -> str:
    return f"answer {example.key}"


def number(text: str) -> int:
    """The question that an answer belongs to."""
    return int(text.split()[-1])


def points(text: str) -> float:
    """A fair judge's points: 8 for the reference, 4 to 10 for the model by the question."""
    return 8 if text.startswith("reference") else 4 + number(text) % 7


def judged(config, folder, rule, **changes) -> tuple[dict, object]:
    """(results, the server) of a run with a judge."""
    with serving(rule) as server:
        config.judge = dataclasses.replace(config.judge, url=server.url, **changes)
        run.run("llava_test", config, suite_data.model(answer), Place(folder))
    config.judge = dataclasses.replace(config.judge, url="")
    return suite_data.results(folder), server


def fair(one: str, other: str) -> str:
    return f"{points(one):g} {points(other):g}\nBecause."


def test_both_formulas_agree_with_a_fair_judge(config, tmp_path):
    found, server = judged(config, tmp_path / "out", fair)
    assert len(server.asked) == 2 * COUNT == len(set(server.asked))
    for kind in (*KINDS, "all"):
        keys = [n for n in range(COUNT) if kind in ("all", KINDS[n % 3])]
        model = np.mean([4 + n % 7 for n in keys])
        one = found["kinds"][kind]
        assert one["llava"]["score"] == pytest.approx(100 * model / 8)
        assert one["llava"]["reference"] == 8 and one["llava"]["unreadable"] == 0
        assert one["both_orders"]["value"] == pytest.approx(100 * model / 8, abs=1e-5)
        assert one["both_orders"]["low"] < one["both_orders"]["value"] < one["both_orders"]["high"]
        assert one["bias"]["value"] == 0 and one["agreement"]["value"] == 1
    assert (found["kinds"]["all"]["wins"], found["kinds"]["all"]["ties"]) == (2, 2)
    text = (tmp_path / "out/results.md").read_text("utf-8")
    assert all(part in text for part in (*KINDS, *found["hashes"].values()))


def test_the_judge_reads_llavas_order(config, tmp_path):
    _, server = judged(config, tmp_path / "out", fair)
    first = next(t for t in server.asked if "reference 5" in t.split("[End of Assistant 1]")[0])
    assert first == (
        "[Context]\ncaption 1\nmore\n\ncat: [0.1, 0.2, 0.3, 0.4]\n\n"
        "[Question]\nWhat is it 5?\n\n"
        "[Assistant 1]\nreference 5\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nanswer 5\n\n[End of Assistant 2]\n\n"
        f"[System]\n{judge.RULES['complex']['prompt']}\n\n"
    )
    assert server.systems == {judge.SYSTEM}


def test_a_judge_that_likes_the_first_place_is_seen(config, tmp_path):
    def likes(one: str, other: str) -> str:
        return f"{min(10, points(one) + 2):g} {points(other):g}"

    found, _ = judged(config, tmp_path / "out", likes)
    one = found["kinds"]["all"]
    bonus = [(2 + min(2, 10 - (4 + n % 7))) / 2 for n in range(COUNT)]
    assert one["bias"]["value"] == pytest.approx(np.mean(bonus), abs=1e-6)
    assert one["agreement"]["value"] < 1
    # LLaVA's number takes the reference's place for its quality.
    assert one["llava"]["score"] < one["both_orders"]["value"]


def test_ninety_questions_tell_bias_from_noise():
    rng = np.random.default_rng(0)

    def cases(bonus: float) -> list[judge.Judged]:
        found = []
        for n in range(90):
            a, b, c, d = rng.integers(3, 9, 4).astype(float)
            found.append(judge.Judged(str(n), "conv", (a + bonus, b), (c, d + bonus)))
        return found

    assert judge.bias(cases(1.0)).low > 0 > judge.bias(cases(0.0)).low
    assert judge.bias(cases(0.0)).high > 0 > judge.bias(cases(-1.0)).high
    assert judge.agreement(cases(0.0)).high < 0.75


def test_ties(config, tmp_path):
    found, _ = judged(config, tmp_path / "out", lambda one, other: "7 7")
    one = found["kinds"]["all"]
    assert (one["wins"], one["ties"], one["losses"]) == (0, COUNT, 0)
    assert one["both_orders"]["value"] == 100 == one["llava"]["score"]


def test_bad_lines_are_minus_one_for_llava_and_excluded_here(config, tmp_path):
    def rule(one: str, other: str) -> str:
        bad = {0: "I cannot grade this.", 3: "8, 9 both good", 6: "Scores: 8 and 11", 9: ""}
        return bad.get(number(one), fair(one, other))

    found, _ = judged(config, tmp_path / "out", rule)
    one, every = found["kinds"]["conv"], found["kinds"]["all"]
    assert (one["llava"]["unreadable"], one["excluded"], one["both_orders"]["value"]) == (
        *(4, 3),
        pytest.approx(100 * (4 + 3 % 7 + 1) / 8, rel=0.2),
    )
    assert one["llava"]["score"] == 100 * -1 / -1
    pairs = [(8, 4 + n % 7) if n % 3 else (-1, -1) for n in range(COUNT)]
    reference, model = np.mean(pairs, 0)
    assert every["llava"]["score"] == pytest.approx(100 * model / reference)
    assert every["excluded"] == 3 and every["unanswered"] == 0


@pytest.mark.parametrize(
    "reply, theirs, ours",
    [
        ("8 9\nfine", (8, 9), (8, 9)),
        ("8,9", (8, 9), (8, 9)),
        ("8, 9", (-1, -1), (8, 9)),
        ("8.5 9.0", (8.5, 9), (8.5, 9)),
        ("\n8 9", (-1, -1), (8, 9)),
        ("8 9 ", (-1, -1), (8, 9)),
        ("Assistant 1: 8, Assistant 2: 9", (-1, -1), None),
        ("8/10 9/10", (-1, -1), None),
        ("0 9", (0, 9), None),
        ("-1 -1", (-1, -1), None),
        ("80 90", (80, 90), None),
        ("eight nine", (-1, -1), None),
        ("", (-1, -1), None),
    ],
)
def test_first_lines(reply, theirs, ours):
    assert judge.llava_pair(reply) == theirs and judge.pair(reply) == ours


def test_failures_are_bounded_counted_and_asked_again(config, tmp_path):
    def rule(one: str, other: str) -> object:
        return {1: "late", 2: 400, 4: 503}.get(number(one), fair(one, other))

    found, server = judged(config, tmp_path / "out", rule, timeout=0.5, attempts=2)
    every = found["kinds"]["all"]
    assert every["unanswered"] == 2 and every["excluded"] == 1
    assert len(server.asked) == 2 * COUNT + 4  # two more tries of two questions in both orders
    again, server = judged(config, tmp_path / "out", fair, timeout=5.0)
    assert len(server.asked) == 4 and again["kinds"]["all"]["unanswered"] == 0
    assert again["kinds"]["all"]["excluded"] == 1  # what was refused stays so
    assert again["hashes"] == found["hashes"]


def test_every_reply_is_kept_and_scored_again_offline(config, tmp_path):
    found, _ = judged(config, tmp_path / "out", fair)
    files = list((tmp_path / "out/judge").rglob("*.json"))
    assert len(files) == 2 * COUNT
    kept = json.loads(files[0].read_text("utf-8"))
    assert kept["messages"][1]["content"].startswith("[Context]") and "reply" in kept
    run.run("llava_test", config, suite_data.model(answer), Place(tmp_path / "out"))
    assert suite_data.results(tmp_path / "out") == found
    for change in ({"model": "other"}, {"system": "Be strict."}):
        other = dataclasses.replace(config, judge=dataclasses.replace(config.judge, **change))
        with pytest.raises(UserError, match="no reply of this judge"):
            run.run("llava_test", other, suite_data.model(answer), Place(tmp_path / "out"))


def test_a_judge_that_is_not_there_ends_the_command(config, tmp_path):
    for state, told in ((401, "answers 401"), (503, "fails at attempt 2: 503")):
        with pytest.raises(UserError, match=told):
            judged(config, tmp_path / str(state), lambda a, b, state=state: state, attempts=2)
    config.judge.url = "ftp://x"
    with pytest.raises(UserError, match=r"judge\.url: is no address"):
        run.run("llava_test", config, suite_data.model(answer), Place(tmp_path / "out"))


def test_rules_of_the_user(config, tmp_path):
    file = tmp_path / "rule.json"
    rules = {kind: {"role": "Assistant", "prompt": f"Grade {kind}."} for kind in KINDS[:2]}
    fixtures.write(file, rules)
    config.judge.rules = str(file)
    with pytest.raises(UserError, match="no rule for questions of the kind 'complex'"):
        judged(config, tmp_path / "out", fair)
    fixtures.write(file, rules | {"default": {"role": "Assistant", "prompt": "Grade."}})
    _, server = judged(config, tmp_path / "out", fair)
    assert {text.split("[System]\n")[1] for text in server.asked} == {
        "Grade conv.\n\n",
        "Grade detail.\n\n",
        "Grade.\n\n",
    }
    fixtures.write(file, ["no rules"])
    with pytest.raises(UserError, match="is no file of rules"):
        judged(config, tmp_path / "out", fair)


PROGRAM = "import sys, json; print(json.dumps([t.upper() for t in json.load(sys.stdin)]))"


def test_chinese_questions_are_asked_and_answers_come_back_translated(config, tmp_path):
    config.sets["llava_test"].options["questions"] = str(tmp_path / "data/llava_test/zh.jsonl")
    config.translation = TranslationSettings(command=f'{sys.executable} -c "{PROGRAM}"')
    heard = []
    model = suite_data.model(lambda e: heard.append(e.instruction) or answer(e))
    with serving(lambda one, other: "5 5") as server:
        config.judge.url = server.url
        run.run("llava_test", config, model, Place(tmp_path / "out"))
    assert set(heard) == {f"这是什么{n}？" for n in range(COUNT)}
    assert all("What is it" in text and "ANSWER" in text for text in server.asked)
    config.translation = TranslationSettings(command=f'{sys.executable} -c "print(1)"')
    with pytest.raises(UserError, match="writes no list of 12 texts"):
        run.run("llava_test", config, model, Place(tmp_path / "out"))


def test_answers_are_translated_by_an_endpoint(config, tmp_path):
    def rule(one: str, other: str) -> str:
        return "5 5" if other else f"translated {one}"

    with serving(rule) as server:
        config.judge.url = config.translation.url = server.url
        config.translation.model = "fake"
        for _ in range(2):
            run.run("llava_test", config, suite_data.model(answer), Place(tmp_path / "out"))
    assert len(server.asked) == 3 * COUNT
    assert sum("\ntranslated answer" in text for text in server.asked) == 2 * COUNT


def test_what_is_missing_is_named(config, tmp_path):
    for name, told in (
        ("qa90_gpt4_answer", "no reference answer"),
        ("caps_boxes", "known|no such"),
    ):
        file = next((tmp_path / "data/llava_test").glob(f"{name}*"))
        content = file.read_text("utf-8")
        file.write_text("\n".join(content.splitlines()[:-1]), "utf-8")
        with pytest.raises(UserError, match=told):
            judged(config, tmp_path / "out", fair)
        file.write_text(content, "utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_runs.make_world(tmp_path_factory.mktemp("judged"), items=4)


def test_the_worlds_questions_have_true_answers(world, tmp_path):
    """The tiny suite whole: the judge is told what is in a picture, and the truth gets it all."""
    config = llava_config.get_config("tiny")
    config.root, config.judge = str(world), JudgeSettings("", "fake", wait=0.01)
    asked = run.samples(config)["llava_test"]
    assert [example.tags[0] for example in asked] == [*KINDS] * (len(asked) // 3)
    truth = {example.key: example.answer for example in asked}
    wrong = {example.key for example in asked[1::3]}  # the descriptions

    def answers(example: Example) -> str:
        return "没有" if example.key in wrong else truth[example.key]

    def rule(one: str, other: str) -> str:
        return " ".join("9" if text in truth.values() else "3" for text in (one, other))

    with serving(rule) as server:
        config.judge.url = server.url
        run.run("llava_test", config, suite_data.model(answers), Place(tmp_path / "out"))
    found = suite_data.results(tmp_path / "out")["kinds"]
    assert found["detail"]["llava"]["score"] == pytest.approx(100 / 3)
    assert found["conv"]["both_orders"]["value"] == 100 == found["complex"]["llava"]["score"]
    scenes = json.loads((world / "coco/annotations/captions_test.json").read_text("utf-8"))
    told = "\n\n".join(server.asked)
    names = {picture["file_name"]: picture["id"] for picture in scenes["images"]}
    shown = {names[Path(example.media[0][1]).name] for example in asked}
    for row in scenes["annotations"]:
        assert row["image_id"] not in shown or row["caption"] in told
    boxes = re.findall(r"(\w+)色(\w+): \[(.*)\]", told)
    assert len(boxes) >= len(server.asked)
    assert all(0 <= float(x) <= 1 for *_, box in boxes for x in box.split(","))
