"""Whisper's encoder and features against transformers; padding, lengths, folders in and out."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Peer

from xllm_jax.convert import export_tree, files, run_export, run_import
from xllm_jax.convert.sources import whisper as table
from xllm_jax.core import checkpoint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.example import Example
from xllm_jax.data.media import log_mel, modalities
from xllm_jax.data.record import Record
from xllm_jax.models import whisper

SMALL = dict(bins=8, width=48, depth=2, heads=3, hidden=80, positions=30)
NAMES = dict(
    bins="num_mel_bins",
    width="d_model",
    depth="encoder_layers",
    heads="encoder_attention_heads",
    hidden="encoder_ffn_dim",
    positions="max_source_positions",
)
WINDOW = 2 * SMALL["positions"]


def config(sizes: dict, **more) -> WhisperConfig:
    kept = {NAMES[name]: value for name, value in sizes.items()}
    rest = dict(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=30)
    rest |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return WhisperConfig(**kept, **(rest | more))


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    made = WhisperForConditionalGeneration._from_config(config(SMALL), attn_implementation="eager")
    with torch.no_grad():
        for leaf in made.parameters():
            leaf.add_(0.2 * torch.randn_like(leaf))
    return made.eval()


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    made = tmp_path_factory.mktemp("whisper") / "in"
    whole.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def encoder(folder, tmp_path_factory):
    """(network, its parameters) of the imported folder."""
    base = tmp_path_factory.mktemp("base") / "whisper"
    done = run_import.run_import("whisper", folder, base)
    assert done.options == {"prefix": "model.encoder.", "sizes": SMALL}
    assert done.dropped and all("decoder" in name for name in done.dropped)
    leaves = {path: np.asarray(leaf[...]) for path, leaf in checkpoint.open_leaves(base).items()}
    return whisper.WhisperEncoder(**SMALL), rules.unflatten(leaves)["speech_encoder"]


def run(model, params, values, lengths):
    return jax.jit(model.apply)({"params": params}, jnp.asarray(values), jnp.asarray(lengths))


def close(ours, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(ours, expected, atol=tolerance * np.abs(expected).max())


def utterances(frames: int, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(values in a batch with anything behind each end, as published: silence behind each end)."""
    rng, count = np.random.default_rng(0), len(lengths)
    values = rng.uniform(-0.9, 1.2, (count, frames, SMALL["bins"])).astype(np.float32)
    published = np.empty((count, WINDOW, SMALL["bins"]), np.float32)
    for row, length in enumerate(lengths):
        published[row] = max(values[row, :length].max() - 2, -1.5)
        published[row, :length] = values[row, :length]
    return values, published


def test_features_of_short_batches_are_those_of_the_whole_window(whole, encoder):
    """Whatever the batch's padding is: 60 frames make a window, the batch holds 40."""
    lengths = [40, 31, 8]
    values, published = utterances(40, lengths)
    with torch.no_grad():
        expected = whole.model.encoder(torch.tensor(published).mT).last_hidden_state.numpy()
    found, counts = run(*encoder, values, lengths)
    np.testing.assert_array_equal(counts, [20, 16, 4])
    assert found.shape == (3, 20, 48)
    for row, count in enumerate(counts):
        close(found[row, :count], expected[row, :count])
        assert not np.any(found[row, count:])


def test_gradients_are_those_of_transformers(whole, encoder):
    model, params = encoder
    values, published = utterances(WINDOW, [WINDOW])
    weights = np.random.default_rng(1).normal(size=(1, 30, 48)).astype(np.float32)
    pixels = torch.tensor(published, requires_grad=True)
    whole.zero_grad()
    (whole.model.encoder(pixels.mT).last_hidden_state * torch.tensor(weights)).sum().backward()

    def loss(params, values):
        features, _ = model.apply({"params": params}, values, jnp.asarray([WINDOW]))
        return jnp.sum(features * weights)

    ours, inputs = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(values))
    close(inputs, pixels.grad)
    peer = whole.model.encoder
    close(ours["conv_2"]["kernel"], peer.conv2.weight.grad.permute(2, 1, 0))
    close(ours["layers"]["feed_forward"]["down"]["kernel"][1].T, peer.layers[1].fc2.weight.grad)


def test_an_utterance_alone_needs_no_window(encoder):
    """Without the window it depends on its own frames only, in every batch alike."""
    model, params = encoder[0].clone(whole_window=False), encoder[1]
    values, _ = utterances(40, [24])
    alone, one = run(model, params, values[:, :24], [24])
    padded, count = run(model, params, values, [24])
    assert one[0] == count[0] == 12
    close(padded[:, :12], alone)
    assert not np.any(padded[:, 12:])
    empty, none = run(model, params, values, [0])
    assert none[0] == 0 and np.isfinite(empty).all()


