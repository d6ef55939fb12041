"""Evaluation with a model that is not one: controls, groups, tables, a page that stands alone."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
import small_runs

from xllm_jax import report
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.evaluation import demo_suite, measure, scorers
from xllm_jax.report import plots, spread, tables, text


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_runs.make_world(tmp_path_factory.mktemp("world"), 12)


@pytest.fixture(scope="module")
def tasks(world):
    return demo_suite.tasks(world)


def knows(tasks):
    """A model that answers right when, and only when, it is given the right files."""
    truth = {}
    for task in tasks.values():
        for example in task.examples:
            said = scorers.reference(example) if example.task == "asr" else example.answer
            truth[example.media, example.instruction, example.task] = said

    def answer(examples):
        return [truth.get((e.media, e.instruction, e.task), "不知道") for e in examples]

    return answer


@pytest.fixture(scope="module")
def results(tasks):
    answer = knows(tasks)
    said = []
    found = demo_suite.run(tasks, {name: lambda: answer for name in demo_suite.PLAN}, said.append)
    assert len(said) == len(found["measures"])
    told = {"itm": {"value": 0.8, "low": 0.75, "high": 0.85, "samples": 300, "higher": True}}
    pairs = {"title": "Pairs", "samples": 300, "seconds": 1.0, "shown": [], "keys": []}
    found["measures"]["pairs@stage1"] = pairs | {"metrics": told}
    found["curves"] = {"stage2": [[step, 5.0 / (step + 1)] for step in range(40)]}
    found["timings"] = {"world": 3.2, "evaluate": 61.0}
    found["cer"] = "every character as it is"
    return found


def questions(count: int, tag: str = "color") -> list[Example]:
    """Questions about images of their own."""
    return [
        Example(str(i), (("image", f"{i}.jpg"),), f"{i}？", "红色", "vqa", tags=(tag,))
        for i in range(count)
    ]


def test_controls_hide_or_exchange_every_file():
    examples = questions(7) + [
        Example("s", (("image", "a.jpg"), ("speech", "a.flac")), answer="是"),
        Example("t", (("image", "b.jpg"), ("speech", "b.flac")), answer="是"),
    ]
    assert all(example.media == () for example in measure.blind(examples))
    changed = measure.shuffled(examples)
    assert changed == measure.shuffled(examples)
    for before, after in zip(examples, changed):
        assert before.media != after.media
        assert [m for m, _ in before.media] == [m for m, _ in after.media]
        assert dataclasses.replace(after, media=before.media) == before
    assert sorted(e.media for e in changed) == sorted(e.media for e in examples)
    images = measure.shuffled(examples, only=("image",))
    assert images[-1].media == (("image", "a.jpg"), ("speech", "b.flac"))


def test_exchange_never_gives_a_file_back_that_several_questions_share():
    examples = [dataclasses.replace(e, media=(("image", f"{i // 3}.jpg"),))
                for i, e in enumerate(questions(9))]  # fmt: skip
    for before, after in zip(examples, measure.shuffled(examples)):
        assert before.media != after.media
    assert measure.shuffled(examples[:3]) is None


def test_measure_counts_by_tag_and_keeps_controls_apart():
    examples = questions(10) + questions(20, "shape")
    examples += [dataclasses.replace(e, tags=("shape", "unseen_pair")) for e in questions(6)]
    task = measure.Task("vqa", "Questions", tuple(examples), scorers.short_answer)

    def answer(asked):
        # Right about colors if it sees anything, never right about shapes.
        return ["红色。" if e.media and "color" in e.tags else "蓝色" for e in asked]

    found = measure.measure(task, answer, controls=True)
    metric = found["metrics"]["accuracy"]
    assert metric["value"] == pytest.approx(10 / 36, abs=1e-6) and metric["samples"] == 36
    assert metric["low"] < metric["value"] < metric["high"]
    groups = {tag: (entry["value"], entry["samples"]) for tag, entry in metric["groups"].items()}
    assert groups["color"] == (1.0, 10) and groups["shape"] == (0.0, 26)
    assert groups["unseen_pair"] == (0.0, 6) and groups["seen"][1] == 30
    assert metric["blind"]["value"] == 0 and metric["shuffled"]["value"] == metric["value"]
    assert metric["chance"]["value"] == 1.0  # the answer is always the same
    assert metric["margin"]["over"] == "chance"
    assert metric["margin"]["value"] == pytest.approx(10 / 36 - 1, abs=1e-6)
    assert found["shown"][0]["right"] is True and found["shown"][-1]["right"] is False
    assert found == json.loads(json.dumps(found))


def test_error_rates_improve_downwards():
    examples = tuple(
        Example(str(i), (("speech", f"{i}.flac"),), answer="红色圆形", task="asr") for i in range(6)
    )
    task = measure.Task("sentences", "Speech", examples, scorers.transcription)

    def answer(asked):
        return ["红色圆" if e.media else "黑" for e in asked]

    found = measure.measure(task, answer, controls=True)
    metric = found["metrics"]["cer"]
    assert metric["value"] == 0.25 and metric["blind"]["value"] == 1.0
    assert metric["shuffled"]["value"] == 0.25
    # All say the same here, so that a constant is the best control.
    assert metric["margin"]["value"] == -0.25 and metric["margin"]["over"] == "chance"
    better = measure.measure(task, lambda asked: ["红色圆形"] * len(asked))
    assert measure.compare(found, better, "cer")["value"] == 0.25
    assert measure.compare(found, found | {"keys": []}, "cer") is None


def test_video_captions_need_object_and_motion():
    truth = ("一个红色圆形向左移动。", "红色圆形向左移动。")
    example = Example("v", (("video", "v.mp4"),), answer=truth[0], references=truth)
    said = [
        "视频中一个红色圆形在向左移动",
        "红色方形向左移动",
        "红色圆形向右移动",
        "蓝色圆形向左移动",
        "",
    ]
    found = scorers.video_caption(said, [example] * 5)["accuracy"]
    assert found.samples.tolist() == [1, 0, 0, 0, 0]
    example = dataclasses.replace(example, references=("圆形从红色变成蓝色。",))
    said = ["一个圆形从红色变成蓝色。", "一个圆形从蓝色变成红色。", "红色圆形向左移动。"]
    assert scorers.video_caption(said, [example] * 3)["accuracy"].samples.tolist() == [1, 0, 0]


def test_captions_name_objects():
    truth = ("图中左上有一个大的红色圆形，右下有一个小的蓝色方形。",)
    example = Example("i", (("image", "i.jpg"),), answer=truth[0], references=truth)
    said = ["左上是大的红色圆形。", truth[0], "没有"]
    found = scorers.caption(said, [example] * 3)["objects"]
    assert found.samples == pytest.approx([2 / 3, 1, 0])


def test_a_model_that_sees_meets_every_goal(results):
    made = {table.title: table for table in tables.build(results)}
    goals = made["Goals, on the held-out split"]
    verdict = {row[0].text: row[-1].text for row in goals.rows}
    drawn = {"drawing", "drawing_edits"}  # which no model here does
    asked = [goal for goal in tables.GOALS if goal.measure not in drawn]
    claimed = [claim for claim in tables.CLAIMS if not claim.name.startswith("drawing_")]
    assert len(goals.rows) == len(asked) + len(claimed)
    for goal in asked:
        assert verdict[goal.title] == "met", goal
    # The same model stands for all: nothing can be better than it.
    assert verdict["Stage 3 improves spoken visual question answering"] == "missed"
    assert verdict["Spoken questions before stage 3 above their best control"] == "met"
    spoken = results["measures"]["spoken@before"]["metrics"]["accuracy"]
    assert spoken["value"] == 1 and spoken["blind"]["value"] == spoken["shuffled"]["value"] == 0
    first = made["Table 1: initializing the image interface, and more pairs"]
    assert len(first.rows) == len(tables.TABLE1) + 2  # and both differences
    assert len(made["Table 4: multimodal speech recognition"].rows) == 3


@pytest.mark.parametrize(("value", "blind", "met"), [(0.9, 0.4, True), (0.9, 0.6, False),
                                                     (0.8, 0.4, False)])  # fmt: skip
def test_a_goal_needs_its_control(value, blind, met):
    plain = {"low": value, "high": value, "samples": 9, "higher": True}
    found = {"value": value, "blind": {"value": blind}, **plain}
    row = tables.goal_row(tables.Goal("x", "m", "accuracy", 0.85, {"blind": 0.5}), found)
    assert row[-1] == tables.Cell("met" if met else "missed", met)


def test_a_goal_needs_every_control_it_names():
    goal = tables.Goal("x", "m", "accuracy", 0.7, {"blind": 0.2, "shuffled": 0.25})
    found = {"value": 0.9, "low": 0.9, "high": 0.9, "samples": 9, "higher": True}
    low, high = {"value": 0.1}, {"value": 0.3}
    between = {"value": 0.22}  # within one bound and not the other
    verdicts = {
        "missed": [
            {},
            {"blind": low},
            {"blind": low, "shuffled": high},
            {"blind": between, "shuffled": low},
        ],
        "met": [{"blind": low, "shuffled": low}, {"blind": low, "shuffled": between}],
    }
    for verdict, cases in verdicts.items():
        for controls in cases:
            assert tables.goal_row(goal, found | controls)[-1].text == verdict, controls


def test_missing_measures_leave_gaps_not_errors():
    shown = text.report(tables.build({"measures": {}, "timings": {"world": 2.0}}))
    assert "world" in shown and "Goals" not in shown


def test_columns_line_up_with_chinese_names():
    made = tables.Table("T", "", ("名字", "n"), ((tables.Cell("红色圆形"), tables.Cell("7")),))
    lines = text.table(made).splitlines()
    assert len({text.width(line) for line in (lines[2], lines[4])}) == 1


class Page(html.parser.HTMLParser):
    """Collects tags and whatever a page would load."""

    def __init__(self):
        super().__init__()
        self.count: dict[str, int] = {}
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_stands_alone_and_shows_the_files(results, tmp_path):
    shown = report.write(results, tmp_path)
    assert (tmp_path / "report.txt").read_text("utf-8").strip() == shown.strip()
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == results
    page = Page()
    written = (tmp_path / "report.html").read_text("utf-8")
    page.feed(written)
    assert page.open == []
    assert all(source.startswith("data:") for source in page.sources)
    assert shown.count("CER: every character as it is.") == 2
    assert '<span class="gloss" lang="en">' in written
    assert "://" not in re.sub(r'src="data:[^"]*"', "", written)
    assert page.count["audio"] > 0 and page.count["img"] > page.count["audio"]
    assert page.count["polyline"] == 1
    assert "cannot" not in written and "No such file" not in written


def test_page_escapes_what_a_model_says(tmp_path):
    task = measure.Task("vqa", "<b>", tuple(questions(6)), scorers.short_answer)
    found = measure.measure(task, lambda asked: ["<script>alert(1)</script>"] * len(asked))
    report.write({"measures": {"vqa@after": found}}, tmp_path)
    written = (tmp_path / "report.html").read_text("utf-8")
    assert "<script" not in written and "&lt;script&gt;" in written
    assert "0.jpg" in written  # the lost file is named instead of shown


def test_curves_skip_what_is_no_number():
    drawn = plots.curve("x", [[0, 4.0], [1, float("nan")], [2, 2.0], [3, 1.0]])
    points = re.search('points="([^"]*)"', drawn).group(1).split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 3 and heights == sorted(heights)
    # On a logarithmic axis 4 -> 2 and 2 -> 1 are equal steps.
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert plots.curve("x", [[0, 1.0]]) == ""


def test_curves_of_runs_are_thinned_out(tmp_path):
    log = tmp_path / "stage1" / "metrics.jsonl"
    log.parent.mkdir()
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 1001)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = demo_suite.curves(tmp_path, points=100)["stage1"]
    assert len(found) == 100 and found[0] == [1, 1.0]


def test_tasks_are_spread_and_complete(world, tasks):
    assert set(tasks) == set(demo_suite.TITLES)
    limited = demo_suite.tasks(world, limit=5)
    assert all(len(task.examples) == 5 for task in limited.values())
    keys = [example.key for example in tasks["caption"].examples]
    some = [example.key for example in limited["caption"].examples]
    assert some[0] == keys[0] and some[-1] == keys[-1]
    both = tasks["questions_image"].examples[0]
    assert sorted(m for m, _ in both.media) == ["image", "speech"] and both.task == "asr"
    with pytest.raises(UserError, match="no such folder"):
        demo_suite.tasks(world / "nowhere")
    with pytest.raises(UserError, match="holds none of"):
        demo_suite.tasks(world / "coco" / "test")


def test_chance_is_the_best_constant_of_each_kind():
    examples = questions(4) + [dataclasses.replace(e, answer="蓝色") for e in questions(2)]
    examples += [dataclasses.replace(e, tags=("yesno",), answer="是") for e in questions(3)]
    constant = scorers.best_constant(scorers.short_answer, examples)
    assert constant == ["红色"] * 6 + ["是"] * 3
    right = scorers.short_answer(constant, examples)["accuracy"]
    assert np.mean(right.samples) == pytest.approx(7 / 9)


@pytest.mark.parametrize("count", [0, 9])
def test_a_row_without_anything_to_score_says_so(count, tmp_path):
    """No samples at all, or recordings of which nothing was said: no CER can be stated."""
    mute = [
        Example(str(i), (("speech", f"{i}.flac"),), answer="", task="asr") for i in range(count)
    ]
    task = measure.Task("sentences", "Speech", tuple(mute), scorers.transcription)
    found = measure.measure(task, lambda asked: ["红色"] * len(asked), controls=True)
    cer = found["metrics"]["cer"]
    assert cer["value"] is cer["low"] is cer["high"] is None and cer["samples"] == count
    assert "margin" not in cer and measure.compare(found, found, "cer") is None
    unsaid = {"value": None, "low": None, "high": None, "samples": count, "metric": "accuracy"}
    results = {
        "measures": {"sentences@after": found, "sentences@asr": found},
        "comparisons": {"zero_shot": unsaid},
    }
    for one in (results, earlier(results)):  # what was measured, and what was kept as NaN once
        shown = report.write(one, tmp_path)
        verdicts = [row[-1] for row in tables.build(one)[0].rows]
        assert verdicts == [tables.Cell("no data", False)] * 3
        page = (tmp_path / "report.html").read_text("utf-8")
        assert page.count("no data") >= 3
        assert not re.search(r"\b(nan|NaN|None)\b", shown + page)
        assert spread.values(tmp_path) == {}


def earlier(results):
    """Results as versions wrote them that knew no value as NaN."""
    written = re.sub(r'"(value|low|high)": null', r'"\1": NaN', json.dumps(results))
    return json.loads(written)


@pytest.mark.parametrize("scorer", [scorers.caption, scorers.short_answer, scorers.video_caption])
def test_no_samples_are_no_score_of_any_task(scorer):
    task = measure.Task("x", "X", (), scorer)
    found = measure.measure(task, lambda asked: [], controls=True)["metrics"]
    assert found and all(one["value"] is None and one["samples"] == 0 for one in found.values())


def test_a_group_without_anything_to_score_leaves_the_others(tmp_path):
    said = [
        Example(str(i), answer="红色" if i < 6 else "", task="asr", tags=("a" if i < 6 else "b",))
        for i in range(12)
    ]
    task = measure.Task("sentences", "Speech", tuple(said), scorers.transcription)
    found = measure.measure(task, lambda asked: [e.answer for e in asked])
    groups = found["metrics"]["cer"]["groups"]
    assert groups["a"]["value"] == 0 and groups["b"]["value"] is None
    assert "no data" in report.write({"measures": {"sentences@after": found}}, tmp_path)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)


def test_pictures_out_have_a_table_and_goals_of_their_own():
    def score(value, **controls):
        found = {"value": value, "low": value - 0.1, "high": value + 0.1, "samples": 9}
        return found | {"higher": True} | {name: {"value": v} for name, v in controls.items()}

    controls = {"ceiling": 0.9, "shuffled": 0.1, "unconditional": 0.0}
    drawn = {"title": "Requests", "metrics": {"looks": score(0.85, **controls)}}
    edits = {"title": "Edits", "metrics": {"looks": score(0.5)}}
    measures = {"drawing": drawn, "drawing_edits": edits}
    found = tables.drawing(measures)
    cells = [[cell.text for cell in row] for row in found.rows]
    assert cells[0][1:] == ["85.0 [75.0, 95.0]", "9", "90.0", "10.0", "0.0"]
    assert cells[1][1:] == ["50.0 [40.0, 60.0]", "9", "—", "—", "—"]
    verdicts = {row[0].text: row[-1].text for row in tables.goals(measures, {}).rows}
    assert list(verdicts.values()) == ["met", "missed"]
    worse = drawn | {"metrics": {"looks": score(0.85, **controls | {"unconditional": 0.12})}}
    (row,) = tables.goals({"drawing": worse}, {}).rows
    assert row[-1].text == "missed"


def test_text_before_and_after_pictures_is_compared():
    value = {"value": 0.9, "low": 0.8, "high": 0.95, "samples": 9, "higher": True}
    measures = {
        f"vqa@{model}": {"title": "VQA", "metrics": {"accuracy": value}}
        for model in ("after", "draws")
    }
    gain = {"value": 0.0, "low": -0.01, "high": 0.01, "samples": 9, "metric": "accuracy"}
    found = tables.text_ability(measures, {"draws_vqa": gain})
    assert [cell.text for cell in found.rows[0]] == [
        "VQA",
        *["90.0 [80.0, 95.0]"] * 2,
        "0.0 [-1.0, 1.0]",
    ]
    assert tables.text_ability({"vqa@after": measures["vqa@after"]}, {}).rows == ()
