"""Pictures are held as their EXIF orientation says, unless the stage ignores it for parity."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data import manifest
from xllm_jax.data.media import image, modalities, preprocessing
from xllm_jax.report import media

# What the standard says of each number: the row 0 and the column 0 of the pixels are shown as …
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def shown(pixels: np.ndarray, number: int) -> np.ndarray:
    """Pixels `[height, width, 3]` as the standard shows them."""
    row, column = SIDES[number]
    if row in ("left", "right"):
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[::-1] if "bottom" in (row, column) else pixels
    return pixels[:, ::-1] if "right" in (row, column) else pixels


def corners() -> np.ndarray:
    """`[64, 96, 3]` uint8 of four blocks."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :48], pixels[:32, 48:], pixels[32:, :48] = (230, 20, 20), (20, 230, 20), 200
    return pixels


def write(path: Path, number: int, form: str) -> Path:
    about = Image.Exif()
    about[0x0112] = number
    options = {"quality": 95} if form in ("JPEG", "MPO") else {}
    options |= {"lossless": True} if form == "WEBP" else {}
    options |= (
        {"save_all": True, "append_images": [Image.new("RGB", (96, 64))]}
        if (form in ("MPO", "PNG"))
        else {}
    )
    Image.fromarray(corners()).save(path, form, exif=about, **options)
    return path


@pytest.mark.parametrize("number", SIDES)
@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_followed(tmp_path, form, number):
    path = write(tmp_path / "picture", number, form)
    found = np.asarray(image.read(path)).astype(int)
    wanted = shown(corners(), number)
    assert found.shape == wanted.shape and np.abs(found - wanted).mean() < 3
    with Image.open(path) as opened:  # Pillow's own opinion
        theirs = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP"])
def test_the_reference_ignores_it_and_so_does_the_option(tmp_path, form):
    path = write(tmp_path / "picture", 6, form)
    with Image.open(path) as opened:
        wanted = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(image.read(path, orientation="ignore")), wanted)
    data = Data(image={"size": 32, "orientation": "ignore"})
    (ignored,) = modalities.MODALITIES["image"].load(str(path), data, None)
    pixels = image.resize(Image.fromarray(wanted), 32)
    np.testing.assert_array_equal(ignored, image.normalize(pixels))
    (turned,) = modalities.MODALITIES["image"].load(str(path), Data(image={"size": 32}), None)
    assert np.abs(turned - ignored).max() > 1


def test_a_crop_is_cut_from_the_picture_as_it_is_shown(tmp_path):
    upright = Image.fromarray(shown(corners(), 6))
    upright.save(tmp_path / "upright.png")
    options = {"size": 16, "scale": (0.5, 1.0), "flip": True}
    path = write(tmp_path / "phone.png", 6, "PNG")
    for seed in range(5):
        one, other = (
            image.load(file, options, np.random.default_rng(seed))
            for file in (path, tmp_path / "upright.png")
        )
        np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_orientation_that_nobody_can_read_turns_nothing(tmp_path):
    for name, about in {
        "cut": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01",
        "noise": b"Exif\0\0" + bytes(range(200, 256)),
        "nine": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
        "text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x03\0\0\0a6\0\0\0\0\0\0",
    }.items():
        path = tmp_path / f"{name}.jpg"
        Image.fromarray(corners()).save(path, exif=about)
        assert image.read(path).size == (96, 64), name


def test_another_choice_is_refused(tmp_path):
    path = write(tmp_path / "a.png", 1, "PNG")
    with pytest.raises(UserError, match=r"data.image.orientation: unknown orientation 'upright'"):
        image.load(path, {"orientation": "upright"})


def test_pages_show_what_training_sees(tmp_path):
    path = write(tmp_path / "phone.jpg", 6, "JPEG")
    drawn = media.image(path).partition("base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(drawn))) as thumbnail:
        assert thumbnail.size == (64, 96)


def test_the_choice_is_part_of_what_hosts_and_caches_compare():
    for options, wanted in (({}, "exif"), ({"orientation": "ignore"}, "ignore")):
        data = Data(image=options, items={"image": 1})
        found = preprocessing.of_modality(modalities.MODALITIES["image"], data)
        assert found["data.image.orientation"] == wanted
        assert manifest.media_settings(data)["data.image.orientation"] == wanted
