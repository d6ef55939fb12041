"""One broken record costs itself: the others of its reader are read, and nothing is raised."""

import json
import os
import time

import numpy as np
import pytest
import reader_fixtures as fixtures

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.data import guarded, mixture
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities, paths
from xllm_jax.data.record import Record, Skipped
from xllm_jax.data.rows import lazy
from xllm_jax.prepare import preparation, shard


def drawn(source):
    """(examples that are read, reasons of the others) of a source."""
    found = {"a": mixture.read("a", source, "")}
    every = mixture.in_order(found, {"a": None})
    assert all(one.bad and one.reason for one in every if isinstance(one, Skipped))
    return (
        [one.example for one in every if isinstance(one, Record)],
        [one.reason for one in every if isinstance(one, Skipped)],
    )


def human(text):
    return {"from": "human", "value": text}


def model(text):
    return {"from": "gpt", "value": text}


GOOD = [
    {"id": f"g{i}", "image": "a.jpg", "conversations": [human("<image>\n问"), model("答")]}
    for i in range(9)
]
TALKS = {
    "literal <video>": ([human("HTML5 的 <video> 标签怎么用？"), model("写")], "slots"),
    "the model speaks first": ([model("hi"), human("q"), model("a")], "3 turns are no rounds"),
    "the last answer is missing": ([human("q"), model("a"), human("q")], "3 turns are no rounds"),
    "the model asks": ([model("q"), human("a")], "is 'gpt', not 'human'"),
    "a turn is no object": (["q", "a"], "is a text, not an object"),
    "a turn is no text": ([human(3), model("a")], "is a number, not a text"),
    "no turns": (None, "is null, not a list"),
}


@pytest.mark.parametrize("lined", [False, True])
@pytest.mark.parametrize("case", TALKS)
def test_a_broken_conversation(case, lined, tmp_path):
    turns, reason = TALKS[case]
    rows = [*GOOD[:4], {"id": "broken", "conversations": turns}, *GOOD[4:]]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(texts) if lined else f"[{', '.join(texts)}]"
    (tmp_path / f"train.json{'l' * lined}").write_text(text, "utf-8")
    examples, reasons = drawn(Source("instructions", str(tmp_path)))
    assert [one.key for one in examples] == [row["id"] for row in GOOD]
    assert len(reasons) == 1 and reason in reasons[0]


@pytest.mark.parametrize("field", ["transcript", "task", "image"])
@pytest.mark.parametrize("value", [{"a": 1}, 3, [[1]]])
def test_a_conversation_with_a_field_of_another_type(field, value, tmp_path):
    rows = [*GOOD, {**GOOD[0], field: value}]
    (tmp_path / "train.json").write_text(json.dumps(rows), "utf-8")
    examples, reasons = drawn(Source("instructions", str(tmp_path)))
    assert len(examples) == len(GOOD) and len(reasons) == 1


def test_a_conversation_of_null_fields(tmp_path):
    """Null is what tools write for nothing."""
    (tmp_path / "train.json").write_text(
        json.dumps([{**GOOD[0], "transcript": None, "tags": None}])
    )
    ((found,), reasons) = drawn(Source("instructions", str(tmp_path)))
    assert (found.transcript, found.tags, reasons) == ("", (), [])


