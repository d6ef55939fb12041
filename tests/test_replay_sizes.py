"""Replays of recordings whose arrays are longer or shorter than their neighbors."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from xllm_jax.convert import verify
from xllm_jax.convert.verify import chatglm_decode, recording, speech_asr, tolerances
from xllm_jax.core.batch import TranscriptionBatch
from xllm_jax.models import cif
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import asr as objective

pytestmark = pytest.mark.golden
LONG = 17  # characters of the texts; 13 tokens fire without them, from 23 frames


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """The recorded ASR model with texts longer than what fires, computed with ample room."""
    folder = tmp_path_factory.mktemp("speech")
    for name in ("README.md", "asr_model.json"):
        shutil.copy(GOLDEN / "speech" / name, folder)
    one = recording.Replay(GOLDEN / "speech/asr_model.npz", tolerances.read(GOLDEN / "speech"))
    recorded = speech_asr.Recorded(one)
    ample = dataclasses.replace(recorded.networks["speech_interface"], max_tokens=60)
    networks = recorded.networks | {"speech_interface": ample}
    generator, end = np.random.default_rng(0), int(recorded.about["eos_idx"])
    lengths = np.array([LONG, LONG - 3, LONG - 6])
    tokens = generator.integers(4, len(recorded.about["symbols"]), (3, LONG)).astype(np.int64)
    tokens[np.arange(3), lengths - 1] = end
    tokens[np.arange(LONG) >= lengths[:, None]] = int(recorded.about["pad_idx"])
    batch = TranscriptionBatch(
        features=one.arrays["src"],
        lengths=one.arrays["src_len"],
        tokens=tokens,
        token_lengths=lengths,
    )
    outputs = jax.jit(
        lambda params: objective.forward(XLLM(networks=networks), params, batch, train=True)
    )(recorded.params)
    fired, previous = outputs.fired, np.asarray(objective.previous_tokens(tokens))
    decode = jax.jit(functools.partial(networks["asr_decoder"].apply))
    params = {"params": recorded.params["asr_decoder"]}
    kept = {k: x for k, x in one.arrays.items() if not k.startswith(("train/", "eval/decoder"))}
    width = kept["eval/cif_out"].shape[1]
    parts = objective.terms(
        outputs.logits, outputs.ctc_logits, outputs.lengths, fired.quantity, tokens, lengths
    )
    arrays = kept | {
        "target": tokens,
        "target_len": lengths,
        "prev_output_tokens": previous,
        "train/encoder_out": outputs.features,
        "train/cif_out": fired.embeddings[:, :LONG],
        "train/cif_mask": np.arange(LONG) < lengths[:, None],
        "train/quantity": fired.quantity,
        "train/decoder_logits": outputs.logits,
        "train/ctc_logits": outputs.ctc_logits,
        "train/sample_size": np.int64(parts.count),
        "train/ce_loss": parts.plain,
        "train/ctc_loss": parts.ctc,
    }
    assert np.asarray(outputs.logits).shape[1] == LONG > width
    about = recorded.about | {"grad_norms": {}, "decoding": {}}
    (folder / "asr_model.json").write_text(json.dumps(about))

    def write(decoded: int, trained: bool) -> list:
        """The recording with texts of the decoder cut, or what fired filled up, to a length."""
        embeddings = np.pad(kept["eval/cif_out"], ((0, 0), (0, decoded), (0, 0)))[:, :decoded]
        logits, _ = decode(params, previous[:, :decoded], embeddings, kept["eval/encoder_out"])
        found = {k: np.asarray(x) for k, x in (arrays | {"eval/decoder_logits": logits}).items()}
        found = {k: x for k, x in found.items() if trained or not k.startswith("train/")}
        np.savez(folder / "asr_model.npz", **found)
        (made,) = verify.recordings(folder)
        return made.replay("asr_model.npz")

    return write


def missed(rows):
    return [f"{row.array}: {row.note}" for row in rows if row.missed and row.verdict == "MISS"]


@pytest.mark.parametrize(
    ("decoded", "trained"), [(13, True), (LONG, False)], ids=["texts are cut", "tokens are added"]
)
def test_texts_may_be_longer_than_what_fires(longer, decoded, trained):
    rows = longer(decoded, trained)
    assert missed(rows) == []
    passed = {row.array for row in rows if row.verdict == "ok"}
    assert passed >= {"eval/cif_out", "eval/decoder_logits", "eval/cif_mask", "prev_output_tokens"}
    if trained:
        assert passed >= {"train/cif_out", "train/decoder_logits", "train/ctc_loss"}


@pytest.mark.parametrize("kept", ["greedy_eos", "beam_eos"])
def test_a_search_does_not_need_its_neighbor(kept, tmp_path):
    """With the other searches gone, or recorded shorter, it is compared all the same."""
    for name in ("README.md", "weights", "diagnostics.json", "tokenizer"):
        source = GOLDEN / "chatglm" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    with np.load(GOLDEN / "chatglm/cases_decode.npz") as file:
        arrays = {k: x for k, x in file.items() if k.startswith((f"{kept}.", "prompt"))}
        plain = kept.split("_")[0]
        shorter = file[f"{plain}.sequences"][:, :14]
    for beside in ({}, {f"{plain}.sequences": shorter}):
        np.savez(tmp_path / "cases_decode.npz", **arrays | beside)
        (made,) = verify.recordings(tmp_path)
        rows = {row.array: row.verdict for row in made.replay("cases_decode.npz")}
        assert rows[f"{kept}.sequences"] == "ok", rows


def test_a_cache_may_be_recorded_before_the_last_steps(tmp_path):
    for name in ("README.md", "weights", "diagnostics.json", "tokenizer"):
        source = GOLDEN / "chatglm" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    with np.load(GOLDEN / "chatglm/cases_decode.npz") as file:
        arrays = {k: x for k, x in file.items() if k.startswith(("step", "prefill", "prompt"))}
        arrays |= {f"cache.{k}": file[f"cache.{k}"][:, :15] for k in ("key", "value")}
    np.savez(tmp_path / "cases_decode.npz", **arrays)
    (made,) = verify.recordings(tmp_path)
    rows = {row.array: row.verdict for row in made.replay("cases_decode.npz")}
    assert rows["cache.key"] == rows["cache.value"] == rows["step.logits"] == "ok"


def test_rotary_tables_do_not_need_each_other(tmp_path):
    for name in ("README.md", "weights", "tokenizer"):
        source = GOLDEN / "chatglm" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    with np.load(GOLDEN / "chatglm/rotary.npz") as file:
        for left in ("cos_f32", "inv_freq_f16"):
            arrays = {k: x for k, x in file.items() if not k.endswith(left)}
            np.savez(tmp_path / "rotary.npz", **arrays)
            (made,) = verify.recordings(tmp_path)
            rows = {r.array: r.verdict for r in made.replay("rotary.npz") if r.verdict != "MISSING"}
            compared = {name for name in arrays if not name.endswith("positions")}
            assert {name: rows.get(name) for name in compared} == dict.fromkeys(compared, "ok")


def test_more_tokens_than_are_recorded_are_a_miss():
    """They would not show where both are cut to the recording's width."""
    from xllm_jax.convert.verify import speech_cif

    fired = cif.Fired(jnp.zeros((2, 9, 3)), np.array([4, 6]), jnp.zeros(2), jnp.zeros((2, 9)))
    assert speech_cif.shown(fired, 5) == 6 and speech_cif.shown(fired, 8) == 8


def test_an_answer_that_ended_early_is_filled_up_to_the_limit():
    sequences = np.array([[1, 2, 7, 9, 0]])
    expected = chatglm_decode.finished(sequences, 2, 6, 9, 0)
    np.testing.assert_array_equal(expected, [[7, 9, 0, 0, 0, 0]])
