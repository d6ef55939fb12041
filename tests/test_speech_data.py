"""Audio files, good and bad, and SpecAugment."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.media import modalities, specaugment, speech, wav


@pytest.fixture(scope="module")
def wave():
    """A second of noise with a tone, on [-1, 1]."""
    rng = np.random.default_rng(0)
    time = np.arange(16_000) / 16_000
    return (0.2 * np.sin(2 * np.pi * 440 * time) + 0.05 * rng.normal(size=16_000)).astype("f")


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_file_is_read_on_the_integer_scale(tmp_path, wave, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, wave, 16_000, subtype="PCM_16")
    samples = speech.read(path)
    np.testing.assert_array_equal(samples, np.round(samples))
    np.testing.assert_allclose(samples, wave * 32768, atol=1)
    features = speech.load(path)
    assert features.shape == (98, 80) == (speech.count_frames(path), 80)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_other_rates_and_channels_are_mixed_and_resampled(tmp_path, rate):
    path = tmp_path / "a.wav"
    time = np.arange(rate) / rate
    tone = 0.3 * np.sin(2 * np.pi * 500 * time)
    soundfile.write(path, np.stack([2 * tone, 0 * tone], 1), rate, subtype="FLOAT")
    samples = speech.read(path)
    assert abs(len(samples) - 16_000) <= 1
    expected = 0.3 * 32768 * np.sin(2 * np.pi * 500 * np.arange(len(samples)) / 16_000)
    middle = slice(1000, -1000)
    assert np.abs(samples[middle] - expected[middle]).max() < 0.01 * 0.3 * 32768
    assert speech.count_frames(path) == len(speech.filterbank(samples))


@pytest.mark.parametrize("channels, rate", [(1, 16_000), (2, 16_000), (1, 44_100), (3, 8_000)])
def test_plain_wav_files_are_read_as_libsndfile_reads_them(tmp_path, channels, rate):
    path, rng = tmp_path / "a.wav", np.random.default_rng(0)
    wave = rng.integers(-32768, 32767, (rate, channels)).astype(np.int16)
    soundfile.write(path, wave, rate, subtype="PCM_16")
    content = path.read_bytes()
    extra = content[:12] + b"LIST\5\0\0\0abcde\0" + content[12:] + b"more"  # odd size: padded
    for form in (content, extra):
        path.write_bytes(form)
        samples, found = wav.samples(path.read_bytes())
        expected, wanted = soundfile.read(path, dtype="float32", always_2d=True)
        assert found == wanted == rate and samples.dtype == np.float32
        np.testing.assert_array_equal(samples, expected)
        assert abs(len(speech.read(path)) - 16_000) <= 1


@pytest.mark.parametrize("subtype", ["PCM_24", "PCM_U8", "FLOAT", "ULAW"])
def test_other_wav_files_are_left_to_libsndfile(tmp_path, wave, subtype):
    path = tmp_path / "a.wav"
    soundfile.write(path, wave, 16_000, subtype=subtype)
    assert wav.samples(path.read_bytes()) is None
    np.testing.assert_allclose(speech.read(path), wave * 32768, atol=1500)
    soundfile.write(path, wave, 16_000, subtype="PCM_16")
    assert wav.samples(path.read_bytes()[:-2]) is None


def write(path, samples, rate=16_000):
    soundfile.write(path, np.asarray(samples, np.float32), rate, subtype="FLOAT")


BAD = {
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "no such file"),
    "text": (lambda path: path.write_text("not audio"), "not a readable audio file"),
    "nothing": (lambda path: path.write_bytes(b""), "not a readable audio file"),
    "empty": (lambda path: write(path, []), "no samples"),
    "silent": (lambda path: write(path, np.zeros(16_000)), "silent"),
    "constant": (lambda path: write(path, np.full(16_000, 0.5)), "silent"),
    "short": (lambda path: write(path, np.sin(np.arange(1_600))), "too short: 0.100 s"),
    "nan": (lambda path: write(path, [0.1, np.nan] * 8_000), "NaN"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_named(tmp_path, kind):
    make, message = BAD[kind]
    path = tmp_path / f"{kind}.wav"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        speech.load(path)
    assert str(path) in str(caught.value)


def test_header_of_a_bad_file(tmp_path):
    (tmp_path / "a.wav").write_text("not audio")
    for name in ("a.wav", "b.wav"):
        with pytest.raises(UserError, match=name):
            speech.count_frames(tmp_path / name)


def test_cut_file_reads_or_is_named(tmp_path, wave):
    """A file whose end is missing never fails in any other way."""
    path = tmp_path / "a.flac"
    soundfile.write(path, wave, 16_000)
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 12):
        path.write_bytes(whole[:size])
        try:
            assert np.isfinite(speech.load(path)).all()
        except UserError as error:
            assert str(path) in str(error)


def test_augmentation_only_with_a_generator(tmp_path, wave):
    path = tmp_path / "a.wav"
    write(path, wave)
    plain = speech.load(path)
    np.testing.assert_array_equal(plain, speech.load(path, {"specaugment": True}))
    np.testing.assert_array_equal(plain, speech.load(path, {}, np.random.default_rng(0)))
    one, again, other = (
        speech.load(path, {"specaugment": True}, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other) and np.any(one != plain)
    strong = {"specaugment": {"time_masks": 9, "time_width": 90}}
    assert speech.load(path, strong, np.random.default_rng(0)).shape == plain.shape


def test_whispers_filters_stay_where_they_are():
    with pytest.raises(UserError, match=r"data\.speech\.vtlp: moves Kaldi's filters"):
        modalities.filterbanks(Data(speech={"features": "whisper", "vtlp": 0.1}))
    assert modalities.filterbanks(Data(speech={"vtlp": 0.1})) == modalities.KALDI


def test_the_vocal_tract_changes_in_training_alone(tmp_path):
    path = tmp_path / "a.wav"
    noise = np.random.default_rng(3).normal(size=16000)
    soundfile.write(path, 0.1 * noise, 16000)
    plain = speech.load(path)
    np.testing.assert_array_equal(plain, speech.load(path, {"vtlp": 0.1}))
    first, again, other = (
        speech.load(path, {"vtlp": 0.1}, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert first.shape == other.shape == plain.shape
    assert np.abs(first - other).max() > 0.1 and np.abs(first - plain).max() > 0.1


@pytest.mark.parametrize("shape", [(1, 80), (9, 2), (3, 27)])
def test_masks_of_small_features(shape):
    for seed in range(20):
        masks = specaugment.spec_masks(shape, np.random.default_rng(seed))
        assert masks.shape == shape


def test_no_frame_from_too_few_samples():
    assert speech.filterbank(np.ones(399)).shape == (0, 80)
    assert speech.filterbank(np.arange(400)).shape == (1, 80)
