"""Pictures of answers as files, by command and in the chat."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import small_outputs
import small_runs
import test_flags

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage, Validation
from xllm_jax.inference import assistant
from xllm_jax.inference.load_run import load_run, stage_of
from xllm_jax.inference.replies import Picture, Reply
from xllm_jax.launch import chat, drawing, evaluate_drawing

pytestmark = pytest.mark.usefixtures("parsed_flags")
ROOT = Path(__file__).parents[1]
SIZE = (small_outputs.TOKENS, 12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose text encoder is gone."""
    folder = tmp_path_factory.mktemp("runs")
    stage = small_outputs.stage(folder)
    made = small_runs.write_run(stage, folder / "runs/drawn", ("signal_tokens", "image_projection"))
    (folder / "runs/bases/text_encoder").rename(folder / "elsewhere")
    return made


@pytest.fixture(scope="module")
def model(run):
    return assistant.Assistant(load_run(run), max_tokens=6)


def picture(value):
    return Picture("image", np.full(SIZE, value, np.float32))


def test_a_run_answers_without_its_text_encoder(model):
    assert "text_encoder" not in model.model.networks
    assert model.model.outputs == (("image", "image_projection", ""),)


def test_words_name_the_files_in_their_places(model, tmp_path):
    easel = drawing.Easel(tmp_path / "out", model.family)
    text = easel.text(Reply(("这是圆", picture(1), "和方块", picture(2), "。")))
    first, second = tmp_path / "out/image_0.npz", tmp_path / "out/image_1.npz"
    assert text == f"这是圆[{first}]和方块[{second}]。"
    assert drawing.words(text) == "这是圆和方块。"
    for number, file in enumerate((first, second), 1):
        with np.load(file) as made:
            assert made.files == ["prompt_embeds"]
            np.testing.assert_array_equal(made["prompt_embeds"], np.full((1, *SIZE), number))
            assert made["prompt_embeds"].dtype == np.float32


def test_no_file_is_written_over(model, tmp_path):
    (tmp_path / "image_0.png").write_text("mine")
    easel = drawing.Easel(tmp_path, model.family)
    assert easel.text(Reply((picture(1),))) == f"[{tmp_path / 'image_1.npz'}]"
    assert easel.text(Reply((picture(1),))) == f"[{tmp_path / 'image_2.npz'}]"
    assert (tmp_path / "image_0.png").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "image_0.png",
        "image_1.npz",
        "image_2.npz",
    ]


def test_the_chat_remembers_words_alone():
    said = []
    answers = iter(["好的[out/image_0.png]。", "是"])
    end = chat.converse(iter(["画圆", "好吗？"]), lambda _: next(answers), said.append, 4)
    assert said == ["好的[out/image_0.png]。", "是"]
    assert end.history == (("画圆", "好的。"), ("好吗？", "是"))


def test_a_run_of_text_alone_cannot_draw():
    with pytest.raises(UserError) as error:
        drawing.check(Stage())
    assert error.value.field == "--draw" and error.value.hint


def test_the_command_writes_what_a_decoder_reads(run, tmp_path):
    """Sampled until a picture comes: the untrained LLM says anything."""
    made = load_run(run)
    words = assistant.Assistant(made, max_tokens=200)
    how = words.decoding(sample=True, temperature=1e3)
    asked = chat.Example("prompt", (), "画圆")
    seed = next(n for n in range(20) if words.replies([asked], how, n)[0].pictures)
    out = tmp_path / "out"
    flags = ("--decode=sample", "--temperature=1e3", "--top_p=1", f"--seed={seed}")
    done = forked.xllm(
        "generate",
        f"--checkpoint={run}",
        "--prompt=画圆",
        "--max_tokens=200",
        f"--draw={out}",
        *flags,
    )
    assert done.returncode == 0, done.stderr
    expected = words.replies([asked], how, seed)[0]
    files = sorted(out.iterdir())
    assert len(files) == len(expected.pictures) and f"[{files[0]}]" in done.stdout
    with np.load(files[0]) as read:
        np.testing.assert_allclose(
            read["prompt_embeds"][0], expected.pictures[0].embeddings, rtol=1e-3, atol=1e-4
        )


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """A run with requests held out, whose LLM begins a picture wherever it may."""
    folder = tmp_path_factory.mktemp("eager")
    stage = held_out(small_outputs.stage(folder))

    def liking(params):
        # States behind the last norm, whose scale and bias are positive here, are so mostly.
        rows = params["signal_tokens"]
        rows["image_head"] = rows["image_head"].copy()
        rows["image_head"][0] = 50.0
        return params

    trained = ("signal_tokens", "image_projection")
    return small_runs.write_run(stage, folder / "runs/drawn", trained, liking)


