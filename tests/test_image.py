"""Image processors: crops, modes, texts, and what unreadable files do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import image
from xllm_jax.data.text import blip_captions


@pytest.mark.golden
def test_text_processors_are_the_recorded_ones(golden):
    cases = json.loads((golden / "vision/cases_text_processors.json").read_text())
    for case in cases:
        assert blip_captions.caption(case["input"]) == case["blip_caption"]
        assert blip_captions.question(case["input"]) == case["blip_question"]


def test_crop_boxes_have_uniform_areas_log_uniform_aspects_and_uniform_places():
    """torchvision's rule, seen on an image that every draw fits into."""
    rng = np.random.default_rng(0)
    boxes = np.array([image.crop_box(1000, 1000, (0.3, 0.5), rng) for _ in range(4000)])
    top, left, height, width = boxes.T
    for values, low, high in (
        (height * width / 1e6, 0.3, 0.5),
        (np.log(width / height), np.log(3 / 4), np.log(4 / 3)),
        (top / (1000 - height), 0, 1),
        (left / (1000 - width), 0, 1),
    ):
        shares = np.histogram(values, bins=10, range=(low, high))[0] / len(boxes)
        np.testing.assert_allclose(shares, 0.1, atol=0.025)


def test_crop_boxes_stay_inside_and_keep_area_and_aspect():
    rng = np.random.default_rng(1)
    for height, width in ((150, 200), (40, 41), (7, 9)):
        for _ in range(300):
            top, left, h, w = image.crop_box(height, width, (0.5, 1.0), rng)
            assert 0 <= top <= height - h and 0 <= left <= width - w
            assert 0.4 <= h * w / (height * width) <= 1
    assert image.crop_box(10, 1000, (0.5, 1.0), rng) == (0, 493, 10, 13)  # nothing fits: center
    assert image.crop_box(1000, 10, (0.5, 1.0), rng) == (493, 0, 13, 10)


def test_every_mode_becomes_rgb(tmp_path):
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    modes = {
        "L": Image.fromarray(gray),
        "RGBA": Image.fromarray(np.dstack([gray, gray, gray, gray // 2])),
        "CMYK": Image.fromarray(gray).convert("RGB").convert("CMYK"),
        "P": Image.fromarray(gray).convert("P"),
        "LA": Image.fromarray(gray).convert("LA"),
        "I;16": Image.fromarray(gray.astype(np.uint16) * 257),
        "1": Image.fromarray(gray > 128),
    }
    for mode, picture in modes.items():
        path = tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode == 'CMYK' else 'png'}"
        picture.save(path)
        pixels = np.asarray(image.read(path))
        assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
        expected = np.where(gray > 128, 255, 0) if mode == "1" else gray
        np.testing.assert_allclose(pixels[..., 0], expected, atol=1, err_msg=mode)


def test_load_is_repeatable_and_augments_only_in_training(tmp_path):
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    options = {"size": 16, "scale": (0.5, 1.0), "flip": True}
    calm = image.load(path, options)
    assert calm.shape == (16, 16, 3) and calm.dtype == np.float32
    np.testing.assert_array_equal(calm, image.load(path, options))
    drawn = [image.load(path, options, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.1
    np.testing.assert_array_equal(image.load(path, {"size": 16}, np.random.default_rng(0)), calm)


def test_unreadable_files_are_told_by_name(tmp_path):
    good = tmp_path / "good.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(good)
    bytes_ = good.read_bytes()
    for name, content in {
        "cut.jpg": bytes_[: len(bytes_) // 2],
        "text.jpg": b"this is no image",
        "empty.jpg": b"",
        "head.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 20,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            image.read(tmp_path / name)
    with pytest.raises(UserError, match="no such image file"):
        image.read(tmp_path / "missing.jpg")
    with pytest.raises(UserError, match="pixels"):
        image.read(good, most_pixels=100)
    with pytest.raises(UserError, match="cannot be read"):
        image.read(tmp_path)
