"""Scores of pictures against what published packages gave, and against their controls."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import GOLDEN

from xllm_jax.convert.verify import tolerances
from xllm_jax.convert.verify.recording import UNUSED, Replay
from xllm_jax.core.errors import UserError
from xllm_jax.evaluation import picture_scores as scores

FOLDER = GOLDEN / "diffusion"


@pytest.mark.golden
def test_scores_equal_those_of_published_packages():
    replay = Replay(FOLDER / "cases_metrics.npz", tolerances.read(FOLDER))
    for case in ("fid", "fad"):
        both = {name: replay.input(f"{case}.{name}") for name in ("real", "fake")}
        for name, features in both.items():
            found = scores.statistics(features)
            replay.compare(f"{case}.{name}_mu", found.mean)
            replay.compare(f"{case}.{name}_sigma", found.covariance)
        distance = scores.fid(both["real"], both["fake"])
        for name in ("distance", "distance_by_eigenvalues"):
            replay.compare(f"{case}.{name}", distance)
        replay.compare(f"{case}.distance_to_itself", scores.fid(both["real"], both["real"]))
    few = [replay.input(f"fid.{name}")[:5] for name in ("real", "fake")]
    replay.compare("few.distance_by_eigenvalues", scores.fid(*few))
    logits = replay.input("is.logits")
    for name, options in (("1", (1,)), ("10", (10,)), ("10_shuffled", (10, True))):
        mean, deviation = scores.inception_score(logits, *options)
        replay.compare(f"is.splits{name}.mean", mean)
        replay.compare(f"is.splits{name}.std", deviation)
    pair = replay.input("clip.image_features"), replay.input("clip.text_features")
    replay.compare("clip.cosine_x100", scores.cosines(*pair))
    replay.compare("clip.score", scores.clip_score(*pair))
    replay.compare("clip.score_clamped_rows", scores.clip_score(*pair, clamp_rows=True))
    clips = replay.input("clipsim.frame_features"), replay.input("clipsim.text_features")
    replay.compare("clipsim.per_video", scores.clip_similarity(*clips))
    replay.compare("clipsim.score", scores.clip_similarity(*clips).mean())
    wrong = [row for row in replay.finish() if row.missed or row.verdict == UNUSED]
    assert wrong == []


def pairs(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Features of captions, and of pictures that follow them with noise."""
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(count, 24))
    return texts + 0.4 * rng.normal(size=texts.shape), texts


def test_pairs_beat_shuffled_pairs():
    images, texts = pairs()
    others = scores.shuffled(texts)
    assert scores.clip_score(images, texts) > 80 > 20 > scores.clip_score(images, others)
    assert scores.recall_at_1(images, texts).mean() > 0.95
    assert scores.recall_at_1(images, others).mean() < 0.05


def test_recall_is_not_taken_in_by_what_all_captions_share():
    images, texts = pairs()
    padding = np.full((40, 60), 9.0)
    long = [np.concatenate([x, padding], axis=1).reshape(40, 6, 14) for x in (images, texts)]
    assert scores.recall_at_1(*long).mean() > 0.95
    same = np.repeat(long[1].mean(0, keepdims=True), 40, axis=0)
    assert scores.recall_at_1(same, long[1]).mean() == 0  # one answer to everything


def test_pictures_are_nearer_to_pictures_than_noise_is():
    rng = np.random.default_rng(1)
    real, drawn = rng.normal(size=(2, 2000, 16)) * np.linspace(0.2, 2, 16)
    noise = rng.uniform(-3, 3, (2000, 16))
    assert scores.fid(real, drawn) < 0.5 < 10 < scores.fid(real, noise)


def test_what_has_no_score_is_refused():
    with pytest.raises(UserError, match="1 pictures have no covariance"):
        scores.statistics(np.zeros((1, 4)))
    with pytest.raises(UserError, match="have 4 and 5 numbers"):
        scores.fid(np.eye(4), np.eye(5))
    with pytest.raises(UserError, match="are not all finite"):
        scores.clip_score(np.full((2, 3), np.nan), np.ones((2, 3)))
    with pytest.raises(UserError, match="3 parts of 2 pictures"):
        scores.inception_score(np.zeros((2, 5)), splits=3)
