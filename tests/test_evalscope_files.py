"""Files for EvalScope: the samples of our suites, in the forms that its benchmarks read."""

from __future__ import annotations

import base64
import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import small_runs
import soundfile
from pyarrow import parquet

from xllm_jax.configs.suites import asr, captions, vqa
from xllm_jax.data.media import speech
from xllm_jax.data.media.paths import Carried
from xllm_jax.evaluation import caption_metrics, scorers
from xllm_jax.evaluation.suites import run
from xllm_jax.serve import conversation
from xllm_jax.serve.limits import Limits

FOLDER = Path(__file__).parents[1] / "integrations/evalscope"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(a world, its files)."""
    folder = tmp_path_factory.mktemp("evalscope")
    world = small_runs.make_world(folder, items=4)
    sys.path.insert(0, str(FOLDER))
    try:
        importlib.import_module("world_files").write(world, folder / "files")
    finally:
        sys.path.remove(str(FOLDER))
    return world, folder / "files"


def samples(config, world, name):
    config.root, config.only = str(world), (name,)
    return run.samples(config)[name]


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_questions_are_those_of_the_suite(written):
    world, files = written
    rows, wanted = (
        lines(files / "vqav2/validation.jsonl"),
        samples(vqa.get_config("tiny"), world, "questions"),
    )
    assert [(row["question_id"], row["question"]) for row in rows] == [
        (one.key, one.instruction) for one in wanted
    ]
    for row, one in zip(rows, wanted):
        assert row["answers"] == [one.answer] * 10
        content = Path(one.media[0][1]).read_bytes()
        assert base64.b64decode(row["image"].partition(",")[2]) == content


def test_clips_and_captions_are_those_of_the_suite(written):
    world, files = written
    rows, wanted = (
        lines(files / "msr_vtt/validation.jsonl"),
        samples(captions.get_config("tiny"), world, "msrvtt"),
    )
    assert [row["video"] for row in rows] == [
        str(Path(one.media[0][1]).absolute()) for one in wanted
    ]
    for row, one in zip(rows, wanted):
        known = [caption_metrics.clean(text) for text in scorers.references(one)]
        assert [caption_metrics.spaced_words(text) for text in row["references"]] == [
            tuple(text) for text in known
        ]


def test_sounds_have_the_same_samples(written):
    """And the server reads them where EvalScope puts them: a data: URL inside of `input_audio`."""
    world, files = written
    rows = parquet.read_table(files / "fleurs/test.parquet").to_pylist()
    wanted = samples(asr.get_config("tiny"), world, "sentences")
    assert [row["transcription"] for row in rows] == [scorers.reference(one) for one in wanted]
    for row, one in zip(rows, wanted):
        content = row["audio"]["bytes"]
        heard = speech.read(Carried("sound", content))
        np.testing.assert_array_equal(heard, speech.read(one.media[0][1]))
        assert row["num_samples"] == soundfile.info(one.media[0][1]).frames
    url = f"data:audio/wav;base64,{base64.b64encode(content).decode()}"
    part = {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}}
    message = {"role": "user", "content": [{"type": "text", "text": "?"}, part]}
    (found,) = conversation.read([message], ("speech",), Limits()).parts
    assert (found.modality, found.text) == ("speech", url)


def test_arguments_name_folders_and_instructions(written):
    _, files = written
    told = json.loads((files / "dataset_args.json").read_text("utf-8"))
    for name, one in told.items():
        assert one["dataset_id"] == str(files / name) and any((files / name).iterdir())
    assert told["vqav2"]["prompt_template"] == "{question}"
    assert all(told[name]["prompt_template"].startswith("请") for name in ("msr_vtt", "fleurs"))


def test_the_filter_makes_characters_words(monkeypatch):
    """Those that our scores over characters count."""
    known = {}
    named = {name: types.ModuleType(name) for name in (
        "evalscope", "evalscope.api", "evalscope.api.filter", "evalscope.api.registry",
        "evalscope.cli", "evalscope.cli.cli",
    )}  # fmt: skip
    named["evalscope.api.filter"].Filter = object
    named["evalscope.api.registry"].register_filter = lambda name: (
        lambda made: known.setdefault(name, made)
    )
    named["evalscope.cli.cli"].run_cmd = lambda: None
    for name, module in named.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    importlib.import_module("run")
    monkeypatch.delitem(sys.modules, "run")
    texts = ["左上是小的 红色圆形，右下…", "ＡＢ c３！", "", "It's a\tred_circle"]
    (made,) = known.values()
    assert [*known] == ["characters"]
    for text, found in zip(texts, made().apply(texts)):
        assert tuple(found.split()) == tuple(caption_metrics.clean(text))
