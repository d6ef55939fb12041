"""Configurations, schedulers and tokenizers of a stranger: taken, or refused in one line."""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
from pathlib import Path

import hostile
import pytest
import sentencepiece
import tokenizers
from conftest import GOLDEN

import xllm_jax
from xllm_jax.convert import conversion_record, files, run_export, run_import
from xllm_jax.convert.sources import llama_config
from xllm_jax.core import base_description, damage, limits
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.text import causal_tokenizer, clip_tokenizer, llm_family
from xllm_jax.inference import decoder_base, render
from xllm_jax.models.outputs import scheduler_config

SHIPPED = Path(xllm_jax.__file__).parent / "data/synthetic_world/backbones/llm"
PIPELINE = GOLDEN / "diffusion/sd"
SCALED = {"factor": 8.0, "original_max_position_embeddings": 64}
LLAMA = dict(
    model_type="llama",
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    intermediate_size=128,
    vocab_size=100,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling={"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | SCALED,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    attention_bias=False,
)
LLMS = {
    "llama": LLAMA,
    "glm4": LLAMA | dict(model_type="glm4", partial_rotary_factor=0.5, rope_scaling=None),
    "qwen3": LLAMA
    | dict(model_type="qwen3", rope_scaling={"type": "yarn"} | SCALED, layer_types=[]),
}
SCHEDULER = dict(
    _class_name="PNDMScheduler",
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    trained_betas=None,
    prediction_type="epsilon",
    timestep_spacing="leading",
    steps_offset=1,
    skip_prk_steps=True,
    set_alpha_to_one=False,
    clip_sample=False,
    clip_sample_range=1.0,
    use_karras_sigmas=False,
)


class Folder(dict):
    """Of a checkpoint, its config.json alone."""

    def __init__(self, told):
        super().__init__()
        self.config = lambda: told

    def config_file(self):
        return Path("config.json")


def described(told) -> dict:
    with damage.reading("config.json"):
        found = llama_config.read(Folder(told))
        assert found is not None
        options = llama_config.fields(found)
        limits.check_network(options, "config.json")
    return options


@pytest.mark.parametrize("family", LLMS)
def test_any_configuration_of_a_decoder(family):
    good, rng, found = json.dumps(LLMS[family]), random.Random(family), []
    assert described(json.loads(good))["depth"] == 2
    for _, told in hostile.values(good, rng, 300):
        found.append(hostile.outcome(functools.partial(described, told)))
    assert found.count("refused") > 100 and found.count("taken") > 50


@pytest.mark.parametrize("theta", [0, -1.0, float("nan"), float("inf"), 10**400])
def test_rotary_positions_that_are_no_numbers(theta):
    """Before, the network was made, and gave NaN."""
    for family in LLMS:
        with pytest.raises(UserError):
            described(LLMS[family] | {"rope_theta": theta})


def way(told, name):
    return scheduler_config.parse(told, name).table(10)


@pytest.mark.parametrize("name", ["", *scheduler_config.KINDS])
def test_any_configuration_of_a_scheduler(name):
    good, rng, found = json.dumps(SCHEDULER), random.Random(name), []
    for _, told in hostile.values(good, rng, 200):
        found.append(hostile.outcome(functools.partial(way, told, name)))
    assert found.count("refused") > 50 and found.count("taken") > 30


def test_any_file_of_a_pipeline(tmp_path):
    """Each network's config.json, and the index."""
    folder = shutil.copytree(PIPELINE, tmp_path / "sd")
    module, rng = run_import.source_named("stable_diffusion"), random.Random(0)

    def options():
        with damage.reading(folder):
            limits.check_network(module.options(files.open_checkpoint(folder), ""), str(folder))

    for name in ("model_index.json", *module.CONFIGS):
        found = hostile.try_file(folder / name, options, rng, 40)
        assert "refused" in found and "taken" in found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "base"
    run_import.run_import("stable_diffusion", PIPELINE, folder)
    return folder


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def test_any_record_of_a_decoder(copy, monkeypatch):
    monkeypatch.setattr(decoder_base, "shapes_of", lambda part, network: {})  # seconds of tracing
    rng = random.Random(0)

    def look():
        found = decoder_base.look(copy)
        found.scheduler.table(10)
        render.check_size(found.size, found.autoencoder.factor)
        base_description.base_origin(copy)
        base_description.base_fields(copy, "unet")

    for name in (decoder_base.SCHEDULER, decoder_base.SIDE, base_description.CONVERSION):
        assert "refused" in hostile.try_file(copy / name, look, rng, 80)


def edit(file: Path, change) -> None:
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


LARGE = {
    "layers": ("text_encoder", "depth", 10**6),
    "blocks": ("unet", "depth", 10**9),
    "width": ("text_encoder", "width", 10**30),
    "negative": ("unet", "latent_channels", -4),
    "channels": ("vae", "channels", [10**30] * 4),
    "heads": ("unet", "heads", [0, 1, 1, 1]),
    "infinite": ("text_encoder", "epsilon", float("inf")),
}


@pytest.mark.parametrize("name", LARGE)
def test_sizes_that_no_network_has_are_refused_before_it_is_made(name, copy):
    """By whoever draws with a base, and by an export, each of which makes a row of a layer."""
    part, field, value = LARGE[name]
    change = lambda told: told["options"][part]["fields"].update({field: value})  # noqa: E731
    edit(copy / base_description.CONVERSION, change)
    with pytest.raises(UserError, match=f"{field}: cannot be"):
        decoder_base.look(copy)
    with pytest.raises(UserError, match=f"{field}: cannot be"):
        run_export.run_export("stable_diffusion", copy, copy.with_name("out"))
    assert not copy.with_name("out").exists()


def test_any_record_of_a_conversion(copy, monkeypatch):
    """Of a base that is to be exported."""
    monkeypatch.setattr(run_export, "Exported", lambda *given: {})
    monkeypatch.setattr(run_export.checkpoint, "open_leaves", lambda folder: {})

    def export():
        run_export.run_export("stable_diffusion", copy, copy.with_name("out"))
        shutil.rmtree(copy.with_name("out"))

    text = (copy / base_description.CONVERSION).read_text()
    told = json.loads(text) | {"rows": [], "files": [], "dropped": {}}
    told["options"] = {"alone": False, "index": told["options"]["index"]}
    (copy / base_description.CONVERSION).write_text(json.dumps(told))
    hostile.try_file(copy / base_description.CONVERSION, export, random.Random(0), 60)


def fast(folder):
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "b": 1, "?": 2, "ab": 3}, [("a", "b")], unk_token="?")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    write(folder, {"config": {"vocab_size": 20, "eos_token_id": 5}})
    write(folder, {"generation_config": {"eos_token_id": [5, 6]}})
    return "causal"


