"""The steps that built the paper's data: what they do to one element and to many."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from hanging import Hanging

from xllm_jax.data.media import speech
from xllm_jax.data.rows.translated import same
from xllm_jax.prepare import runner, transforms


def test_the_same_question_is_one(tmp_path):
    assert same("Is it  red?") == same("is it red") != same("red")
    assert same("是红色的吗？") == same("是红色的吗")


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
@pytest.mark.parametrize("arguments", [[], ["--runner=DirectRunner"]], ids=["here", "beam"])
def test_resampling_and_speech_of_many(tmp_path, arguments):
    if arguments:
        pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")
    root, out, listed = tmp_path / "in", str(tmp_path / "out"), tmp_path / "list.json"
    (root / "deep").mkdir(parents=True)
    for name, rate in (("a.wav", 8000), ("deep/b.flac", 44100)):
        soundfile.write(root / name, np.sin(np.arange(rate) / 9) / 2, rate)
    (root / "c.wav").write_bytes(b"broken")
    names = {"a.wav": "a.wav", "deep/b.flac": "deep/b.flac", "c.wav": ""}
    wanted = [(str(root / old), new and f"{out}/{new}") for old, new in names.items()]
    step, paths = transforms.Resample(out, str(root)), [path for path, _ in wanted]
    made = runner.mapped(step, paths, listed, arguments)
    assert sorted((path, file) for path, file, _ in made) == sorted(wanted)
    assert [bool(why) for path, _, why in made if path.endswith("c.wav")] == [True]
    speak = transforms.Speak(out, hum)
    assert [text for text, _ in runner.mapped(speak, ["有几个"], listed, arguments)] == ["有几个"]
    assert not listed.exists()
    for name in ("a.wav", "deep/b.flac"):
        about = soundfile.info(tmp_path / "out" / name)
        assert (about.samplerate, about.channels, about.subtype) == (16000, 1, "PCM_16")
        assert about.format == name[-4:].strip(".").upper() and abs(about.frames - 16000) < 2


def hum(text):
    return np.full(8000, len(text) / 9, np.float32)


def test_a_sound_that_hangs_is_left_out(tmp_path, monkeypatch):
    """Its decoder is another process, which is killed."""
    monkeypatch.setattr(transforms, "DEADLINE", 2.0)
    convert = transforms.Resample(str(tmp_path / "out"))
    _, made, why = convert(Hanging(str(tmp_path / "a.wav"), b""))
    assert (made, why) == ("", "took longer than 2 s to decode")
    assert not list(tmp_path.rglob("*.flac"))
