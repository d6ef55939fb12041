"""The mini Stable Diffusion on its way: latents, training on them, the shipped folder."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_runs

from xllm_jax.assembly import networks
from xllm_jax.configs import stage_output_image, world_autoencoder, world_diffusion
from xllm_jax.convert.sources import stable_diffusion, world
from xllm_jax.core import checkpoint
from xllm_jax.core.batch import DescribedPictures
from xllm_jax.core.errors import UserError
from xllm_jax.data.batching import batch_format, scene_latents, scene_pictures, scene_rows
from xllm_jax.data.example import Example
from xllm_jax.data.record import Mode, Record
from xllm_jax.data.synthetic_world import clip_vocabulary
from xllm_jax.data.text import llm_family
from xllm_jax.feature_cache import scene_latents as writer
from xllm_jax.inference import decoder_base
from xllm_jax.inference.render import Renderer
from xllm_jax.objectives import text_to_image

SEED, COUNT, SIDE = 7, 5, 16
SMALL = {
    "vae": {"channels": (8, 8), "groups": 4, "latent_channels": 3},
    "unet": {
        "channels": (8, 16),
        "transformers": (False, True),
        "heads": (2, 2),
        "groups": 4,
        "latent_channels": 3,
        "out_channels": 3,
    },
    "text_encoder": {"depth": 1},
}


def small(config):
    """A stage of the world with small networks."""
    stage = config.get_config()
    stage.init = {}
    for name, part in stage.parts.items():
        part.fields |= SMALL[name]
    stage.data.image = {"size": SIDE}
    return stage


@pytest.fixture(scope="module")
def decoder():
    """{part: network}, {part: parameters} of the three."""
    made = {}
    for config in (world_autoencoder, world_diffusion):
        made |= networks.model(small(config)).networks
    params = {name: networks.init_params(net, jax.random.key(1)) for name, net in made.items()}
    return made, params


@pytest.fixture(scope="module")
def folder(tmp_path_factory, decoder):
    """A tokenizer and the latents of COUNT pictures; (root, scaling)."""
    root = tmp_path_factory.mktemp("bases")
    clip_vocabulary.write(root / "clip")
    made, params = decoder
    scaling = writer.write(made["vae"], params["vae"], SEED, COUNT, SIDE, root / "latents")
    return root, scaling


def latents_of(stage, root):
    """The stage's format and a batch of all pictures."""
    stage.data.root, stage.data.caption_tokenizer = str(root), str(root / "clip")
    stage.data.examples = COUNT
    form = batch_format.find(stage.data)
    records = [Record(Example(f"{SEED}-{i}"), "s", 0, i, 0) for i in range(COUNT)]
    return form, form.fill(form.plan(records, Mode()), slice(None), Mode())[0]


def test_a_batch_holds_what_the_autoencoder_gives_to_its_pictures(folder, decoder):
    root, scaling = folder
    _, batch = latents_of(small(world_diffusion), root)
    asked = [scene_rows.asked_for(f"{SEED}-{i}") for i in range(COUNT)]
    images = np.stack([scene_pictures.picture(request, SIDE) for request, _ in asked])
    made, params = decoder
    mean, logvar = made["vae"].apply({"params": params["vae"]}, images, method="encode")
    assert scaling == pytest.approx(1 / np.asarray(mean).std(), rel=1e-5)
    np.testing.assert_allclose(batch.means, mean * scaling, atol=2e-3)  # float16
    np.testing.assert_allclose(batch.deviations, np.exp(logvar / 2) * scaling, rtol=2e-3)
    tokenizer = scene_latents.ClipTokenizer(str(root / "clip"))
    said = [request.said if told else "" for request, told in asked]
    np.testing.assert_array_equal(batch.ids, tokenizer.encode(said, batch.ids.shape[1]))