def test_a_full_utterance_is_the_same_with_and_without_the_window(encoder):
    values, _ = utterances(WINDOW, [WINDOW])
    found = [
        run(encoder[0].clone(whole_window=chosen), encoder[1], values, [WINDOW])[0]
        for chosen in (True, False)
    ]
    close(found[1], found[0])


@pytest.mark.parametrize("length", [40, 33, 7])
def test_neighboring_frames_become_their_mean(encoder, length):
    """80 ms as the conformer has them; the last mean is of the frames that there are."""
    values, _ = utterances(40, [length])
    every, count = run(*encoder, values, [length])
    model = encoder[0].clone(stride=4)
    pooled, counts = run(model, encoder[1], values, [length])
    wanted = -(-int(count[0]) // 4)
    assert counts[0] == wanted and pooled.shape == (1, 5, 48) and model.reduction == 8
    for number in range(5):
        part = np.asarray(every[0, 4 * number : min(4 * number + 4, int(count[0]))], np.float64)
        close(pooled[0, number], part.mean(0) if number < wanted else np.zeros(48) + 0.0, 1e-4)


def test_more_frames_than_the_window_are_an_error(encoder):
    with pytest.raises(ValueError, match="62 frames do not fit"):
        run(*encoder, np.zeros((1, 62, 8), np.float32), [62])


def test_scan_unroll_and_remat_agree_in_both_precisions(encoder):
    model, params = encoder
    values, _ = utterances(40, [40])
    expected = np.asarray(run(model, params, values, [40])[0])
    again = run(model.clone(unroll=2, remat="all"), params, values, [40])[0]
    close(again, expected)
    half = run(model.clone(dtype=jnp.bfloat16), params, values, [40])[0]
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - expected).mean() < 0.03 * np.abs(expected).mean()


@pytest.mark.parametrize("size", [name for name in whisper.SIZES if name != "tiny"])
def test_published_sizes(size):
    """As many parameters as the torch class; each has a sharding row."""
    with torch.device("meta"):
        peer = Peer(config(whisper.SIZES[size] | {"positions": 1500}))
    model = whisper.WhisperEncoder(**whisper.SIZES[size])
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == sum(p.numel() for p in peer.parameters())
    rules.assign(whisper.SHARDING, shapes, what="whisper.SHARDING")
    if size == "whisper_large_v3":
        assert count == 636_968_960 and shapes["positions"].shape == (1500, 1280)


def test_positions_start_as_the_published_sinusoids():
    peer = Peer(config(SMALL))
    ours = whisper.sinusoids(jax.random.key(0), (30, 48))
    np.testing.assert_allclose(ours, peer.embed_positions.weight.detach(), atol=1e-5)


def test_a_folder_comes_in_and_goes_out(whole, folder, encoder, tmp_path):
    """Bit by bit, from the whole of Whisper and from the encoder alone."""
    run_import.run_import("whisper", folder, tmp_path / "base")
    run_export.run_export("whisper", tmp_path / "base", tmp_path / "out")
    back = files.open_checkpoint(tmp_path / "out")
    state = {n: x.numpy() for n, x in whole.state_dict().items() if n.startswith("model.encoder.")}
    assert set(back) == state.keys()
    assert all(np.asarray(back[name]).tobytes() == x.tobytes() for name, x in state.items())
    whole.model.encoder.save_pretrained(tmp_path / "alone")
    done = run_import.run_import("whisper", tmp_path / "alone", tmp_path / "other")
    assert done.options == {"prefix": "", "sizes": SMALL}
    made = checkpoint.open_leaves(tmp_path / "other")
    for path, leaf in rules.flatten({"speech_encoder": encoder[1]}).items():
        np.testing.assert_array_equal(made[path][...], leaf)


def test_openai_s_names_are_those_of_its_code():
    """Every tensor of its `AudioEncoder`, rebuilt here; the key has no bias."""
    names = {"encoder.positional_embedding", "encoder.ln_post.weight", "encoder.ln_post.bias"}
    names |= {f"encoder.conv{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")}
    for part in ("attn.query", "attn.value", "attn.out", "attn_ln", "mlp.0", "mlp.2", "mlp_ln"):
        names |= {f"encoder.blocks.{n}.{part}.{x}" for n in (0, 1) for x in ("weight", "bias")}
    names |= {f"encoder.blocks.{n}.attn.key.weight" for n in (0, 1)}
    made = table.rows(2, 3, source="encoder.", names=table.OPENAI)
    assert {name for row in made for name in row.names()} == names


