"""English sets in Chinese: by an endpoint that fails or a table, and read back by their readers."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import forked
import pytest
import reader_fixtures
from fake_endpoint import KEY, chinese, serving
from restricted import restricted

from xllm_jax.core import chat_endpoint
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.record import Skipped
from xllm_jax.data.rows import translated as rows
from xllm_jax.data.sources import cc3m, coco, table
from xllm_jax.prepare import translation_faults
from xllm_jax.prepare.endpoint import Endpoint
from xllm_jax.prepare.recipes import questions, translated

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/data.md").read_text("utf-8")
PASTED = re.findall(r"`(xllm build-data --recipe=translated [^`]*)`", PAGE)
ENGLISH = (
    "A red circle is on the left.",
    "two dogs run over the grass",
    "A man rides a bicycle at night",
    "a red circle is on the LEFT",  # says what the first one says
    "42",
)
LAYOUTS = {"instructions data/minigpt4": "minigpt4", "instructions talks.jsonl": "talks"}

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def english(monkeypatch):
    monkeypatch.setattr(reader_fixtures, "TEXTS", ENGLISH)
    monkeypatch.delenv(chat_endpoint.KEY, raising=False)


def talks(file):
    """Two rounds about an image."""
    said = [
        {"from": who, "value": text}
        for who, text in zip(["human", "gpt"] * 2, ENGLISH, strict=False)
    ]
    reader_fixtures.write(file, json.dumps({"image": "1.jpg", "conversations": said}))
    reader_fixtures.pictures(file.parent, "1.jpg")


def lay_out(name, root):
    root.parent.mkdir(parents=True, exist_ok=True)
    if name == "talks":
        talks(root)
    else:
        root.mkdir(exist_ok=True)
        getattr(reader_fixtures, name)(root)


def said_by(example):
    """The texts of an example, field by field."""
    rounds = [text for pair in example.history for text in pair]
    return [example.instruction, example.answer, *example.references, *rounds]


def in_chinese(text):
    return chinese(text) if re.search("[a-zA-Z]", text) else text


def fake(server, **options):
    return Endpoint(server.url, "fake", wait=0.01, **options)


@pytest.fixture
def pictures(tmp_path):
    """A table of 70 captions, two of which say the same."""
    lines = [f"{n}.jpg\ta picture of thing number {n}" for n in range(69)]
    lines.append("0.jpg\tA picture of thing number 0!")
    reader_fixtures.write(tmp_path / "in/train.tsv", "\n".join(["filepath\ttitle", *lines]))
    return str(tmp_path / "in")


def build(pictures, out, server, **options):
    return translated.build(pictures, str(out), "table", endpoint=fake(server), **options)


def check(pictures, out):
    """Every caption of the table is what the fake makes of it."""
    plain, found = table.examples(pictures), table.examples(pictures, captions=str(out))
    assert len(found) == len(plain) == 70
    for one, other in zip(plain, found):
        assert (other.key, other.media) == (one.key, one.media)
        assert said_by(other) == [in_chinese(text) for text in said_by(one)]


def test_each_english_set_has_its_line():
    readers = [re.search(r"--reader=(\w+)", line)[1] for line in PASTED]
    assert set(readers) >= {"cc3m", "sbu", "coco", "visual_genome", "flickr30k", "msrvtt"}
    assert set(readers) >= {"activitynet", "instructions", "llava_test"}
    assert sum("questions" in line for line in PASTED) == 1


@pytest.mark.parametrize("line", PASTED)
def test_the_line_pasted_and_run(line, tmp_path):
    flags = dict(word[2:].split("=", 1) for word in shlex.split(line)[2:] if word.startswith("--"))
    reader, data = flags["reader"], tmp_path / flags["input"]
    lay_out(LAYOUTS.get(f"{reader} {flags['input']}", reader), data)
    # The shell splits the line; what it would start is a fork.
    words = ["bash", "-c", f"xllm() {{ printf '%s\\0' \"$@\"; }}; {line}"]
    command = [sys.executable, "-m", "xllm_jax.launch.commands"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with serving("429") as server:
        environment["BY"] = f"--endpoint={server.url} --model=fake"
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        command += subprocess.run(words, **options, check=True).stdout.split("\0")[:-1]
        done = forked.run(command, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    options = json.loads(flags.get("options", "{}"))
    split = flags.get("split", "train")
    read = importlib.import_module(f"xllm_jax.data.sources.{reader}").examples
    plain = read(str(data), split, **options)
    found = read(str(data), split, captions=str(tmp_path / flags["output"]), **options)
    assert len(found) == len(plain) > 0
    for one, other in zip(plain, found):
        assert (other.key, other.media, other.task) == (one.key, one.media, one.task)
        assert said_by(other) == [in_chinese(text) for text in said_by(one)]
    kept = (tmp_path / flags["output"] / f"{split}.jsonl").read_text("utf-8").splitlines()
    pairs = {row["text"]: row["translation"] for row in map(json.loads, kept)}
    assert pairs == {text: chinese(text) for text in pairs}
    assert len({rows.same(text) for text in pairs}) == len(pairs)
    assert sorted(pairs) == sorted({text for texts in server.asked for text in texts})


FAILURES = ("429", "500", "503", "late", "drip", "dropped", "short", "page")


def test_what_passes_is_tried_again(pictures, tmp_path):
    plan = [*FAILURES, "prose", "", "merged", "cut", "fenced"]
    with serving(*plan) as server:
        about = fake(server, timeout=0.5, parallel=1, prices="1,10")
        counts = translated.build(pictures, str(tmp_path / "out"), "table", endpoint=about)
    assert (counts["texts"], counts["translated"], counts["left_out"]) == (69, 69, {})
    assert counts["asked_again"] == len(FAILURES)
    # Three batches of 32, 32 and 5; one more for the prose; one more for the merged texts, whose
    # second reply is cut off, so that two halves follow.
    assert counts["requests"] == 3 + 1 + 1 + 2
    assert len(server.asked) == counts["requests"] + len(FAILURES)
    assert (counts["input_tokens"], counts["output_tokens"]) == (7 * 10, 7 * 7)
    assert counts["cost"] == pytest.approx(7 * 10 * 1e-6 + 7 * 7 * 10e-6)
    check(pictures, tmp_path / "out")


def test_answers_are_kept_for_replay(pictures, tmp_path):
    out = tmp_path / "out"
    with serving("prose") as server:
        counts = build(pictures, out, server)
        before = (out / "train.jsonl").read_bytes()
        shutil.rmtree(out / "translations")
        (out / "train.jsonl").unlink()
        asked = len(server.asked)
    assert build(pictures, out, server) == counts  # nobody is there any more
    assert len(server.asked) == asked and (out / "train.jsonl").read_bytes() == before


def test_new_texts_alone_are_asked_for(pictures, tmp_path):
    with serving() as server:
        build(pictures, tmp_path / "out", server)
        asked = len(server.asked)
        with open(f"{pictures}/train.tsv", "a", encoding="utf-8") as file:
            file.write("\n99.jpg\ta new one")
        counts = build(pictures, tmp_path / "out", server)
    assert server.asked[asked:] == [["a new one"]] and counts["texts"] == 70


def test_a_killed_run_goes_on_and_asks_nothing_twice(pictures, tmp_path):
    with serving() as server:
        server.delay = 0.3
        flags = ["--recipe=translated", "--reader=table", f"--input={pictures}", "--parallel=1"]
        flags += [f"--output={tmp_path / 'out'}", f"--endpoint={server.url}", "--model=fake"]
        command = [*restricted(), sys.executable, "-m", "xllm_jax.launch.build_data", *flags]
        running = forked.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while len(server.asked) < 2:
            time.sleep(0.02)
            assert running.poll() is None
        running.send_signal(signal.SIGKILL)
        running.wait()
        kept = [json.loads(p.read_text()) for p in (tmp_path / "out/answers").rglob("*.json")]
        first = {text for one in kept for text in one["texts"]}
        began = len(server.asked)
        done = forked.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert first and not first & {text for texts in server.asked[began:] for text in texts}
    assert "texts: 69  translated: 69  left_out: none  unreadable: 0  requests: 3" in done.stdout
    check(pictures, tmp_path / "out")


def test_ctrl_c_ends_all_waits_at_once(pictures, tmp_path):
    with serving(*["429"] * 99, pause="50") as server:
        flags = ["--recipe=translated", "--reader=table", f"--input={pictures}", "--model=fake"]
        flags += [f"--output={tmp_path / 'out'}", f"--endpoint={server.url}"]
        command = [*restricted(), sys.executable, "-m", "xllm_jax.launch.build_data", *flags]
        running = forked.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while len(server.asked) < 3:
            time.sleep(0.02)
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=30)  # far below the pause that the server asks for
    assert running.returncode == 130 and "Traceback" not in told


def test_beam_does_the_same(pictures, tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")
    with serving("500") as server:
        alone = build(pictures, tmp_path / "alone", server)
        spread = build(pictures, tmp_path / "beam", server, workers=2)
        with pytest.raises(UserError, match=r"answers 401: .*OPENAI_API_KEY"):
            server.plan += ["401"] * 9
            build(pictures, tmp_path / "refused", server, workers=2)
    files = [(tmp_path / name / "train.jsonl").read_bytes() for name in ("alone", "beam")]
    assert files[0] == files[1] and alone["requests"] == spread["requests"] == 3


def test_what_will_not_pass_ends_with_a_line(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv(chat_endpoint.KEY, KEY)
    told = {
        "401": r"answers 401: .*Bearer \[key\].*OPENAI_API_KEY",
        "404": "answers 404.*--endpoint and --model",
        "400": "answers 400",
        "elsewhere": "answers 307",
    }
    for state, message in told.items():
        with serving(*[state] * 20) as server, pytest.raises(UserError, match=message) as caught:
            build(pictures, tmp_path / state, server)
        assert KEY not in str(caught.value)
    with (
        serving(*["500"] * 99) as server,
        pytest.raises(UserError, match=r"fails at attempt 8: 500.*the same command continues"),
    ):
        build(pictures, tmp_path / "500", server)
    with serving(*["429"] * 20) as server:  # a limit is waited for longer
        build(pictures, tmp_path / "429", server)


def test_texts_that_an_endpoint_refuses_are_left_out(pictures, tmp_path):
    """As a content filter does: every request with one text in it."""
    with serving() as server:
        plain = server.RequestHandlerClass.do_answer

        def answer(handler, said, step):
            bad = any(text.endswith("number 7") for text in server.asked[-1])
            plain(handler, said, "400" if bad else step)

        server.RequestHandlerClass = type("Some", (server.RequestHandlerClass,), {})
        server.RequestHandlerClass.do_answer = answer
        about = fake(server, parallel=1)
        counts = translated.build(pictures, str(tmp_path / "out"), "table", endpoint=about)
    assert counts["left_out"] == {"empty": 1} and counts["translated"] == 68


def test_the_key_comes_from_the_environment_or_a_file_and_stays_there(pictures, tmp_path):
    flags = ["--recipe=translated", "--reader=table", f"--input={pictures}"]
    key = tmp_path / "key"
    key.write_text(f"{KEY}\n")
    for name, extra, environment in (
        ("a", [f"--key_file={key}"], {}),
        ("b", [], {chat_endpoint.KEY: KEY}),
    ):
        with serving("401" if name == "b" else "500") as server:
            given = [*flags, f"--output={tmp_path / name}", f"--endpoint={server.url}"]
            command = [sys.executable, "-m", "xllm_jax.launch.build_data", *given, "--model=fake"]
            done = forked.run(
                [*command, *extra],
                cwd=ROOT,
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
            )
        assert done.returncode == (2 if name == "b" else 0), done.stderr
        assert set(server.keys) == {f"Bearer {KEY}"}
        assert KEY not in done.stdout + done.stderr
        written = [file for file in (tmp_path / name).rglob("*") if file.is_file()]
        assert written and not any(KEY.encode() in file.read_bytes() for file in written)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("localhost:8000", {"model": "m"}, "is no address of an API"),
        ("http://me:secret@host/v1", {"model": "m"}, "holds more than an address"),
        ("http://host/v1?key=secret", {"model": "m"}, "holds more than an address"),
        ("http://[", {"model": "m"}, "is no address of an API"),
        ("http://host:99999999/v1", {"model": "m"}, "is no address of an API"),
        ("http://host/v 1", {"model": "m"}, "is no address of an API"),
        ("http://host/v1\n", {"model": "m"}, "is no address of an API"),
        ("http://host/v1", {}, "--model: an endpoint needs it"),
        ("http://host/v1", {"model": "m", "prices": "cheap"}, "'cheap' are no prices"),
        ("http://host/v1", {"model": "m", "prices": "nan,1"}, "'nan,1' are no prices"),
        ("http://host/v1", {"model": "m", "prices": "1,-1"}, "'1,-1' are no prices"),
    ],
)
def test_mistakes_of_an_endpoint(url, options, message):
    with pytest.raises(UserError, match=message) as caught:
        Endpoint(url, **options)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", ["device", "hollow", "words", "bytes", "none"])
def test_a_file_that_holds_no_key(kind, tmp_path):
    """Nobody waits for it, and nothing of it is shown."""
    file = tmp_path / "key"
    file.write_bytes({"words": b"secret words", "bytes": b"\xff\xfe"}.get(kind, b""))
    if kind == "hollow":
        with file.open("wb") as opened:
            opened.truncate(6 << 30)
    file = Path("/dev/zero") if kind == "device" else file
    with pytest.raises(UserError) as caught:
        Endpoint("http://host/v1", "m", key_file=str(file)).key()
    assert "secret" not in str(caught.value)


def test_mistakes(pictures, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="exactly one way"):
        translated.build(pictures, out, "table")
    with pytest.raises(UserError, match="exactly one way"):
        translated.build(pictures, out, "table", translations="a", translator="b")
    nothing = tmp_path / "nothing.json"
    nothing.write_text("{}")
    with pytest.raises(UserError, match=r"nothing\.json: translates no text \(empty\)"):
        translated.build(pictures, out, "table", translations=str(nothing))
    with serving() as server:
        build(pictures, out, server)
        other = Endpoint(server.url, "another")
        with pytest.raises(UserError, match="holds translations of another translator"):
            translated.build(pictures, out, "table", endpoint=other)
    with pytest.raises(UserError, match="holds the translation of table"):
        translated.build(pictures, out, "coco", translations=str(nothing))


def test_a_table_in_two_commands(pictures, tmp_path):
    out = tmp_path / "out"
    counts = questions.build(pictures, str(out), reader="table")
    assert counts == {"texts": 70, "different": 69}
    file = out / "train_texts.json"
    listed = json.loads(file.read_text("utf-8"))
    listed = {text: chinese(text) for text in listed} | {"a picture of thing number 3": ""}
    file.write_text(json.dumps(listed), "utf-8")
    counts = translated.build(pictures, str(out), "table", translations=str(file))
    assert counts == {"texts": 69, "translated": 68, "left_out": {"empty": 1}, "unreadable": 0}
    drawn = mixture.in_order({"a": table.examples(pictures, captions=str(out))}, {"a": None})
    assert [one.reason for one in drawn if isinstance(one, Skipped)] == ["has no translation"]
    assert not any(one.bad for one in drawn if isinstance(one, Skipped))
    why = json.loads((out / "train_translated.json").read_text("utf-8"))["reasons"]
    assert why == {"a picture of thing number 3": "empty"}


EXCUSE = "对不起，我无法翻译这段文字。"


@pytest.mark.parametrize(
    ("text", "output", "reason"),
    [
        ("a dog", "一只狗", ""),
        ("a dog", " ", "empty"),
        ("a dog", "……", "empty"),
        ("a dog", "a dog", "untranslated"),
        ("a dog runs home", "un chien", "untranslated"),
        ("a dog runs home", "一只 dog runs home", "untranslated"),
        ("an iPhone on a desk", "桌上的 iPhone", ""),
        ("a dog", "这是一只狗，狗是人类的朋友，也是常见的宠物，很可爱。", "overlong"),
        ("a dog runs home now", "狗狗狗狗狗狗狗狗", "repeated"),
        ("a dog runs home now", "跑回家，跑回家，跑回家，跑回家", "repeated"),
        ("he laughs: ha ha ha ha ha", "他笑了：哈哈哈哈哈", ""),
        ("one million people", "1000000人", ""),
    ],
)
def test_what_is_wrong_with_a_translation(text, output, reason):
    assert translation_faults.fault(text, output) == reason


def test_one_answer_for_all_is_repeated():
    texts = ("a dog runs home", "blue sky above water", "two cups", "kitchen table")
    made = dict.fromkeys(texts, EXCUSE) | {"yes": "是的", "yeah": "是的", "it is": "是的"}
    made |= {
        f"{one} dog sleeps on a couch": "一只狗睡在沙发上。" for one in ("a", "one", "the", "this")
    }
    table, reasons = translation_faults.judged(made)
    assert Counter(reasons.values()) == {"repeated": 4} and set(reasons) == set(texts)
    assert table.keys() == made.keys() - set(texts)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Is it red?", "is it  red", True),
        ("a 1.5 m pole", "a 15 m pole", False),
        ("at 3:15", "at 315", False),
        ("50% off", "50 off", False),
        ("It's here.", "its here", True),
    ],
)
def test_texts_that_say_the_same(one, other, alike):
    assert (rows.same(one) == rows.same(other)) is alike


def test_a_translation_of_something_else_is_refused(pictures, tmp_path):
    reader_fixtures.coco(tmp_path / "coco")
    with serving() as server:
        build(pictures, tmp_path / "out", server)
    with pytest.raises(UserError, match="translates none of 4 records"):
        coco.examples(str(tmp_path / "coco"), captions=str(tmp_path / "out"))
    file = tmp_path / "out/train.jsonl"
    lines = file.read_text("utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[1:]), "utf-8")
    with pytest.raises(UserError, match="does not fit the hashes"):
        table.examples(pictures, captions=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"val\.jsonl: no such file"):
        rows.examples(table.examples(pictures), str(tmp_path / "out"), "val")


def test_the_readers_own_form_goes_on_and_never_unseen_with_tars(tmp_path):
    reader_fixtures.cc3m(tmp_path / "cc3m")
    own = tmp_path / "zh.txt"
    own.write_text("\n".join(f"第{n}句" for n in range(5)), "utf-8")
    found = cc3m.examples(str(tmp_path / "cc3m"), captions=str(own))
    assert [one.answer for one in found] == [f"第{n}句" for n in range(5)]
    reader_fixtures.webdataset(tmp_path / "cc3m")
    with pytest.raises(UserError, match="does not go with tars"):
        cc3m.examples(str(tmp_path / "cc3m"), captions=str(own))


def test_speech_stays_what_it_says():
    from xllm_jax.data.example import Example

    heard = Example(
        "a", (("speech", "a.flac"),), "", "hello there", "asr", transcript="hello there"
    )
    assert list(rows.texts(heard)) == []


def test_a_prepared_set_is_read_in_chinese(pictures, tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")
    from xllm_jax.data.sources import prepared
    from xllm_jax.prepare import engine, preparation

    for number in range(69):
        reader_fixtures.picture(Path(pictures) / f"{number}.jpg")
    engine.run(preparation.make("set", Source("table", pictures), str(tmp_path / "set"), 64))
    with serving() as server:
        build(pictures, tmp_path / "out", server)
    found = prepared.examples(str(tmp_path / "set"), captions=str(tmp_path / "out"))
    plain = table.examples(pictures)
    assert [one.answer for one in found] == [in_chinese(one.answer) for one in plain]
