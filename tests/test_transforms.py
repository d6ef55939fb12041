"""The steps that built the paper's data: what they do to elements, and through Beam."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from xllm_jax.data import speech
from xllm_jax.data.sources import vsdial_cn
from xllm_jax.prepare import transforms, vsdial

WORDS = {
    "is it red?": "是红色的吗？",
    "Is it red": "是红色的吗",
    "how many?": "有几个？",
    "yes": "是",
    "two": "两个",
}


def test_the_same_question_is_one(tmp_path):
    assert transforms.same("Is it  red?") == transforms.same("is it red") != transforms.same("red")
    assert transforms.same("是红色的吗？") == transforms.same("是红色的吗")


def test_resampling_keeps_a_tone_and_reports_bad_files(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, tone], 1) / 2, 44100)
    (tmp_path / "b.wav").write_bytes(b"broken")
    convert = transforms.Resample(str(tmp_path / "out"))
    _, file, reason = convert(str(tmp_path / "a.wav"))
    samples, rate = soundfile.read(file)
    assert (rate, samples.ndim, reason) == (16000, 1, "") and len(samples) == 16000
    spectrum = np.abs(np.fft.rfft(samples))
    assert spectrum.argmax() == 440 and np.abs(samples).max() == pytest.approx(0.5, abs=0.02)
    _, file, reason = convert(str(tmp_path / "b.wav"))
    assert file == "" and "not a readable audio file" in reason
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_espeak_says_a_text_the_same_way_and_any_engine_may(tmp_path):
    text, file = transforms.Speak(str(tmp_path), transforms.espeak)("有几个？")
    assert text == "有几个？" and len(speech.read(file)) > 4000
    np.testing.assert_array_equal(transforms.espeak("有几个？"), transforms.espeak("有几个？"))
    own = transforms.Speak(str(tmp_path), lambda text: np.full(8000, 0.5, np.float32))
    samples, _ = soundfile.read(own("好")[1])
    assert len(samples) == 8000 and np.allclose(samples, 0.5, atol=1e-4)


@pytest.mark.filterwarnings("default")
def test_filters_through_beam():
    beam = pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")
    from apache_beam.testing.util import assert_that, equal_to

    with beam.Pipeline() as pipeline:
        scores = [{"key": key, "similarity": key / 100} for key in (44, 45, 46)]
        kept = transforms.similar(pipeline | "scores" >> beam.Create(scores))
        assert_that(kept | beam.Map(lambda pair: pair["key"]), equal_to([45, 46]), "similar")
        asked = pipeline | "asked" >> beam.Create([*WORDS, "unknown"])
        chinese = transforms.translated(asked, WORDS)
        assert_that(chinese, equal_to(list(WORDS.items())), "translated")
        once = transforms.deduplicated(chinese | beam.Map(lambda pair: pair[1]))
        assert_that(once, equal_to(["两个", "是", "是红色的吗", "有几个？"]), "once")


@pytest.mark.filterwarnings("default")
def test_vsdial_is_built_from_visdial(tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")
    data = {
        "questions": ["is it red?", "how many?", "Is it red", "why?"],
        "answers": ["yes", "two"],
        "dialogs": [
            {
                "image_id": 7,
                "caption": "",
                "dialog": [{"question": q, "answer": a} for q, a in ((0, 0), (1, 1), (3, 0))],
            },
            {"image_id": 8, "caption": "", "dialog": [{"question": 2, "answer": 0}]},
        ],
    }
    (tmp_path / "visdial_1.0_train.json").write_text(json.dumps({"data": data}), "utf-8")
    (tmp_path / "zh.json").write_text(json.dumps(WORDS), "utf-8")
    counts = vsdial.build(str(tmp_path), str(tmp_path / "zh.json"), str(tmp_path / "cn"))
    assert counts == {"rounds": 3, "left_out": 1, "questions": 2}
    found = vsdial_cn.examples(str(tmp_path / "cn"), kind="asr")
    assert [one.transcript for one in found] == ["是红色的吗", "有几个", "是红色的吗"]
    files = [one.media[0][1] for one in found]
    assert files[0] == files[2] != files[1]
    assert all(len(speech.read(file)) > 4000 for file in files)
