"""The denoising loss of alignment: by hand, whom its gradient reaches, pictures that lack."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_outputs
from PIL import Image

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Part
from xllm_jax.data.batching import batch_format
from xllm_jax.data.example import Example
from xllm_jax.data.record import Mode, Record
from xllm_jax.inference import load_run
from xllm_jax.models.outputs import schedulers
from xllm_jax.objectives import align, denoising
from xllm_jax.training import loop
from xllm_jax.training.trainer import normalizers, stage_loss

SIDE, FACTOR = 8, 0.25
UNET = dict(channels=(8,), transformers=(True,), heads=(2,), depth=1, groups=4)
AUTOENCODER = dict(channels=(4, 4), depth=1, groups=2, scaling=0.5)


def stage_of(folder, **changes):
    """The small stage with a diffusion model beside it."""
    options = {"denoising": FACTOR} | changes.pop("options", {})
    made = small_outputs.stage(folder, options=options, **changes)
    made.parts |= {
        "unet": Part("outputs.unet.UNet", "tiny", UNET | {"text_width": 12}),
        "autoencoder": Part("outputs.autoencoder.Autoencoder", "tiny", dict(AUTOENCODER)),
    }
    output = made.outputs["image"]
    output.unet, output.autoencoder = "unet", "autoencoder"
    output.schedule = "stable_diffusion_2_1"
    made.data.signals["image"].pixels = SIDE
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captions whose pictures are there."""
    made = tmp_path_factory.mktemp("denoising")
    small_outputs.captions(made / "captions")
    rng = np.random.default_rng(0)
    for number in range(len(small_outputs.CAPTIONS) * 4):
        pixels = rng.integers(0, 256, (9, 14, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(made / "captions" / f"{number}.jpg", format="PNG")
    return made


@pytest.fixture(scope="module")
def made(folder):
    return stage_of(folder)


@pytest.fixture(scope="module")
def system(made):
    return System.build(made, mesh.make({}))


@pytest.fixture(scope="module")
def params(system):
    """Drawn, with a UNet whose last convolution is not near zero."""
    return parameters.parameters(system)


@pytest.fixture(scope="module")
def batch(made, folder):
    return batch_of(made.data, examples(folder))


def examples(folder):
    shown = [str(folder / "captions" / f"{number}.jpg") for number in range(3)]
    asked = dict(instruction="请画图", task="draw")
    two = (("image", "红色的圆"), ("image", "蓝色的方块"))
    return [
        Example("two", answer="<image>和<image>", outputs=two, pictures=tuple(shown[:2]), **asked),
        Example("one", answer="<image>", outputs=two[:1], pictures=(shown[2],), **asked),
        Example("unseen", answer="<image>", outputs=two[1:], **asked),
    ]


def batch_of(data, records):
    format_ = batch_format.find(data)
    plan = format_.plan([Record(one) for one in records], Mode())
    made, skipped = format_.fill(plan, slice(0, None), Mode())
    assert not [*plan.skipped, *skipped]
    return made


def test_pictures_come_beside_their_runs(folder, batch):
    table = batch.signals["image"]
    assert table.weights.sum() == 4 and table.shown.sum() == 3
    found = [table.pictures[row, place] for row, place in np.argwhere(table.shown > 0)]
    wanted = []
    for number in range(3):
        picture = Image.open(folder / "captions" / f"{number}.jpg")
        width = int(SIDE * picture.width / picture.height)
        left = (width - SIDE) // 2
        squashed = picture.resize((width, SIDE), Image.Resampling.BICUBIC)
        wanted.append(np.asarray(squashed.crop((left, 0, left + SIDE, SIDE))))
    for picture in wanted:
        assert any(np.array_equal(picture, one) for one in found)


def by_hand(system, params, batch, key, gamma):
    """The errors of all places in NumPy float64, around the networks' outputs."""
    model, table = system.model, batch.signals["image"]
    lengths = {"image": align.places(table, small_outputs.COUNT)}
    _, readings = model.read(params, batch, lengths)
    text = np.asarray(model.project(params, "image", readings["image"], small_outputs.COUNT))
    text = text.reshape(-1, *text.shape[2:])
    pictures = table.pictures.reshape(-1, SIDE, SIDE, 3) / 127.5 - 1
    encoded = model.apply(params, "autoencoder", pictures.astype(np.float32), method="encode")
    roots = np.linspace(0.00085**0.5, 0.012**0.5, 1000)
    kept = np.cumprod(1 - roots**2)
    schedule = schedulers.Scheduler(**schedulers.SIZES["stable_diffusion_2_1"])
    drawn = denoising.draws(schedule, *encoded, AUTOENCODER["scaling"], key)
    latents, noise = (np.asarray(x, np.float64) for x in drawn[:2])
    share = kept[np.asarray(drawn.times)][:, None, None, None]
    seen = np.sqrt(share) * latents + np.sqrt(1 - share) * noise
    wanted = np.sqrt(share) * noise - np.sqrt(1 - share) * latents  # v
    output = model.apply(params, "unet", seen.astype(np.float32), drawn.times, text)
    errors = ((np.asarray(output, np.float64) - wanted) ** 2).mean((1, 2, 3))
    ratio = (share / (1 - share)).reshape(-1)
    weights = np.minimum(ratio, gamma) / (ratio + 1)
    shown = table.shown.reshape(-1) > 0
    return (errors * weights)[shown].mean(), errors[shown].mean()


def test_what_the_frozen_unet_misses_and_whom_its_gradient_reaches(folder, system, params, batch):
    gamma = 0.5  # below the ratio of many times, and above that of many
    options = {"gamma": gamma, "scale": 0.0}
    changed = dataclasses.replace(system, stage=stage_of(folder, options=options))
    trainable, frozen = rules.split(system.stage.trainable, params)
    loss, key = stage_loss(changed), jax.random.key(3)

    def term(trainable):
        value, metrics = loss(rules.join(trainable, frozen), batch, key)
        return metrics["terms"]["pictures"].mean, (value, metrics)

    gradient, (value, metrics) = jax.jit(jax.grad(term, has_aux=True))(trainable)
    weighed, plain = by_hand(system, params, batch, jax.random.fold_in(key, align.NOISE), gamma)
    np.testing.assert_allclose(metrics["terms"]["pictures"].mean, FACTOR * weighed, rtol=2e-5)
    np.testing.assert_allclose(metrics["noise_error/image"].mean, plain, rtol=2e-5)
    rest = metrics["terms"]["tokens"].mean
    np.testing.assert_allclose(value, rest + FACTOR * weighed, rtol=2e-5)
    assert tuple(metrics["terms"]) == normalizers(changed.stage) == ("pictures", "runs", "tokens")
    found = rules.flatten(gradient)
    assert {path.split("/")[0] for path in found} == {"signal_tokens", "image_projection"}
    for path, leaf in found.items():
        head = path == "signal_tokens/image_head"  # scores alone read it
        assert (np.abs(leaf).max() > 0) == (not head), path


def test_without_the_option_nothing_is_asked_of_the_unet(folder, system, params, batch):
    plain = dataclasses.replace(system, stage=stage_of(folder, options={"denoising": 0.0}))
    arguments = (params, batch, jax.random.key(0))
    _, metrics = jax.eval_shape(stage_loss(plain), *arguments)
    assert tuple(metrics["terms"]) == ("runs", "tokens") and "noise_error/image" not in metrics
    text = str(jax.make_jaxpr(stage_loss(plain))(*arguments))
    assert "UNet" not in text and "conv_general" not in text
    assert "conv_general" in str(jax.make_jaxpr(stage_loss(system))(*arguments))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    stage = stage_of(folder, steps=1)
    stage.optimizer.accumulation = 2  # a gradient of each of three terms
    loop.fit(stage, workdir)
    return workdir


def test_a_run_trains_and_answers_without_the_diffusion_model(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("noise_error/image", 0) > 0 for line in lines)
    restored = load_run.load_run(trained)
    assert not {"unet", "autoencoder", "text_encoder"} & restored.params.keys()
    assert not restored.model.denoisers


def test_a_picture_that_cannot_be_read_costs_one_example(folder, made):
    broken = folder / "broken.jpg"
    broken.write_bytes(b"no picture")
    one, two = examples(folder)[:2]
    bad = dataclasses.replace(two, pictures=(str(broken),))
    format_ = batch_format.find(made.data)
    plan = format_.plan([Record(one), Record(bad)], Mode())
    batch, skipped = format_.fill(plan, slice(0, None), Mode())
    assert [(s.key, s.bad, s.file) for s in skipped] == [("one", True, str(broken))]
    assert batch.signals["image"].shown.sum() == 2 == batch.signals["image"].weights.sum()


def no_pixels(stage):
    stage.data.signals["image"].pixels = 0


def odd_pixels(stage):
    stage.data.signals["image"].pixels = 9


def no_networks(stage):
    stage.outputs["image"].unet = stage.outputs["image"].autoencoder = ""


def half_of_them(stage):
    stage.outputs["image"].autoencoder = ""


def another_text(stage):
    stage.parts["unet"].fields["text_width"] = 10


def unknown_schedule(stage):
    stage.outputs["image"].schedule = "stable_diffusion_9"


def no_schedule(stage):
    stage.outputs["image"].schedule = ""


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (no_pixels, "data.signals.image.pixels"),
        (odd_pixels, "data.signals.image.pixels"),
        (no_networks, "options.denoising"),
        (half_of_them, "outputs.image.autoencoder"),
        (another_text, "parts.unet.fields.text_width"),
        (unknown_schedule, "outputs.image.schedule"),
        (no_schedule, "outputs.image.schedule"),
    ],
)
def test_settings_at_odds(folder, change, field):
    stage = stage_of(folder)
    change(stage)
    with pytest.raises(UserError) as error:
        stage_loss(System.build(stage, mesh.make({})))
    assert error.value.field == field
    assert error.value.hint and "\n" not in str(error.value)


def test_the_schedule_of_the_decoders_base_is_read(folder, tmp_path):
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    told = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    told |= {"prediction_type": "v_prediction", "beta_end": 0.03}
    file.write_text(json.dumps(told))
    stage = stage_of(folder)
    stage.outputs["image"].schedule, stage.outputs["image"].decoder = "", str(tmp_path)
    found = align.prepared(stage)["schedules"]["image"]
    assert (found.prediction, found.beta_end) == ("v_prediction", 0.03)