def test_a_file_of_broken_conversations_is_refused(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": [human("q")]}] * 3))
    with pytest.raises(UserError, match=r"train\.json: \[0\].*1 turns are no rounds"):
        mixture.read("a", Source("instructions", str(tmp_path)), "")


# A row that is no JSON: a wrong word, a number of 5000 digits, nesting of 100,000 levels.
WORSE = {
    "word": '{"a": tru}',
    "digits": f'{{"a": {"9" * 5000}}}',
    "deep": "[" * 10**5 + "]" * 10**5,
}
# {reader: (its file, where its rows begin)}
FILES = {
    "ai_challenger": "caption_train_annotations_20170902.json",
    "coco": "annotations/captions_train2017.json",
    "instructions": "train.json",
    "minigpt4": "filter_cap.json",
    "msrvtt": "train_val_videodatainfo.json",
    "reference": "captions.json",
    "visdial": "visdial_1.0_train.json",
    "visual_genome": "region_descriptions.json",
}
BEGINS = {"coco": '"annotations": [', "minigpt4": '"annotations": [', "msrvtt": '"sentences": ['}
BEGINS["visdial"] = '"dialogs": ['


@pytest.mark.parametrize("row", WORSE)
@pytest.mark.parametrize("case", FILES)
def test_a_row_that_is_no_json(case, row, tmp_path):
    getattr(fixtures, case)(tmp_path)
    reader = {"minigpt4": "instructions"}.get(case, case)
    path = tmp_path / FILES[case] if case == "reference" else tmp_path
    options = {"images": f"{tmp_path}/images"} if case == "reference" else {}
    source = Source(reader, str(path), "train", options)
    wanted, _ = drawn(source)
    file, begin = tmp_path / FILES[case], BEGINS.get(case, "[")
    file.write_text(file.read_text("utf-8").replace(begin, f"{begin}{WORSE[row]}, ", 1), "utf-8")
    examples, reasons = drawn(source)
    assert sorted(one.answer for one in examples) == sorted(one.answer for one in wanted)
    assert len(reasons) == 1


@pytest.mark.parametrize("row", WORSE)
def test_a_member_or_line_that_is_no_json(row, tmp_path):
    fixtures.activitynet(tmp_path / "videos")
    fixtures.pictures(tmp_path / "pictures", "a.jpg", "b.jpg")
    (tmp_path / "pictures/captions.json").write_text(f'{{"a.jpg": "猫", "b.jpg": {WORSE[row]}}}')
    examples, reasons = drawn(Source("captions_folder", str(tmp_path / "pictures")))
    assert ([one.answer for one in examples], len(reasons)) == (["猫"], 1)
    file = tmp_path / "videos/train.json"
    file.write_text(file.read_text("utf-8")[:-1] + f', "v_a": {WORSE[row]}}}', "utf-8")
    examples, reasons = drawn(Source("activitynet", str(tmp_path / "videos")))
    assert (len(examples), len(reasons)) == (2, 1)
    fixtures.instructions_by_line(tmp_path / "talks")
    with (tmp_path / "talks/train.jsonl").open("a") as lines:
        lines.write(f"\n{WORSE[row]}\n")
    examples, reasons = drawn(Source("instructions", str(tmp_path / "talks")))
    assert (len(examples), len(reasons)) == (4, 1)


MANY = {
    "ai_challenger": ("caption", lambda row: row),
    "visdial": ("dialog", lambda data: data["data"]["dialogs"]),
    "visual_genome": ("regions", lambda row: row),
    "instructions": ("conversations", lambda row: row),
}


@pytest.mark.parametrize("case", MANY)
def test_a_record_of_a_hundred_thousand_parts(case, tmp_path):
    """Each of its parts would be an example that reads all of them: it is one bad record."""
    getattr(fixtures, case)(tmp_path)
    name, rows = MANY[case]
    file = tmp_path / FILES[case]
    data = json.loads(file.read_text("utf-8"))
    source = Source(case, str(tmp_path))
    whole, _ = drawn(source)
    first = rows(data)[0]
    rows(data).append({**first, name: first[name] * 10**5})
    file.write_text(json.dumps(data), "utf-8")
    began = time.process_time()
    examples, reasons = drawn(source)
    assert len(examples) == len(whole)
    assert len(reasons) == 1 and "parts, and a record at most 1,000" in reasons[0]
    assert time.process_time() - began < 10


def test_a_file_of_broken_rows_takes_no_longer_than_a_whole_one(tmp_path):
    """An error of the json module counts the lines of all that it was given."""
    seconds = []
    for row in ('{"a": 1}', '{"a": x}'):
        (tmp_path / "a.json").write_text("[" + ",\n".join([row] * 100_000) + "]")
        began = time.process_time()
        assert len(lazy.Rows(tmp_path / "a.json")) == 100_000
        seconds.append(time.process_time() - began)
    assert seconds[1] < 20 * seconds[0] + 1


def test_an_image_of_many_captions(tmp_path):
    fixtures.coco(tmp_path)
    file = tmp_path / FILES["coco"]
    data = json.loads(file.read_text("utf-8"))
    data["annotations"] += [{"image_id": 1, "caption": "x"}] * 2000
    file.write_text(json.dumps(data), "utf-8")
    examples, reasons = drawn(Source("coco", str(tmp_path)))
    assert len(examples) == fixtures.COUNT - 1 and len(reasons) == 2001


def broken_rounds():
    good = {"question": 0, "answer": 0, "speech": "audio/0.flac"}
    yield from ("text", None, [good], {**good, "speech": 3}, {**good, "speech": [1]})
    yield from ({**good, "tags": 3}, {**good, "speech_tags": {"a": 1}}, {**good, "question": "x"})


@pytest.mark.parametrize("kind", ["spoken", "asr", "dialogue"])
def test_visdial_of_wrong_types(kind, tmp_path):
    fixtures.visdial(tmp_path)
    file = tmp_path / "visdial_1.0_train.json"
    source = Source("visdial", str(tmp_path), "train", {"kind": kind})
    whole, _ = drawn(source)
    data = json.loads(file.read_text("utf-8"))
    talks = data["data"]["dialogs"]
    for broken in broken_rounds():
        talks.append({"image_id": 1, "caption": "", "dialog": [broken]})
    talks.append({"image_id": 10**30, "caption": "", "dialog": talks[0]["dialog"][:1]})
    file.write_text(json.dumps(data), "utf-8")
    examples, reasons = drawn(source)
    assert len(examples) >= len(whole) and len(reasons) >= 4
    data["data"]["answers"][1] = {"no": "text"}
    file.write_text(json.dumps(data), "utf-8")
    assert "is no text" in drawn(source)[1]


def test_one_caption_of_an_image(tmp_path):
    """The others of the image are read, and stand among its references alone."""
    fixtures.coco(tmp_path)
    file = tmp_path / FILES["coco"]
    data = json.loads(file.read_text("utf-8"))
    data["annotations"] += [{"image_id": 1, "caption": None}, {"image_id": 1, "caption": "好"}]
    file.write_text(json.dumps(data), "utf-8")
    examples, reasons = drawn(Source("coco", str(tmp_path)))
    assert reasons == ["is null, not a text"]
    first = [one for one in examples if one.key.startswith("1#")]
    assert first[0].references == (fixtures.TEXTS[0], "好") == tuple(one.answer for one in first)


ODD = ("a\0.jpg", "\ud800.jpg", "x" * 300 + ".jpg", f"a.jpg::{'9' * 5000}:5", "a.jpg::1:99999", "")


def test_a_path_that_is_none(tmp_path):
    """It is read from its row, and costs its record where the file would be opened."""
    fixtures.pictures(tmp_path, "a.jpg")
    rows = [GOOD[0], *({**GOOD[0], "id": name, "image": [name]} for name in ODD)]
    (tmp_path / "train.json").write_text(json.dumps(rows), "utf-8")
    source = Source("instructions", str(tmp_path))
    examples, reasons = drawn(source)
    assert len(examples) + len(reasons) == len(rows) and examples[0].key == GOOD[0]["id"]
    assert all(reason.startswith("is no name of a file") for reason in reasons)
    for example in examples[1:]:
        with pytest.raises(UserError):
            modalities.load("image", example.media[0][1], Data(), Record(example), 0, False)
        with pytest.raises(UserError):
            paths.read(example.media[0][1])
    for check in (True, False):
        plan = preparation.make("a_set", source, str(tmp_path / f"set{check}"), 8, check)
        note = shard.write(plan, 0, plan.examples())
        assert (note["records"], len(note["rejects"])) == (1, len(ODD))


def test_names_that_are_no_utf8_are_prepared(tmp_path):
    name = os.fsdecode(b"\xe9.jpg")
    fixtures.pictures(tmp_path, name)
    (tmp_path / os.fsdecode(b"\xe9.txt")).write_text("猫", "utf-8")
    plan = preparation.make(
        "a_set", Source("captions_folder", str(tmp_path)), str(tmp_path / "set"), 8
    )
    assert shard.write(plan, 0, plan.examples())["records"] == 1


class Wild:
    """A reader's sequence whose records raise whatever they hold."""

    def __init__(self, records):
        self._records = records

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        made = self._records[index]
        if isinstance(made, Exception):
            raise made
        return made


FOREIGN = (
    *(IndexError("x"), StopIteration(), KeyError("x"), OverflowError("x"), RecursionError("x")),
    *(MemoryError(), ValueError("two\nlines"), OSError(36, "File name too long"), EOFError()),
    *("no example", None, Example("k", transcript={"a": 1}), Example(3), Example("k", tags=(1,))),
    *(Example("k", media=(("image", b"x"),)), Example("k", answer="\ud800"), Example("k", "ab")),
    *(Example("k", media=3), Example("k", history=(("a",), 1))),
)


def test_whatever_a_reader_raises_costs_its_record():
    records = [Example("a", answer="x"), *FOREIGN, Example("b", answer="y")]
    found = guarded.opened(lambda: Wild(records), "data.sources.a", "somewhere")
    every = mixture.in_order({"a": found}, {"a": None})
    assert [isinstance(one, Record) for one in every] == [True, *[False] * len(FOREIGN), True]
    assert all("\n" not in one.reason for one in every if isinstance(one, Skipped))
    raw = mixture.in_order({"a": Wild(records)}, {"a": None})  # as sources of one's own come
    assert [type(one) for one in raw] == [type(one) for one in every]


@pytest.mark.parametrize("error", [OSError(36, "File name too long"), MemoryError(), KeyError("x")])
def test_an_error_while_opening_names_the_file(error):
    def opens():
        raise error

    with pytest.raises(UserError, match=r"^somewhere: cannot be opened \("):
        guarded.opened(opens, "data.sources.a", "somewhere")
    with pytest.raises(UserError, match=r"none of its records can be read; the first: cannot"):
        guarded.opened(lambda: Wild([error] * 3), "data.sources.a", "somewhere")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_names_that_no_file_system_knows(name, tmp_path):
    for reader in ("instructions", "table", "coco", "cc3m", "aishell", "selection", "llava_test"):
        with pytest.raises(UserError):
            mixture.read("a", Source(reader, f"{tmp_path}/{name}", "test"), "")


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff\xff"])
def test_an_array_that_is_damaged(content, tmp_path):
    fixtures.selection(tmp_path)
    (tmp_path / "train.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.npy: is no list of records"):
        mixture.read("a", Source("selection", str(tmp_path)), "")
    (tmp_path / "tars").mkdir()
    fixtures.webdataset(tmp_path / "tars")
    (tmp_path / "tars/.index").mkdir()
    (tmp_path / "tars/.index/00000.npy").write_bytes(content)
    assert (
        len(mixture.read("a", Source("webdataset", str(tmp_path / "tars")), "")) == fixtures.COUNT
    )
    kept = np.load(tmp_path / "tars/.index/00000.npy")
    assert len(kept) == fixtures.COUNT + 1


def shortened(text, share):
    """A text without its end, cut in the middle of a character perhaps."""
    content = text.encode("utf-8")
    return content[: int(len(content) * share)]


CUT = "the file ends inside record"


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_cut_off(case, tmp_path):
    """What stands whole before is read, and one record says why there is no more."""
    getattr(fixtures, case)(tmp_path)
    reader = {"minigpt4": "instructions"}.get(case, case)
    path = tmp_path / FILES[case] if case == "reference" else tmp_path
    options = {"images": f"{tmp_path}/images"} if case == "reference" else {}
    source = Source(reader, str(path), "train", options)
    wanted = [one.answer for one in drawn(source)[0]]
    file = tmp_path / FILES[case]
    content = file.read_bytes()
    counts = set()
    for end in np.random.default_rng(0).integers(1, len(content), 25):
        file.write_bytes(content[:end])
        try:
            examples, reasons = drawn(source)
        except UserError as error:  # nothing of it can be read
            assert "cut off at byte" in str(error) or CUT in str(error), (end, str(error))
            continue
        # Text behind the wanted lists costs nothing.
        assert [reason for reason in reasons if CUT in reason] or len(examples) == len(wanted), end
        found = [one.answer for one in examples]
        assert found and set(found) <= set(wanted), end
        counts.add(len(found))
    assert len(counts) > 1 or len(wanted) < 3


@pytest.mark.parametrize("lined", [False, True])
def test_conversations_that_are_cut_off(lined, tmp_path):
    """At every second byte: the rows that stand whole before it are read."""
    texts = [json.dumps(row, ensure_ascii=False) for row in GOOD[:4]]
    text = "\n".join(texts) if lined else f"[{', '.join(texts)}]"
    content, file = text.encode("utf-8"), tmp_path / f"train.json{'l' * lined}"
    ends = [content.find(t.encode()) + len(t.encode()) for t in texts]
    source = Source("instructions", str(tmp_path))
    for end in range(1, len(content), 2):
        whole = sum(one <= end for one in ends)
        file.write_bytes(content[:end])
        if not whole:
            with pytest.raises(UserError):
                drawn(source)
            continue
        examples, reasons = drawn(source)
        assert [one.key for one in examples] == [row["id"] for row in GOOD[:whole]]
        between = lined and end - ends[whole - 1] < 2  # a line break, or none: it is whole
        assert reasons == [] if between else CUT in reasons[0] and len(reasons) == 1, end
        if not between:
            assert f"{CUT} {whole}" in reasons[0]


@pytest.mark.parametrize("share", [0.55, 0.7, 0.8, 0.9, 0.99])
def test_objects_that_are_cut_off(share, tmp_path):
    fixtures.pictures(tmp_path / "pictures", "a.jpg", "b.jpg")
    text = json.dumps({"a.jpg": "一只猫", "b.jpg": ["一只狗", "狗"]}, ensure_ascii=False)
    (tmp_path / "pictures/captions.json").write_bytes(shortened(text, share))
    examples, reasons = drawn(Source("captions_folder", str(tmp_path / "pictures")))
    assert [one.answer for one in examples][:1] == ["一只猫"] and CUT in reasons[0]
    fixtures.activitynet(tmp_path / "videos")
    fixtures.film(tmp_path / "videos/videos/v_b.mp4")
    file = tmp_path / "videos/train.json"
    row = json.loads(file.read_text("utf-8"))["v_a"]
    text = json.dumps({"v_a": row, "v_b": row})
    file.write_bytes(shortened(text, share))
    examples, reasons = drawn(Source("activitynet", str(tmp_path / "videos")))
    assert len(examples) == 2 and len(reasons) == 1 and CUT in reasons[0]


EMPTY = ("", "  ", "\n", "\u3000")


@pytest.mark.parametrize("said", EMPTY)
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_a_turn_that_says_nothing(said, turn, tmp_path):
    turns = [human("<image>\n问"), model("答"), human("又问"), model("又答")]
    turns[turn] = {**turns[turn], "value": said}
    rows = [*GOOD, {"id": "broken", "image": "a.jpg", "conversations": turns}]
    (tmp_path / "train.json").write_text(json.dumps(rows), "utf-8")
    examples, reasons = drawn(Source("instructions", str(tmp_path)))
    assert len(examples) == len(GOOD)
    assert reasons == [f"has an empty {'answer' if turn % 2 else 'question'}"]


def test_a_file_may_stand_for_the_first_question(tmp_path):
    rows = [{"image": "a.jpg", "conversations": [human(""), model("答")]}]
    rows += [{"conversations": [human(" "), model("答")]}]
    (tmp_path / "train.json").write_text(json.dumps(rows), "utf-8")
    examples, reasons = drawn(Source("instructions", str(tmp_path)))
    assert (len(examples), reasons) == (1, ["has an empty question"])


def blank_answer(case, root, text):
    """Makes the last text of a fixture an empty one; (reader, options, examples that go)."""
    if case == "visual_genome":
        file = root / "question_answers.json"
        rows = json.loads(file.read_text("utf-8"))
        rows[-1]["qas"][-1]["answer"] = text
        file.write_text(json.dumps(rows), "utf-8")
        return "visual_genome", {"kind": "questions"}
    if case == "visdial":
        file = root / "visdial_1.0_train.json"
        data = json.loads(file.read_text("utf-8"))
        data["data"]["answers"].append(text)
        row = data["data"]["dialogs"][-1]["dialog"][-1]
        row["answer"] = len(data["data"]["answers"]) - 1
        file.write_text(json.dumps(data), "utf-8")
        return "visdial", {}
    file = root / "captions.json"
    file.write_text(json.dumps({"1.jpg": ["猫"], "2.jpg": text, "3.jpg": ["狗", text]}), "utf-8")
    return "captions_folder", {}


@pytest.mark.parametrize("text", EMPTY)
@pytest.mark.parametrize("case", ["visual_genome", "visdial", "captions_folder"])
def test_an_empty_answer(case, text, tmp_path):
    getattr(fixtures, case, lambda root: fixtures.pictures(root))(tmp_path)
    reader, options = blank_answer(case, tmp_path, text)
    examples, reasons = drawn(Source(reader, str(tmp_path), "train", options))
    assert examples and all(one.answer.strip() for one in examples)
    assert reasons and all("empty" in reason for reason in reasons)
    assert len(reasons) == (2 if case == "captions_folder" else 1)
