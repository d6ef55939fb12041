"""Speech that comes as CIF features: `.npy` files instead of sounds, up to the batch."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import soundfile
from small_cache import PARTS
from small_stage import TOKENIZER

from xllm_jax.assembly.networks import model as assemble
from xllm_jax.assembly.networks import shapes
from xllm_jax.assembly.system import System
from xllm_jax.audit import audit, page
from xllm_jax.configs import networks
from xllm_jax.core import mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source, Stage
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.media import paths
from xllm_jax.data.pipeline import Pipeline

WIDTH, MOST = 16, 6
SAID = "红色的圆"
BAD = {
    "text": b"text",
    "none": b"",
    "absent": None,
    "wide": np.zeros((4, WIDTH + 1), np.float32),
    "flat": np.zeros(WIDTH, np.float32),
    "empty": np.zeros((0, WIDTH), np.float32),
    "nan": np.full((2, WIDTH), np.nan, np.float32),
    "whole": np.zeros((2, WIDTH), np.int32),
    "object": np.asarray([{}], object),
}


def drawn(count, dtype=np.float32):
    return np.random.default_rng(count).normal(size=(count, WIDTH)).astype(dtype)


def example(path, modality="cif"):
    return Example(path.stem, ((modality, str(path)),), "听<speech>", SAID, "asr", transcript=SAID)


@pytest.fixture
def data(monkeypatch):
    """Settings whose one source has these examples."""

    def make(examples, **fields):
        monkeypatch.setattr(mixture, "read", lambda name, source, root, **_: examples)
        settings = {
            "sources": {"a": Source("list")},
            "tokenizer": str(TOKENIZER),
            "examples": len(examples),
            "rows": len(examples),
            "items": {"speech": 1},
            "embeddings": {"speech": MOST},
            "speech_features": "cif",
            "speech_width": WIDTH,
            "max_bad_share": 1.0,
            "threads": 1,
        }
        return Data(**(settings | fields))

    return make


def quarantined(data, folder):
    """(info, {key of a bad record: line}) of one epoch."""
    _, info = next(Pipeline(data, quarantine=folder / "quarantine.jsonl").iterate())
    lines = (folder / "quarantine.jsonl").read_text("utf-8").splitlines()
    return info, {line["key"]: line for line in map(json.loads, lines)}


def save(path, values):
    with path.open("wb") as file:
        np.save(file, values, allow_pickle=True)
    return path


def test_features_fill_the_slots_of_speech(tmp_path, data):
    """As many places as there are vectors, in any float; what CIF has no room for is cut."""
    counts = {"a": (3, np.float32), "b": (5, np.float16), "c": (MOST + 2, np.float64)}
    made = {name: save(tmp_path / f"{name}.npy", drawn(*how)) for name, how in counts.items()}
    carried = paths.Carried("shards/d.npy", made["a"].read_bytes())
    rows = [*map(example, made.values()), dataclasses.replace(example(made["a"]), key="d")]
    rows[-1] = dataclasses.replace(rows[-1], media=(("cif", carried),))
    batch, info = next(Pipeline(data(rows, frames=(64, 128))).iterate())
    speech = batch.media["speech"]
    assert speech.values.shape == (4, 1, MOST, WIDTH) and sorted(info["keys"]) == list("abcd")
    for row, key in enumerate(info["keys"]):
        count, dtype = counts.get(key, counts["a"])
        kept = min(count, MOST)
        expected = np.zeros((MOST, WIDTH), np.float32)
        expected[:kept] = drawn(count, dtype)[:kept]
        np.testing.assert_array_equal(speech.values[row, 0], expected)
        assert speech.lengths[row, 0] == speech.counts[row, 0] == kept
        places = speech.index[row]
        np.testing.assert_array_equal(places[places >= 0], np.arange(kept))
    assert info["padding"]["speech"] == (3 + 5 + MOST + 3, 4 * MOST)


def test_bad_features_are_quarantined_by_name(tmp_path, data):
    good = save(tmp_path / "good.npy", drawn(4))
    for name, content in BAD.items():
        if isinstance(content, bytes):
            (tmp_path / f"{name}.npy").write_bytes(content)
        elif content is not None:
            save(tmp_path / f"{name}.npy", content)
    cut = tmp_path / "cut.npy"
    cut.write_bytes(good.read_bytes()[:-1])
    soundfile.write(tmp_path / "sound.wav", np.zeros(8000), 16000)
    rows = [example(tmp_path / f"{name}.npy") for name in (*BAD, "cut", "good")]
    rows.append(example(tmp_path / "sound.wav", "speech"))
    info, bad = quarantined(data(rows), tmp_path)
    assert info["keys"] == ["good"] and bad.keys() == {*BAD, "cut", "sound"}
    for name, line in bad.items():
        ending = "wav" if name == "sound" else "npy"
        assert line["file"] == str(tmp_path / f"{name}.{ending}")
    assert bad["wide"]["reason"] == f"has the shape (4, {WIDTH + 1}), not (tokens, {WIDTH})"
    assert bad["empty"]["reason"] == "holds no token"
    assert "cannot be read as features" in bad["sound"]["reason"]


def test_features_need_the_setting_that_reads_them(tmp_path, data):
    rows = [example(save(tmp_path / "a.npy", drawn(3)))] * 2
    info, bad = quarantined(data(rows, speech_features=""), tmp_path)
    assert not info["keys"] and "--config.data.speech_features=cif" in bad["a"]["reason"]
    for fields, field in (
        ({"speech_features": "mel"}, "data.speech_features"),
        ({"speech": {"specaugment": True}}, "data.speech.specaugment"),
        ({"speech": {"vtlp": 0.1}}, "data.speech.vtlp"),
        ({"batch_format": "transcription"}, "data.speech_features"),
    ):
        with pytest.raises(UserError) as caught:
            Pipeline(data(rows, **fields))
        assert caught.value.field == field


def test_the_audit_shows_what_there_is(tmp_path, data):
    rows = [example(save(tmp_path / f"{n}.npy", drawn(n))) for n in (3, 5)]
    found = audit(Stage(name="small", data=data(rows)), samples=2)
    written = page.render(found)
    assert "CIF features, 3 vectors: 3.npy" in written and "5 vectors: 5.npy" in written
    assert "<audio" not in written and "spectrogram" not in written.split("samples</h2>")[1]
    assert found.counts.lengths["speech"][:2] in ([3, 5], [5, 3])
    slots = {said for sample in found.samples for kind, said in sample.pieces if kind == "slot"}
    assert slots == {"speech × 3", "speech × 5"}


def test_what_made_the_features_is_no_part_of_the_stage(data):
    stage = Stage(
        parts={name: PARTS[name] for name in ("speech_encoder", "speech_interface", "llm")},
        modalities={"speech": networks.MODALITIES["speech"]},
        trainable=(r"speech_interface/(?!cif/).*",),
        data=data([]),
    )
    model = assemble(stage)
    system = System(stage, model, mesh.make({}))
    assert model.cached == model.given == {"speech": 2} == system.uncached.model.cached
    leaves = rules.flatten(shapes(model)).keys()
    assert {path.split("/")[0] for path in leaves} == {"speech_interface", "llm"}
    assert not any("cif" in path for path in leaves)
    for changed, field in (
        (dataclasses.replace(stage, trainable=(r"speech_interface/.*",)), "trainable"),
        (dataclasses.replace(stage, data=data([], speech_width=512)), "data.speech_width"),
    ):
        with pytest.raises(UserError) as caught:
            assemble(changed)
        assert caught.value.field == field