def test_the_chat_draws(eager, tmp_path):
    """A file for every picture, and its place in the words."""
    out = tmp_path / "out"
    flags = (f"--checkpoint={eager}", f"--draw={out}", f"--max_tokens={small_outputs.COUNT}")
    done = forked.xllm("chat", *flags, typed="画圆\n再画\n")
    assert done.returncode == 0, done.stderr
    files = [out / "image_0.npz", out / "image_1.npz"]
    assert sorted(out.iterdir()) == files
    assert all(f"[{file}]" in done.stdout for file in files)


def test_held_out_requests_are_drawn(eager, tmp_path):
    """By command: the table, a record, and the file of every picture."""
    out = tmp_path / "out"
    done = forked.xllm("evaluate", f"--runs={eager.parent}", f"--draw={out}", "--limit=2")
    assert done.returncode == 0, done.stderr
    told = json.loads((out / eager.name / "pictures.json").read_text())
    assert told["requests"] == told["asked"] == 2 and told["drawn"] >= 2
    for one in told["answers"]:
        file = out / eager.name / f"{one['key']}.npz"
        assert f"[{file}]" in one["text"] and np.load(file)["prompt_embeds"].shape == (1, *SIZE)
    assert f"{told['as_asked']:.1%}" in done.stdout and f"Pictures: {out}" in done.stdout


def held_out(stage, requests=3):
    """The run's stage with requests that it never saw."""
    sources = {"said": stage.data.sources["captions"]}
    return dataclasses.replace(stage, validation=Validation(sources, examples=requests))


def test_evaluation_draws_and_counts(run, model, tmp_path, monkeypatch):
    """Answers with one, two and no picture: files, and the share that is as asked."""
    stage = stage_of(run)
    monkeypatch.setattr(evaluate_drawing, "stage_of", lambda _: held_out(stage))
    monkeypatch.setattr(evaluate_drawing, "load_run", lambda _: None)
    answers = [Reply(("好", picture(1))), Reply((picture(2), picture(3))), Reply(("不",))]

    class Answering:
        family = model.family

        def __init__(self, restored, rows, most):
            assert most == stage.data.answers

        def replies(self, asked):
            assert not any(one.answer for one in asked) and len(asked) == 3
            return answers

    monkeypatch.setattr(evaluate_drawing.assistant, "Assistant", Answering)
    found = evaluate_drawing.evaluate(run, tmp_path, 3, 2)
    assert (found["requests"], found["asked"], found["drawn"]) == (3, 3, 3)
    assert found["as_asked"] == pytest.approx(1 / 3)
    place = tmp_path / run.name
    first, second, _ = (one["key"] for one in found["answers"])
    files = {path.name: np.load(path)["prompt_embeds"][0] for path in place.glob("*.npz")}
    assert sorted(files) == sorted([f"{first}.npz", f"{second}.npz", f"{second}_1.npz"])
    for name, value in ((first, 1), (second, 2), (f"{second}_1", 3)):
        np.testing.assert_array_equal(files[f"{name}.npz"], np.full(SIZE, value))
    assert json.loads((place / "pictures.json").read_text()) == found
    assert "33.3%" in evaluate_drawing.table([("mine", found)])
    captions = {one["caption"] for one in found["answers"]}
    assert captions <= set(small_outputs.CAPTIONS)


def test_an_evaluation_that_cannot_draw_is_one_line(run, tmp_path):
    with pytest.raises(UserError) as error:
        evaluate_drawing.evaluate(run, tmp_path, 3, 2)
    assert error.value.field == "validation.sources" and error.value.hint
    with pytest.raises(UserError) as error:
        evaluate_drawing.runs_in(tmp_path)
    assert error.value.field == "--draw"
    assert evaluate_drawing.runs_in(run.parent) == [run]


def test_an_evaluation_without_the_decoder_leaves_its_rows_out(run, tmp_path, monkeypatch, capsys):
    """And keeps what hours have measured; what is not there is told before they begin."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/stage_output_image").symlink_to(run)
    with test_flags.command("evaluate"):
        launched = sys.modules["xllm_jax.launch.evaluate"]
        given = [f"--runs={tmp_path / 'runs'}", f"--output={tmp_path / 'made'}"]
        assert test_flags.run(given)[0] == 0
        written, told = [], []
        monkeypatch.setattr(launched.demo_suite, "tasks", lambda *_: {})
        monkeypatch.setattr(launched, "models", lambda _: {})

        def measured(*_):
            told.append(capsys.readouterr().err)
            return {"measures": {"vqa@after": {}}, "comparisons": {}}

        monkeypatch.setattr(launched.demo_suite, "run", measured)
        monkeypatch.setattr(launched.report, "write", lambda *given: written.append(given))
        launched.main([])
    assert "No decoder of image (outputs.image.decoder of the run names no folder)" in told[0]
    assert written[0][0]["measures"] == {"vqa@after": {}}


def test_data_paths_of_a_run_are_resolved(run):
    stage = load_run(run).stage
    found = dataclasses.asdict(stage)["data"]["signals"]["image"]
    assert found["runs"] == 3
    assert (found["first"], found["count"]) == (small_outputs.FIRST, small_outputs.COUNT)