@pytest.mark.parametrize("prediction", text_to_image.PREDICTIONS)
def test_the_loss_is_that_of_the_pictures(folder, decoder, prediction):
    root, scaling = folder
    stage = small(world_diffusion)
    _, batch = latents_of(stage, root)
    made, params = decoder
    whole = {**made, "vae": made["vae"].clone(scaling=scaling)}
    xllm = dataclasses.replace(networks.model(stage), networks=whole)
    images = [
        scene_pictures.picture(scene_rows.asked_for(f"{SEED}-{i}")[0], SIDE) for i in range(COUNT)
    ]
    pictures = DescribedPictures(batch.ids, np.stack(images))
    run = jax.jit(lambda b: text_to_image.loss(xllm, params, b, prediction=prediction)[0])
    assert float(run(batch)) == pytest.approx(float(run(pictures)), rel=1e-3)


def test_an_unknown_prediction_is_refused(folder):
    with pytest.raises(UserError, match="unknown prediction 'x0'"):
        text_to_image.loss(None, {}, None, prediction="x0")  # pyright: ignore


@pytest.mark.parametrize("key", [f"{SEED}-{COUNT}", f"{SEED + 1}-0"])
def test_pictures_that_the_folder_lacks_cost_their_records(folder, key):
    form, _ = latents_of(small(world_diffusion), folder[0])
    plan = form.plan([Record(Example(key), "s", 0, 0, 0)], Mode())
    assert [skipped.reason for skipped in plan.skipped] == [
        f"is not among the {COUNT} pictures of stream {SEED}"
    ]


def test_a_folder_without_latents_is_named(tmp_path):
    stage = small(world_diffusion)
    stage.data.root = str(tmp_path)
    with pytest.raises(UserError, match="holds no latents"):
        batch_format.find(stage.data).zeros(1)


def test_the_shipped_folder_gives_back_networks_and_parameters(tmp_path, folder, decoder):
    made, params = decoder
    named = {**made, "vae": made["vae"].clone(scaling=0.37)}
    schedule = stable_diffusion.DEFAULT_SCHEDULER | {"prediction_type": "v_prediction"}
    published = tmp_path / "image_decoder"
    world.export_decoder(named, params, schedule, 8, folder[0] / "clip", published)
    world.import_decoder(published, tmp_path / "base")
    base = decoder_base.look(tmp_path / "base")
    assert base.scheduler.prediction == "v_prediction"
    assert base.size == (16, 16)
    found = {"unet": base.unet, "vae": base.autoencoder, "text_encoder": base.text}
    for part, network in found.items():
        told = {f.name: getattr(named[part], f.name) for f in dataclasses.fields(network)}
        for name in told.keys() - world.NO_FIELDS:
            assert getattr(network, name) == told[name], (part, name)
    leaves = checkpoint.open_leaves(tmp_path / "base")
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    assert len(leaves) == len(flat)
    for path, leaf in flat:
        name = "/".join(key.key for key in path)
        np.testing.assert_array_equal(np.asarray(leaves[name]), np.asarray(leaf, np.float16), name)
    text = np.random.default_rng(0).normal(size=(1, 32, 96)).astype(np.float32)
    told = {"size": base.size, "steps": 2, "guidance": 1.0}
    halved = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), params)
    ours = Renderer(named["unet"], named["vae"], halved, base.scheduler, np.zeros((32, 96)))
    np.testing.assert_array_equal(base.renderer()(text, [3], **told), ours(text, [3], **told))
    index = json.loads((published / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_the_mini_llm_has_spare_ids_for_the_signals_of_the_miniature(tmp_path):
    world.import_llm(small_runs.TOKENIZER, tmp_path / "llm")
    stage = stage_output_image.get_config("tiny")
    stage.data.tokenizer = str(tmp_path / "llm")
    family = llm_family.load(stage.data)
    signals = stage.data.signals["image"]
    assert {*range(signals.first, signals.first + signals.count)} <= {*family.spare}
