"""Recorded filterbanks of waveforms, their normalization and SpecAugment."""

from __future__ import annotations

import numpy as np

from xllm_jax.convert.verify.recording import Replay
from xllm_jax.core.errors import UserError
from xllm_jax.data.media import specaugment, speech

INTEGERS = 32768  # samples of the files are integers of 16 bits
OPTIONS = {
    "freq_mask_N": "frequency_masks",
    "freq_mask_F": "frequency_width",
    "time_mask_N": "time_masks",
    "time_mask_T": "time_width",
    "time_mask_p": "time_share",
}
SEED = 1000  # of the first utterance; the next has the next


class LegacyRandom:
    """The recording's generator, NumPy's old one, under the new one's method name."""

    def __init__(self, seed: int):
        self.state = np.random.RandomState(seed)

    def integers(self, low: int, high: int) -> int:
        """An integer of `[low, high)`."""
        return self.state.randint(low, high)


def filterbanks(replay: Replay) -> None:
    """Every waveform, each step from the recorded result of the step before it."""
    for name in replay.names("wave*"):
        replay.attempt(_utterance, name.removeprefix("wave"))
    replay.attempt(_corpus)


def _utterance(replay: Replay, number: str) -> None:
    wave = replay.input(f"wave{number}").astype(np.float32)
    _features(replay, f"fbank{number}", wave)
    _features(replay, f"fbank{number}_unit_scale", wave / INTEGERS)
    recorded = replay.recorded(f"fbank{number}")
    replay.compare(f"utt_cmvn{number}", speech.normalize(recorded))
    if f"specaug{number}" in replay:
        masks = replay.input(f"specaug{number}_mask")
        normalized = replay.recorded(f"utt_cmvn{number}")
        replay.compare(f"specaug{number}", specaugment.mask(normalized, masks))
        replay.attempt(_drawn, int(number), normalized.shape)


def _drawn(replay: Replay, number: int, shape: tuple[int, ...]) -> None:
    """The masks themselves, by the recorded recipe and its generator."""
    recipe = replay.about()["specaugment"]["aishell1_recipe"]
    options = {OPTIONS[key]: value for key, value in recipe.items() if key in OPTIONS}
    drawn = specaugment.spec_masks(shape, LegacyRandom(SEED + number), **options)
    replay.compare(f"specaug{number}_mask", drawn)


def _features(replay: Replay, name: str, wave: np.ndarray) -> None:
    """The largest error, and the mean and the quantile that the recording limits too."""
    if name not in replay:
        return
    found, recorded = speech.filterbank(wave), replay.recorded(name)
    replay.compare(name, found)
    if found.dtype != np.float32:
        raise UserError(f"computed as {found.dtype}, not float32", field=name)
    if found.shape == recorded.shape:
        error = np.abs(found - recorded)
        limits = replay.tolerances.numbers("fbank")
        if len(limits) > 1:
            replay.check(name, float(error.mean()), limits[0], "mean error")
            replay.check(name, float(np.quantile(error, 0.999)), limits[1], "99.9 % quantile")


def _corpus(replay: Replay) -> None:
    """Statistics of the corpus, which are of the utterances that were augmented."""
    if "gcmvn_mean" not in replay:
        return
    names = [f"fbank{n.removeprefix('specaug')}" for n in replay.names("specaug?")]
    mean, deviation = speech.corpus_statistics([replay.recorded(name) for name in names])
    replay.compare("gcmvn_mean", mean)
    replay.compare("gcmvn_std", deviation)
    first = replay.recorded(names[0])
    replay.compare("global_cmvn0", speech.normalize(first, mean, deviation))
