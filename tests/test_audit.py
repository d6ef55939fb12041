"""The audit shows what the loss sees, refuses sources without supervision, and adds up padding."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import soundfile
from PIL import Image
from small_stage import TOKENIZER, stage
from test_video import write as write_video

from xllm_jax.audit import audit, page, supervision
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source, Stage
from xllm_jax.data import mixture
from xllm_jax.data.batching import padding
from xllm_jax.data.example import Example
from xllm_jax.data.media import speech
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.text.characters import CharacterVocabulary

SAID = "红色的圆在左边"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of each modality; the picture is of one color."""
    path = tmp_path_factory.mktemp("files")
    Image.new("RGB", (40, 30), (200, 30, 60)).save(path / "a.png")
    sound = np.sin(np.arange(24000) / 7).astype(np.float32) / 3
    soundfile.write(path / "a.flac", sound, 16000)
    write_video(path / "a.mp4", 12)
    CharacterVocabulary.build([SAID]).save(path / "characters.txt")
    return path


@pytest.fixture
def staged(folder, monkeypatch):
    """A stage over lists of examples, {source: examples}."""

    def make(sources, **fields):
        shapes = {
            "examples": 4,
            "rows": 4,
            "length": 128,
            "answers": 32,
            "items": {"image": 1, "video": 2, "speech": 1},
            "embeddings": {"image": 3, "video": 3, "speech": 24},
            "frames": (200,),
            "image": {"size": 32},
            "video": {"frames": 2},
        }
        data = Data(
            sources={name: Source("list") for name in sources},
            tokenizer=str(TOKENIZER),
            characters=str(folder / "characters.txt"),
            threads=1,
            **(shapes | fields),
        )
        monkeypatch.setattr(mixture, "read", lambda name, source, root, **_: sources[name])
        return Stage(name="small", data=data)

    return make


def asked(folder, count=8, answer=SAID):
    media = [(kind, str(folder / f"a.{end}")) for kind, end in
             (("image", "png"), ("video", "mp4"), ("speech", "flac"))]  # fmt: skip
    question = "看<image>，听<speech>，是什么？"
    return [
        Example(f"e{i}", tuple(media), question, answer, "vqa", transcript=SAID)
        for i in range(count)
    ]


def test_a_sample_is_what_the_model_meets(staged, folder):
    found = audit(staged({"a": asked(folder)}), samples=3)
    assert len(found.samples) == 3
    sample = found.samples[0]
    learnt = [said for kind, said in sample.pieces if kind == "learnt"]
    assert "".join(learnt[1:-1]).strip() == SAID and len(learnt) == sample.tokens["supervised"]
    slots = [said for kind, said in sample.pieces if kind == "slot"]
    assert slots == ["video × 6", "image × 3", f"speech × {len(SAID) + 1}"]
    words = "".join(said for kind, said in sample.pieces if kind in ("words", "slot"))
    assert re.search("看 <Image>image × 3</Image> .听 <Speech>speech × 8</Speech> .是什么", words)
    by_kind = {one.modality: one.values for one in sample.media}
    assert np.abs(by_kind["image"].astype(int) - (200, 30, 60)).max() <= 1
    expected = speech.load(folder / "a.flac")
    np.testing.assert_array_equal(by_kind["speech"], expected)
    assert sum(one.modality == "video" for one in sample.media) == 2


def test_counts_are_those_of_the_batches(staged, folder):
    made = staged({"a": asked(folder), "b": asked(folder, 8, "对")})
    found = audit(made, samples=2)
    tokens = supervised = 0
    batches = Pipeline(made.data, made.seed).iterate()
    for _ in range(found.counts.batches):
        batch, _ = next(batches)
        tokens += int((batch.segments > 0).sum())
        supervised += int(batch.weights.sum())
    assert found.counts.total("tokens") == tokens
    assert found.counts.supervised_share() == pytest.approx(supervised / tokens)
    assert sum(found.counts.lengths["supervised"]) == supervised
    assert found.counts.waste.shares()["tokens"] == pytest.approx(
        1 - tokens / (found.counts.batches * 4 * 128)
    )
    assert set(found.counts.examples) == {"a", "b"}


def test_the_page_carries_its_files(staged, folder, tmp_path):
    found = audit(staged({"a": asked(folder)}), samples=2)
    written = page.write(found, tmp_path / "out").read_text("utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", written) and "<script" not in written
    waves = re.findall(r"data:audio/wav;base64,([^\"]+)", written)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(waves[0])), dtype="int16")
    assert rate == 16000 and np.abs(samples - speech.read(folder / "a.flac")).max() <= 1
    assert len(waves) == 2 and written.count('alt="frame"') == 4
    assert "<mark>" in written and "% of all tokens are supervised" in written
    assert "Padding waste" in page.terminal(found)


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_a_source_without_answers_is_refused_by_name(staged, folder, answer):
    made = staged({"good": asked(folder), "silent": asked(folder, 5, answer)})
    with pytest.raises(UserError, match=r"data\.sources\.silent: 0 % .* 5 records .*no answer"):
        audit(made)


def test_a_source_that_never_fits_is_refused_with_its_reason(staged, folder):
    made = staged({"a": asked(folder)}, items={"image": 0, "video": 2, "speech": 1})
    with pytest.raises(UserError, match=r"data\.sources\.a: 0 % .*no room"):
        audit(made)


def test_some_silent_records_are_counted_only(staged, folder):
    made = staged({"a": asked(folder, 9) + asked(folder, 1, "")})
    (found,) = supervision.of_sources(Pipeline(made.data)).values()
    assert (found.size, found.looked_at, found.silent) == (10, 10, 1)
    supervision.refuse_silent({"a": found})


def test_other_forms(staged, folder, golden):
    speech_only = [
        Example(f"s{i}", (("speech", str(folder / "a.flac")),), transcript=SAID) for i in range(5)
    ]
    found = audit(staged({"a": speech_only}, batch_format="transcription"), samples=1)
    assert "".join(said for _, said in found.samples[0].pieces) == SAID + "⏎"
    vocabulary = str(golden / "vision" / "weights" / "bert-base-uncased")
    pairs = [Example(f"p{i}", (("image", str(folder / "a.png")),), "", "a") for i in range(5)]
    found = audit(
        staged({"a": pairs}, batch_format="image_text_pairs", vocabulary=vocabulary), samples=1
    )
    assert [said for _, said in found.samples[0].pieces] == ["[CLS]", "a", "[SEP]"]
    assert page.render(found)


def test_a_run_is_told_once_about_padding():
    watch = padding.Watch(enough=3)
    words = [watch.add({"tokens": (79, 100), "image": (80, 100)}) for _ in range(6)]
    assert words[:2] == words[3:5] == ["", ""] and words[5] == ""
    assert "21% of the places for tokens" in words[2] and "data.length" in words[2]
    assert "image" not in words[2]
    full = padding.Watch(enough=1)
    assert full.add({"tokens": (80, 100), "speech": (0, 0)}) == ""


def test_training_prints_the_warning(tmp_path, capfd):
    from xllm_jax.training import loop

    made = stage(steps=2, save_every=2)
    made.data.length, made.data.examples = 512, 8
    loop.fit(made, tmp_path)
    assert capfd.readouterr().err.count("Padding waste over 2 batches") == 1
