"""The suite of drawn pictures with a tiny CLIP: drawings that are the real pictures, and worse."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import reader_fixtures as fixtures
import small_clip
import suite_data
from PIL import Image

from xllm_jax.convert import run_import
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.core.suite import PictureSuite
from xllm_jax.evaluation import clip_base
from xllm_jax.evaluation.suites import pictures, run
from xllm_jax.evaluation.suites.run import Place

COUNT, SHAPE = 8, (4, 3)


class Clip:
    """A CLIP of a few numbers: colors of a picture's corners, and the letters of a caption."""

    identity, side = "fake", small_clip.SIDE

    def __init__(self, base: str, tokenizer: str = ""):
        assert base == "clip"

    def images(self, values: np.ndarray, batch: int = 32) -> np.ndarray:
        corners = values[:, :: self.side - 1, :: self.side - 1].reshape(len(values), -1)
        return corners.astype(np.float32) - 100

    def texts(self, captions: list[str], batch: int = 32) -> np.ndarray:
        """Of caption n what the n-th picture has: a perfect match."""
        return np.stack([np.full(12, COLORS[int(text[-1])][0], np.float32) - 100 +
                         np.tile(np.subtract(COLORS[int(text[-1])], COLORS[int(text[-1])][0]), 4)
                         for text in captions])  # fmt: skip


COLORS = np.random.default_rng(1).integers(0, 256, (COUNT, 3))


@pytest.fixture
def config(tmp_path, monkeypatch) -> PictureSuite:
    """Eight pictures of one color each, drawn perfectly."""
    monkeypatch.setattr(pictures, "ClipBase", Clip)
    rows, folder = [], tmp_path / "real"
    for number in range(COUNT):
        folder.mkdir(exist_ok=True)
        color = tuple(int(part) for part in COLORS[number])
        Image.new("RGB", (40, 32), color).save(folder / f"{number}.png")
        rows.append(
            {"image": f"{number}.png", "caption": [f"caption {number}"], "image_id": number}
        )
    fixtures.write(tmp_path / "list/coco_karpathy_test.json", rows)
    (tmp_path / "drawn").mkdir()
    source = Source("coco", "list", "test", {"images": str(folder)}, (str(folder),))
    made = PictureSuite(
        root=str(tmp_path), sets={"coco": source}, drawn=str(tmp_path / "drawn"), clip="clip"
    )
    for number, example in enumerate(run.samples(made)["coco"]):
        shutil.copy(folder / f"{number}.png", pictures.file_of(made.drawn, example.key, ".png"))
    return made


def results(config: PictureSuite, folder) -> dict:
    run.run("pictures", config, None, Place(folder))
    return suite_data.results(folder)["sets"]["coco"]


def test_real_pictures_as_drawings(config, tmp_path):
    found = results(config, tmp_path / "out")
    assert (found["samples"], found["missing"]) == (COUNT, 0)
    assert found["clip_score"]["value"] == pytest.approx(100, abs=1e-4)
    assert found["recall"]["value"] == 1 and found["recall"]["real"]["value"] == 1
    assert found["recall"]["shuffled"]["value"] == 0
    assert found["clip_score"]["shuffled"]["value"] < 90
    assert abs(found["fid"]["value"]) < 1e-3 * found["fid"]["noise"]
    text = (tmp_path / "out/results.md").read_text("utf-8")
    assert "CLIP score" in text and "FID" in text


def test_what_is_not_drawn_scores_nothing(config, tmp_path):
    files = sorted((tmp_path / "drawn").iterdir())
    for file in files[:2]:
        file.unlink()
    found = results(config, tmp_path / "out")
    assert found["missing"] == 2 and found["recall"]["value"] == pytest.approx(6 / 8)
    assert found["clip_score"]["value"] == pytest.approx(75, abs=1e-4)
    for file in files[2:]:
        file.unlink()
    with pytest.raises(UserError, match="no drawing of any sample"):
        results(config, tmp_path / "none")


def test_projected_embeddings_find_their_captions(config, tmp_path):
    config = dataclasses.replace(config, wanted=str(tmp_path / "wanted"))
    rng = np.random.default_rng(0)
    keys = [example.key for example in run.samples(config)["coco"]]
    (tmp_path / "wanted").mkdir()
    for number, key in enumerate(keys):
        target = rng.normal(size=(1, *SHAPE))
        made = target + 0.1 * rng.normal(size=target.shape) if number else -target
        for folder, values in (("wanted", target), ("drawn", made)):
            np.savez(pictures.file_of(str(tmp_path / folder), key, ".npz"), prompt_embeds=values)
    found = results(config, tmp_path / "out")["projected"]
    assert found["value"] == 7 / 8 and found["missing"] == 0
    assert found["shuffled"]["value"] <= 1 / 8  # the one that points away may be near any
    pictures.file_of(config.drawn, keys[1], ".npz").unlink()
    found = results(config, tmp_path / "out")["projected"]
    assert found["value"] == 6 / 8 and found["missing"] == 1
    pictures.file_of(config.wanted, keys[2], ".npz").write_bytes(b"no array")
    with pytest.raises(UserError, match="holds no embeddings"):
        results(config, tmp_path / "out")


def test_a_real_clip_of_tiny_size(config, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "ClipBase", clip_base.ClipBase)
    small_clip.write(tmp_path / "openai")
    run_import.run_import("clip", tmp_path / "openai", tmp_path / "base")
    config.clip, config.batch = str(tmp_path / "base"), COUNT
    found = results(config, tmp_path / "out")
    score, real = found["clip_score"], found["clip_score"]["real"]
    assert score["value"] == pytest.approx(real["value"], abs=1e-4) and -100 < real["value"] < 100
    assert found["fid"]["noise"] > 100 * abs(found["fid"]["value"])


def test_what_is_missing_is_named(config, tmp_path):
    for field, told in (("drawn", "drawn: is missing"), ("clip", "clip: is missing")):
        with pytest.raises(UserError, match=told):
            results(dataclasses.replace(config, **{field: ""}), tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        results(dataclasses.replace(config, drawn="nowhere"), tmp_path / "out")
