"""Questions to a finished run, by command and in the chat; users' mistakes are one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import small_runs
import soundfile

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.inference import assistant, file_encoder, transcriber
from xllm_jax.inference.load_run import load_run
from xllm_jax.launch import chat

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def world(folder):
    return small_runs.make_world(folder, 4)


@pytest.fixture(scope="module")
def run(folder):
    return small_runs.stage3(folder / "runs")


@pytest.fixture(scope="module")
def restored(run):
    return load_run(run)


def first(world: Path, pattern: str) -> str:
    return str(sorted(world.glob(pattern))[0])


@pytest.fixture(scope="module")
def files(world):
    return {
        "image": first(world, "coco/test/*.jpg"),
        "video": first(world, "msrvtt/TestVideo/*.mp4"),
        "speech": first(world, "aishell/wav/test/*/*.flac"),
    }


@pytest.fixture(scope="module")
def examples(files):
    image, video, speech = files.items()
    return [
        Example("a", (image,), "图中有什么？", history=(("有圆形吗？", "有"),)),
        Example("b", (speech, image), task="spoken_vqa"),
        Example("c", (image, image), "<image>和<image>一样吗？"),
        Example("d", (), "你好"),
        Example("e", (video,), task="video_caption"),
    ]


def test_answers_do_not_depend_on_the_batch(restored, examples):
    one = assistant.Assistant(restored, rows=1, max_tokens=6)
    many = assistant.Assistant(restored, rows=4, max_tokens=6)
    together = many.answers(examples)
    assert together == [one.answers([example])[0] for example in examples]
    assert together == many.answers(examples)
    assert len(together) == 5 and all(isinstance(text, str) for text in together)


def test_prompts_hold_every_file_once_and_in_order(restored, examples, files):
    model = assistant.Assistant(restored, rows=4, max_tokens=6)
    encoded = model.encode(examples)
    queries = model.data.embeddings["image"]
    both, heard = (model.prompt(examples[number], encoded) for number in (2, 1))
    places = both.index["image"]
    assert places[places >= 0].tolist() == list(range(2 * queries))
    fired = encoded["speech", files["speech"]].size
    assert (heard.index["speech"] >= 0).sum() == fired > 0
    media = model.batch([heard, both], encoded).media
    for name, count in (("speech", 1), ("image", 2)):
        values = media[name].values
        assert values.shape[:2] == (4, count)
        np.testing.assert_array_equal(values[0, :1], encoded[name, files[name]].embeddings)
        index = media[name].index[0]
        np.testing.assert_array_equal(index[: len(heard.ids)], heard.index[name])
        assert (index[len(heard.ids) :] == -1).all()
    assert not media["speech"].values[1].any() and (media["speech"].index[1] == -1).all()


def test_the_same_states_as_the_training_path(restored, examples, files):
    """Embeddings computed once and spliced equal those of `XLLM.encode` on the media."""
    from xllm_jax.core.batch import Media
    from xllm_jax.data.media import modalities
    from xllm_jax.data.record import Record

    model = assistant.Assistant(restored, rows=1, max_tokens=6)
    found = model.encode(examples[:1])["image", files["image"]].embeddings
    record = Record(Example("x"))
    values, lengths = modalities.load("image", files["image"], model.data, record, 0, False)
    item = Media(values[None], lengths[None], None, np.zeros((1, 0), np.int32))
    wanted, _ = model.model.encode(model.params, "image", item)
    np.testing.assert_allclose(found[0], np.asarray(wanted)[0], rtol=1e-4, atol=1e-5)
    again = Media(found[None], np.ones((1, 1), np.int32), None, item.index)
    spliced, _ = model.model.encoded.encode(model.params, "image", again)
    np.testing.assert_array_equal(spliced[0], found[0])


@pytest.fixture
def counted(monkeypatch):
    """Sizes of the batches that are encoded, in a list that grows."""
    sizes, encode = [], file_encoder._encode

    def watched(model, modality, params, media):
        sizes.append(int((media.lengths > 0).any(axis=1).sum()))
        return encode(model, modality, params, media)

    monkeypatch.setattr(file_encoder, "_encode", watched)
    return sizes


def seen(path: Path) -> Example:
    return Example("seen", (("image", str(path)),), "图中有什么？")


def test_a_file_is_encoded_once_by_its_content(restored, world, tmp_path, counted):
    first, second = sorted(world.glob("coco/test/*.jpg"))[:2]
    one, copy = tmp_path / "one.jpg", tmp_path / "copy.jpg"
    for path in (one, copy):
        path.write_bytes(first.read_bytes())
    model = assistant.Assistant(restored, rows=4, max_tokens=6)
    alike = model.encode([seen(one), seen(copy)])
    assert counted == [1] and alike["image", str(one)] is alike["image", str(copy)]
    assert model.encode([seen(copy)])["image", str(copy)] is alike["image", str(copy)]
    one.write_bytes(second.read_bytes())
    changed = model.encode([seen(one)])["image", str(one)]
    assert counted == [1, 1]
    assert np.abs(changed.embeddings - alike["image", str(copy)].embeddings).max() > 0
    data = model.encoder.data
    model.encoder.data = dataclasses.replace(data, image=data.image | {"flip": True})
    model.encode([seen(copy)])
    assert counted == [1, 1, 1]  # other preprocessing


def test_remembered_files_stay_below_the_bound(restored, world, counted):
    paths = sorted(world.glob("coco/test/*.jpg"))[:3]
    model = assistant.Assistant(restored, rows=1, max_tokens=6)
    size = model.encode([seen(paths[0])])["image", str(paths[0])].embeddings.nbytes
    model = assistant.Assistant(restored, rows=1, max_tokens=6, cache_bytes=2 * size)
    cache = model.encoder.cache
    for path in (*paths[:2], paths[0], paths[2]):
        model.encode([seen(path)])
        assert cache.bytes == len(cache) * size <= 2 * size
    del counted[:]
    model.encode([seen(paths[0]), seen(paths[2])])
    assert counted == []
    model.encode([seen(paths[1])])  # the least recently used went
    assert counted == [1]
    tiny = assistant.Assistant(restored, rows=1, max_tokens=6, cache_bytes=size - 1)
    assert len(tiny.encode(list(map(seen, paths)))) == 3 and tiny.encoder.cache.bytes == 0


def test_recognizer(folder, world, files):
    run = small_runs.stage1(folder / "runs", world / "characters.txt")
    model = transcriber.Transcriber(load_run(run), rows=2)
    spoken = [Example(str(i), (("speech", files["speech"]),)) for i in range(3)]
    texts = model.transcribe(spoken)
    assert len(texts) == 3 and len(set(texts)) == 1
    with pytest.raises(UserError, match="no speech file"):
        model.transcribe([Example("silent")])


def test_a_run_of_another_kind_is_refused(restored):
    with pytest.raises(UserError, match="no asr_decoder"):
        transcriber.Transcriber(restored)


def test_parts_can_come_from_another_run(run, folder, restored):
    other = small_runs.stage3(folder / "other")
    mixed = load_run(run, {"image_interface": str(other)})
    assert mixed.stage.init["image_interface"] == str(other)
    assert mixed.stage.init["video_interface"].endswith("runs/stage3/final")
    assert restored.stage.init["llm"] == str(folder / "runs" / "bases" / "llm")


@contextlib.contextmanager
def changed(run: Path):
    """The record of a finished run, to be changed for a while."""
    about = run / "final" / "about.json"
    text = about.read_text("utf-8")
    record = json.loads(text)
    try:
        yield record, lambda: about.write_text(json.dumps(record), "utf-8")
    finally:
        about.write_text(text, "utf-8")


def test_a_checkpoint_of_another_size_is_refused(run):
    with changed(run) as (record, write):
        record["stage"]["parts"]["image_interface"]["fields"]["hidden"] = 100
        write()
        with pytest.raises(UserError, match="another size") as raised:
            load_run(run)
        assert "image_interface" in str(raised.value)


def test_a_run_on_another_llm_is_refused(run):
    with changed(run) as (record, write):
        record["base"]["llm"] = "0" * 16
        write()
        with pytest.raises(UserError, match="another llm"):
            load_run(run)
        # Whoever names another part wants another part.
        assert load_run(run, {"llm": ""}).stage.name == "stage3_instruction"


def script(name: str, *arguments: str, typed: str = "") -> subprocess.CompletedProcess:
    return forked.run(
        [sys.executable, str(ROOT / "launch" / name), *arguments],
        capture_output=True,
        text=True,
        input=typed,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def assert_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_command_line_answers(run, files):
    done = script(
        "generate.py",
        f"--checkpoint={run}",
        f"--image={files['image']}",
        f"--speech={files['speech']}",
        "--max_tokens=4",
        "--heard",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("Heard: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--promt=x"], ["--promt", "Did you mean --prompt?"]),
        (["--checkpoint=nowhere", "--prompt=x"], ["nowhere", "no finished run"]),
        (["--checkpoint=nowhere", "--image=lost.jpg"], ["--image", "lost.jpg"]),
        (["--checkpoint=nowhere"], ["--prompt", "nothing to ask"]),
        (["--checkpoint=x", "--prompt=x", "--top_p=0.5"], ["--top_p", "--decode=sample"]),
        (["--checkpoint=x", "--decode=greeedy"], ["--decode", "greedy"]),
        (["--prompt=x"], ["--checkpoint", "required"]),
    ],
)
def test_mistakes_on_the_command_line(arguments, words):
    assert_one_line(script("generate.py", *arguments), *words)


@pytest.fixture(scope="module")
def broken(folder, files):
    """Files that exist and cannot be used: {name: (modality, path)}."""
    silent = folder / "silent.wav"
    soundfile.write(silent, np.zeros(16_000, np.float32), 16_000)
    empty = folder / "empty.wav"
    soundfile.write(empty, np.zeros(0, np.float32), 16_000)
    cut = folder / "cut.jpg"
    cut.write_bytes(Path(files["image"]).read_bytes()[:200])
    noise = folder / "noise.mp4"
    noise.write_bytes(b"no video at all")
    return [("speech", silent), ("speech", empty), ("image", cut), ("video", noise)]


def test_broken_files_are_named(restored, broken):
    model = assistant.Assistant(restored, rows=1, max_tokens=6)
    for modality, path in broken:
        with pytest.raises(UserError) as raised:
            model.answers([Example("x", ((modality, str(path)),), "有什么？")])
        assert path.name in str(raised.value)


def test_a_broken_file_ends_the_command_with_one_line(run, broken):
    modality, path = broken[2]
    done = script("generate.py", f"--checkpoint={run}", f"--{modality}={path}")
    assert_one_line(done, path.name)


def test_a_prompt_longer_than_the_buckets_is_told(restored):
    model = assistant.Assistant(restored, rows=1, max_tokens=6)
    with pytest.raises(UserError, match="tokens"):
        model.answers([Example("x", (), "圆形" * 3000)])


class Echo:
    """A model that tells what it was asked."""

    def __init__(self):
        self.asked: list[Example] = []

    def __call__(self, example: Example) -> str:
        if any("broken" in path for _, path in example.media):
            raise UserError("cannot be read", field="broken.jpg")
        self.asked.append(example)
        return f"回{len(self.asked)}"


def talk(*lines: str, rounds: int = 2):
    model, said = Echo(), []
    left = chat.converse(iter(lines), model, said.append, rounds)
    return model.asked, said, left


def test_chat_remembers_files_and_rounds():
    asked, said, left = talk("/image a.jpg", "几个？", "", "什么颜色？", "在哪里？", "/quit", "不")
    assert said == ["回1", "回2", "回3", "回4"]
    assert asked[1].media == (("image", "a.jpg"),) and len(asked[1].history) == 1
    assert asked[3].history == (("几个？", "回2"), ("什么颜色？", "回3"))
    assert len(left.history) == 4


def test_chat_answers_spoken_questions_about_what_it_sees():
    asked, _, left = talk("/speech q.flac", "/image a.jpg", "/speech r.flac", "然后呢？")
    assert asked[0].media == (("speech", "q.flac"),)
    assert asked[2].media == (("image", "a.jpg"), ("speech", "r.flac"))
    assert asked[3].media == left.media == (("image", "a.jpg"),)


def test_chat_goes_on_after_mistakes():
    asked, said, left = talk("/image broken.jpg", "/imgae x", "/image", "你好", "/reset")
    assert said[0] == "broken.jpg: cannot be read"
    assert "Did you mean /image?" in said[1] and "names no file" in said[2]
    assert asked[0].media == () and left == chat.Chat()
    assert talk("你好", "几个？", rounds=0)[0][1].history == ()


def test_chat_in_the_terminal(run):
    done = script(
        "chat.py", f"--checkpoint={run}", "--max_tokens=3", typed="/image lost.jpg\n你好\n/quit\n"
    )
    assert done.returncode == 0, done.stderr
    assert "lost.jpg" in done.stdout and "Traceback" not in done.stderr
