"""Pairs that CLIP finds alike: preparation, scores and choice against transformers' own."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import small_clip
from PIL import Image

from xllm_jax.convert import run_import
from xllm_jax.convert.sources import clip as tables
from xllm_jax.core.errors import UserError
from xllm_jax.data.media import image, preprocessing
from xllm_jax.data.sources import selection
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer
from xllm_jax.prepare import score
from xllm_jax.prepare.recipes import similar

torch = pytest.importorskip("torch")

SIZES = ((40, 33), (32, 32), (20, 91), (71, 47), (35, 200), (64, 48))  # odd margins among them
CAPTIONS = ("red ball", "a dog", "", "a man and a red ball and a dog and a street", "球", "all")
BROKEN = 5


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """(transformers' model, its folder, our base of it)."""
    root = tmp_path_factory.mktemp("similar")
    model = small_clip.write(root / "clip")
    run_import.run_import("clip", root / "clip", root / "base")
    return model, root / "clip", str(root / "base")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folder of captioned images; one has no caption, one is broken."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = ["filepath\ttitle"]
    for number, (size, caption) in enumerate(zip(SIZES, CAPTIONS)):
        noise = rng.integers(0, 255, (5, 5, 3), np.uint8)
        Image.fromarray(noise).resize(size).save(folder / f"{number}.png")
        lines.append(f"{number}.png\t{caption}")
    (folder / f"{BROKEN}.png").write_bytes(b"broken")
    (folder / "train.tsv").write_text("\n".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="module")
def expected(peer, pairs):
    """Cosines by transformers from files to the end; NaN where there is no pair."""
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    model, folder, _ = peer
    prepare = CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    found = np.full(len(SIZES), np.nan)
    for number, caption in enumerate(CAPTIONS):
        if not caption or number == BROKEN:
            continue
        pixels = prepare(Image.open(pairs / f"{number}.png"), return_tensors="pt")
        ids = tokenizer(caption, truncation=True, return_tensors="pt")
        with torch.no_grad():
            made = model(input_ids=ids["input_ids"], **pixels)
        found[number] = (made.image_embeds * made.text_embeds).sum()
    return found


def test_images_are_prepared_as_transformers_does(peer, pairs):
    from transformers import CLIPImageProcessorPil

    prepare = CLIPImageProcessorPil.from_pretrained(peer[1])
    for number in range(BROKEN):
        picture = Image.open(pairs / f"{number}.png")
        wanted = prepare(picture, return_tensors="np")["pixel_values"][0]
        ours = image.normalize(image.center(image.read(pairs / f"{number}.png"), small_clip.SIDE))
        np.testing.assert_allclose(np.moveaxis(ours, -1, 0), wanted, rtol=0, atol=1e-6)


def test_texts_become_the_ids_of_transformers(peer):
    from transformers import CLIPTokenizer

    ours, length = ClipTokenizer(peer[2]), small_clip.POSITIONS
    wanted = CLIPTokenizer.from_pretrained(peer[1])(
        list(CAPTIONS), padding="max_length", truncation=True, max_length=length
    )
    found = ours.encode(CAPTIONS, length)
    assert found.dtype == np.int32 and found.tolist() == wanted["input_ids"]
    assert found[3, -1] == ours.end == small_clip.vocabulary()[small_clip.END]  # cut, and ended


def test_exactly_the_pairs_above_the_threshold_are_kept(
    peer, pairs, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(score, "PER_SHARD", 4)
    known = np.sort(expected[~np.isnan(expected)])
    least, out = float(known[1:3].mean()), tmp_path / "out"
    assert known[2] - known[1] > 1e-3
    build = dict(input=str(pairs), output=str(out), reader="table", clip=peer[2], batch=2)
    counts = similar.build(**build, threshold=least)
    np.testing.assert_allclose(np.load(out / "train_scores.npy"), expected, rtol=0, atol=1e-5)
    kept = np.flatnonzero(expected >= least)
    found = selection.examples(str(out))
    assert [one.answer for one in found] == [CAPTIONS[place] for place in kept]
    reasons = counts.pop("reasons")
    assert counts == {"records": 6, "kept": len(kept), "unknown": 2, "threshold": least}
    assert sum(reasons.values()) == 2 and any("cannot be read" in one for one in reasons)

    notes = [out / f"scores/shards/train-0000{number}.json" for number in range(2)]
    first = notes[0].stat().st_mtime_ns
    notes[1].unlink()
    asked = []
    honest = score.Scorer.__call__
    call = lambda self, *pair: asked.append(pair[1]) or honest(self, *pair)  # noqa: E731
    monkeypatch.setattr(score.Scorer, "__call__", call)
    assert similar.build(**build, threshold=-1.0)["kept"] == 4
    assert asked == [["球", ""]] and notes[0].stat().st_mtime_ns == first
    np.testing.assert_allclose(np.load(out / "train_scores.npy"), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"keeps nothing \(the most is 0\.\d+\)"):
        similar.build(**build, threshold=1.5)
    assert len(asked) == 1
    monkeypatch.setitem(preprocessing.VERSIONS, "Pillow", lambda: "1.7")
    assert similar.build(**build, threshold=-1.0)["kept"] == 4  # what is finished is there
    notes[1].unlink()
    with pytest.raises(UserError, match=r"library Pillow was \S+ .*when scoring began and is 1\.7"):
        similar.build(**build, threshold=-1.0)
    monkeypatch.undo()
    monkeypatch.setattr(score, "PER_SHARD", 4)
    assert similar.build(**build, threshold=-1.0)["kept"] == 4
    shutil.copytree(peer[1], tmp_path / "other")
    with (tmp_path / "other/tokenizer_config.json").open("a") as opened:
        opened.write("\n")
    with pytest.raises(UserError, match="scores of another CLIP or tokenizer"):
        similar.build(**build, tokenizer=str(tmp_path / "other"))


def test_beam_keeps_the_same_pairs(tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")
    monkeypatch.setattr(similar, "CHUNK", 3)
    file, values = tmp_path / "train_scores.npy", np.float32([0.45, np.nan, 0.5, 0.449, 0.9, 0, 1])
    np.save(file, values)
    by_beam = similar.alike(file, 0.45, ["--runner=DirectRunner"])
    np.testing.assert_array_equal(by_beam, [0, 2, 4, 6])
    np.testing.assert_array_equal(similar.alike(file, 0.45), by_beam)
    assert [one.name for one in tmp_path.iterdir()] == ["train_scores.npy"]


def test_other_bases_and_tokenizers_are_refused(peer, pairs, tmp_path):
    build = dict(input=str(pairs), output=str(tmp_path / "out"), reader="table")
    for wrong, message in (
        ({}, "one of --scores and --clip is needed"),
        ({"scores": "a.npy", "clip": peer[2]}, "not both"),
        ({"clip": str(pairs)}, "is no base of CLIP"),
        ({"clip": peer[2], "tokenizer": str(pairs)}, r"has no vocab\.json"),
    ):
        with pytest.raises(UserError, match=message):
            similar.build(**build, **wrong)
    other = tmp_path / "tokenizer"
    shutil.copytree(peer[1], other, ignore=lambda _, names: set(names) - set(tables.TOKENIZER))
    known = json.loads((other / "tokenizer.json").read_text("utf-8"))
    known["model"]["vocab"]["more"] = len(known["model"]["vocab"])
    (other / "tokenizer.json").write_text(json.dumps(known), "utf-8")
    with pytest.raises(UserError, match=r"its ids reach 519 and 518 ends a text, CLIP has 519"):
        score.Scorer(peer[2], str(other))
    (other / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(UserError, match="is no tokenizer of CLIP"):
        ClipTokenizer(other)
