"""The steps that built the paper's data: what they do to elements, and through Beam."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from xllm_jax.data.media import speech
from xllm_jax.prepare import transforms

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
def test_resampling_and_speech_through_beam(tmp_path):
    beam = pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")
    from apache_beam.testing.util import assert_that, equal_to

    root, out = tmp_path / "in", str(tmp_path / "out")
    (root / "deep").mkdir(parents=True)
    for name, rate in (("a.wav", 8000), ("deep/b.flac", 44100)):
        soundfile.write(root / name, np.sin(np.arange(rate) / 9) / 2, rate)
    (root / "c.wav").write_bytes(b"broken")
    names = {"a.wav": "a.wav", "deep/b.flac": "deep/b.flac", "c.wav": ""}
    wanted = [(str(root / old), new and f"{out}/{new}") for old, new in names.items()]
    with beam.Pipeline() as pipeline:
        paths = pipeline | "paths" >> beam.Create([path for path, _ in wanted])
        made = transforms.resampled(paths, out, str(root))
        assert_that(made | "no reasons" >> beam.Map(lambda one: one[:2]), equal_to(wanted), "16k")
        why = made | "why" >> beam.Filter(lambda one: one[2]) | "one" >> beam.Map(len)
        assert_that(why, equal_to([3]), "one reason")
        texts = pipeline | "texts" >> beam.Create(["有几个"])
        said = transforms.spoken(texts, out, lambda text: np.full(8000, len(text) / 9, np.float32))
        assert_that(said | beam.Map(lambda one: one[0]), equal_to(["有几个"]), "said")
    for name in ("a.wav", "deep/b.flac"):
        about = soundfile.info(tmp_path / "out" / name)
        assert (about.samplerate, about.channels, about.subtype) == (16000, 1, "PCM_16")
        assert about.format == name[-4:].strip(".").upper() and abs(about.frames - 16000) < 2