def slow(folder):
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world abc"] * 50),
        model_writer=made,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    added = {"500": {"content": "<x>"}}
    told = {"legacy": True, "add_bos_token": True, "added_tokens_decoder": added}
    write(folder, {"tokenizer_config": told, "added_tokens": {"<pad>": 501}})
    write(folder, {"config": {"vocab_size": 600, "eos_token_id": 2}})
    return "causal"


def glm(folder):
    for file in SHIPPED.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return "glm"


def write(folder, files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.mark.parametrize("make", [fast, slow, glm])
def test_any_file_of_a_tokenizer(make, tmp_path):
    family, rng = make(tmp_path), random.Random(0)

    def use():
        found = llm_family.load(Data(tokenizer=str(tmp_path), llm_family=family))
        row = found.row(found.tokenizer.encode("ab 你好")[:8], found.tokenizer.encode("ab")[:3])
        assert isinstance(found.tokenizer.decode(row.ids), str)

    for file in sorted(tmp_path.glob("*.json")):
        assert "refused" in hostile.try_file(file, use, rng, 60)
    for file in tmp_path.glob("*.model"):
        good = file.read_bytes()
        for number in range(40):
            content = bytearray(good)
            for _ in range(rng.choice((1, 5, 50))):
                content[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
            file.write_bytes(content if number else b"")
            hostile.outcome(use)


def test_any_file_of_clip_s_tokenizer(copy):
    rng = random.Random(0)

    def use():
        clip_tokenizer.ClipTokenizer(copy / decoder_base.TOKENIZER).encode(["", "a b"], 8)

    for file in sorted((copy / decoder_base.TOKENIZER).glob("*.json")):
        hostile.try_file(file, use, rng, 30)


@pytest.mark.parametrize("name", [*causal_tokenizer.FILES, "config.json"])
def test_a_hollow_file_of_a_tokenizer_is_not_read(name, tmp_path):
    family = fast(tmp_path)
    with (tmp_path / name).open("wb") as file:
        file.truncate(6 << 30)
    with pytest.raises(UserError, match="6,442,450,944 bytes, more than"):
        llm_family.load(Data(tokenizer=str(tmp_path), llm_family=family))


@pytest.mark.parametrize("ids", [-1, 10**6, 10**30, "5", [5, None]])
def test_an_end_that_is_no_id_is_refused(ids, tmp_path):
    fast(tmp_path)
    write(tmp_path, {"generation_config": {"eos_token_id": ids}})
    if ids == "5":
        assert 5 in llm_family.load(Data(tokenizer=str(tmp_path), llm_family="causal")).ends
        return
    with pytest.raises(UserError, match=str(tmp_path)):
        llm_family.load(Data(tokenizer=str(tmp_path), llm_family="causal"))


@pytest.mark.parametrize("size", ["small", "hollow"])
def test_a_file_beside_weights_that_lies_elsewhere_is_not_copied(size, tmp_path):
    """A base is published with them."""
    folder = shutil.copytree(PIPELINE, tmp_path / "sd")
    private, name = tmp_path / "private", "tokenizer/special_tokens_map.json"
    private.write_text("key")
    (folder / name).unlink(missing_ok=True)
    if size == "small":
        (folder / name).symlink_to(private)
        wrong = f"{name}: is a link to {private}"
    else:
        with (folder / name).open("wb") as file:
            file.truncate(6 << 30)
        wrong = f"{name}: has 6,442,450,944 bytes"
    with pytest.raises(UserError, match=wrong):
        run_import.run_import("stable_diffusion", folder, tmp_path / "base")
    assert not list(tmp_path.glob("base*"))


def test_files_of_hugging_face_s_cache_are_copied(tmp_path):
    """Its snapshots are links into `blobs`."""
    snapshot, blobs = tmp_path / "models--x/snapshots/abc", tmp_path / "models--x/blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(f for f in PIPELINE.rglob("*") if f.is_file())):
        shutil.copy(file, blobs / str(number))
        link = snapshot / file.relative_to(PIPELINE)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    run_import.run_import("stable_diffusion", snapshot, tmp_path / "base")
    assert conversion_record.read(tmp_path / "base")
    copied = tmp_path / "base" / decoder_base.SCHEDULER
    assert copied.read_bytes() == (PIPELINE / decoder_base.SCHEDULER).read_bytes()
    assert not copied.is_symlink()