def test_openai_s_file_gives_the_same_encoder(tmp_path):
    """A .pt of one published size, which alone tells the heads; in and out bit by bit."""
    options = {"prefix": "encoder.", "sizes": table._plain(whisper.SIZES["tiny"]), "openai": True}
    plan = table.plan(options)
    rng = np.random.default_rng(0)
    params = {
        path: rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in rules.flatten(plan.shapes).items()
    }
    tensors = export_tree(plan.table, rules.unflatten(params))
    state = {name: torch.tensor(np.ascontiguousarray(x)) for name, x in tensors.items()}
    others = {"decoder.ln.weight": torch.ones(3)}
    saved = {"dims": {"n_mels": 80}, "model_state_dict": state | others}
    torch.save(saved, tmp_path / "tiny.pt")
    done = run_import.run_import("whisper", tmp_path / "tiny.pt", tmp_path / "base")
    assert done.options == options and done.dropped.keys() == others.keys()
    made = checkpoint.open_leaves(tmp_path / "base")
    for path, leaf in params.items():
        np.testing.assert_array_equal(made[path][...], leaf)
    run_export.run_export("whisper", tmp_path / "base", tmp_path / "out")
    back = files.open_checkpoint(tmp_path / "out")
    assert set(back) == state.keys()
    assert all(np.asarray(back[name]).tobytes() == tensors[name].tobytes() for name in back)


REFUSED = {
    "another model": (dict(model_type="wav2vec2"), "model_type"),
    "bins": (dict(num_mel_bins=80), "num_mel_bins"),
    "heads": (dict(encoder_attention_heads=5), "encoder_attention_heads"),
    "scaled": (dict(scale_embedding=True), "scale_embedding"),
    "positions": (dict(max_source_positions=1500), "max_source_positions"),
    "activation": (dict(activation_function="mine"), "activation_function"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_encoder_is_not_is_refused_by_name(case, folder, tmp_path):
    changed, field = REFUSED[case]
    shutil.copytree(folder, tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=rf"config\.json: {field}: "):
        run_import.examine("whisper", tmp_path / "in")


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("samples", [3000, 35_123, 479_900, 480_000])
def test_spectrograms_are_those_of_transformers(samples, bins):
    """With double precision the same; what is behind the frames that we have is one value."""
    rng = np.random.default_rng(samples)
    sound = rng.normal(size=samples) * np.linspace(1e-4, 0.3, samples)
    sound = sound.astype(np.float32)
    peer = WhisperFeatureExtractor(feature_size=bins)
    padded = np.pad(sound, (0, 480_000 - samples))
    exact = peer._np_extract_fbank_features(padded[None], "cpu")[0].T
    ours = log_mel.log_mel(sound, bins)
    assert ours.dtype == np.float32 and len(ours) == log_mel.frames_of(samples)
    np.testing.assert_allclose(ours, exact[: len(ours)], atol=1e-6)
    if samples < 100_000:
        rest = exact[len(ours) :]
        value = whisper.silence(jnp.asarray(ours[None]), jnp.asarray([len(ours)]))[0]
        np.testing.assert_allclose(rest, np.full_like(rest, value), atol=1e-6)
    else:
        assert len(ours) == 3000


def test_single_precision_of_transformers_is_as_near_as_it_gets():
    """What its extractor gives where torch is installed."""
    sound = np.random.default_rng(0).normal(size=20_000).astype(np.float32) * 0.1
    peer = WhisperFeatureExtractor(feature_size=80)(sound, sampling_rate=16000, return_tensors="np")
    ours = log_mel.log_mel(sound, 80)
    np.testing.assert_allclose(ours, peer.input_features[0].T[: len(ours)], atol=1e-5)


def test_a_file_is_read_by_the_settings_of_the_data(tmp_path):
    """Values, lengths and length buckets; options that do not exist are refused."""
    sound = np.random.default_rng(0).normal(size=16_000).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "a.wav", sound, 16000, subtype="FLOAT")
    data = Data(frames=(101, 102, 300), items={"speech": 1}, speech={"features": "whisper"})
    example = Example("a", (("speech", str(tmp_path / "a.wav")),))
    assert log_mel.count_frames(tmp_path / "a.wav") == 102
    assert modalities.bucket(example, data, 0) == 1
    record = Record(example)
    values, lengths = modalities.load("speech", example.media[0][1], data, record, 0, False)
    assert values.shape == (1, 300, 80) and lengths[0] == 102
    np.testing.assert_allclose(values[0, :102], log_mel.log_mel(sound), atol=1e-5)
    data.speech = {"features": "mfcc"}
    with pytest.raises(UserError, match=r"data\.speech\.features.*kaldi or whisper"):
        modalities.find("speech", data)
