"""Encoders and interfaces swapped in stages: they train, answer, cache, and mismatches are told."""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import small_cache
import test_flags
from absl import flags
from small_runs import make_world
from small_stage import curve

from xllm_jax.assembly import networks, parameters
from xllm_jax.assembly.system import System
from xllm_jax.configs import networks as choices
from xllm_jax.configs import sources
from xllm_jax.core import base_description, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Part, Stage
from xllm_jax.data.example import Example
from xllm_jax.feature_cache import cache_plan, write
from xllm_jax.inference.assistant import Assistant
from xllm_jax.inference.load_run import load_run
from xllm_jax.preflight import forecast, targets
from xllm_jax.training import loop

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
PAGE = Path(__file__).parents[1] / "docs" / "encoders.md"
TOWER = {"image_size": 32, "patch": 16, "width": 16, "depth": 2, "heads": 2, "hidden": 32}
WIDTHS = {"encoder_width": 16, "llm_width": 32}
WHISPER = {"width": 16, "depth": 1, "heads": 2, "hidden": 32}
SIGLIP = {
    "vision_encoder": Part("siglip.SiglipVision", "tiny", TOWER),
    "image_interface": Part("mlp_interface.MLPInterface", "tiny", {**WIDTHS, "hidden": 24}),
}
CLIP = {
    "vision_encoder": Part(
        "clip_vision.ClipVision", "tiny", {**TOWER, "unused_blocks": 1, "final_norm": False}
    ),
    "image_interface": Part(
        "perceiver.PerceiverInterface",
        "tiny",
        {**WIDTHS, "queries": 3, "width": 16, "heads": 2, "hidden": 32, "skip": 1},
    ),
}
HEARD = {"speech_encoder": Part("whisper.WhisperEncoder", "tiny", WHISPER)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("encoders"))


def image_stage(world: Path, parts: dict[str, Part], embeddings: int, **image) -> Stage:
    """What configs/stage2_image.py says, with networks of a few thousand parameters."""
    small = small_cache.data(world)
    return Stage(
        name="small_image",
        parts={**copy.deepcopy(parts), "llm": small_cache.PARTS["llm"]},
        modalities={"image": choices.MODALITIES["image"]},
        trainable=("image_interface/.*",),
        data=dataclasses.replace(
            small,
            sources={"questions": sources.WORLD["questions"]},
            items={"image": 2},
            embeddings={"image": embeddings},
            image={"size": 32, **image},
        ),
        **small_cache.common() | {"steps": 2, "save_every": 2},
    )


def siglip(world: Path) -> Stage:
    return image_stage(world, SIGLIP, 4, normalization="siglip")


def clip(world: Path) -> Stage:
    return image_stage(world, CLIP, 3)


def heard(world: Path) -> Stage:
    """Stage 2, speech, on Whisper."""
    made = small_cache.stage2_speech(world)
    data = dataclasses.replace(made.data, speech={"features": "whisper"})
    parts = made.parts | copy.deepcopy(HEARD)
    return dataclasses.replace(made, parts=parts, data=data, steps=2, save_every=2)


def clips(world: Path) -> Stage:
    """Stage 2, video, with the MLP of every frame."""
    made = siglip(world)
    made.parts["video_interface"] = made.parts.pop("image_interface")
    data = dataclasses.replace(
        made.data,
        sources={"clips": sources.WORLD["clips"]},
        items={"video": 4},
        embeddings={"video": 4},
        video={"frames": 4},
    )
    return dataclasses.replace(
        made,
        modalities={"video": choices.MODALITIES["video"]},
        trainable=("video_interface/.*",),
        data=data,
    )


def instructed(world: Path) -> Stage:
    """Stage 3 of pictures through the MLP and of frames through the resampler: adapters train."""
    made = clip(world)
    fields = {**WIDTHS, "hidden": 24, "skip": 1}
    made.parts["video_interface"] = made.parts["image_interface"]
    made.parts["image_interface"] = Part("mlp_interface.MLPInterface", "tiny", fields)
    names = ("questions", "clips")
    data = dataclasses.replace(
        made.data,
        sources={name: sources.WORLD[name] for name in names},
        items={"image": 2, "video": 4},
        embeddings={"image": 4, "video": 3},
        video={"frames": 4},
    )
    return dataclasses.replace(
        made,
        modalities={name: choices.MODALITIES[name] for name in ("image", "video")},
        trainable=("(image|video)_interface/adapter/.*",),
        data=data,
    )


STAGES = {"siglip": siglip, "clip": clip, "whisper": heard, "video": clips, "stage 3": instructed}
ENDINGS = {"image": ("*.jpg",), "video": ("*.mp4",), "speech": ("*.wav", "*.flac")}


@pytest.fixture(scope="module", params=STAGES)
def run(request, world, tmp_path_factory):
    """(the stage, the folder of its run of two steps)."""
    workdir = tmp_path_factory.mktemp(request.param)
    stage = small_cache.based(STAGES[request.param](world), workdir)
    loop.fit(stage, workdir)
    return stage, workdir


def test_a_stage_trains_and_answers(run, world):
    """Only the interface moved; an answer depends on the file."""
    stage, workdir = run
    losses = list(curve(workdir).values())
    assert len(losses) == 2 and np.isfinite(losses).all()
    trained = base_description.base_about(workdir / "final")["shapes"]
    assert {path.split("/")[0] for path in trained} == {f"{n}_interface" for n in stage.modalities}
    model = Assistant(load_run(workdir), max_tokens=3)
    for name in stage.modalities:
        media = sorted(path for ending in ENDINGS[name] for path in world.rglob(ending))
        asked = [Example("q", ((name, str(path)),), "有几个物体？") for path in media[:2]]
        assert len(model.answers(asked)) == 2
        first, second = (model.encode([one])[one.media[0]] for one in asked)
        assert np.isfinite(first.embeddings).all()
        assert not np.array_equal(first.embeddings, second.embeddings)


@pytest.mark.parametrize("run", ["siglip", "whisper"], indirect=True)
def test_a_cache_gives_the_same_losses(run, tmp_path):
    """What is frozen is computed once; nothing of the cache knows the encoder."""
    stage, workdir = run
    plan = cache_plan.make(stage, tmp_path / "cache", "configs/small.py", 50)
    assert write.run(plan, 8) is not None
    loop.fit(small_cache.changed(stage, cache=str(tmp_path / "cache")), tmp_path / "run")
    expected, found = curve(workdir), curve(tmp_path / "run")
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_video_is_read_by_frames(world):
    """The same parts as the video's: shapes of the embeddings of four frames."""
    made = clips(world)
    assert networks.model(made).frozen == {"video": 1}
    with pytest.raises(UserError, match=r"data\.image\.normalization.*reads 'siglip'"):
        networks.model(small_cache.changed(made, image={"size": 32}))


def changed(stage: Stage, part: str = "", fields: dict | None = None, **data) -> Stage:
    made = copy.deepcopy(stage)
    if part:
        made.parts[part].fields |= fields or {}
    return small_cache.changed(made, **data)


def causal(world: Path) -> Stage:
    made = siglip(world)
    made.parts["llm"] = Part("causal.Causal", "tiny", {"width": 32, "heads": 2})
    return made


MISMATCHES = {
    "family of the LLM": (
        causal,
        r"data\.llm_family: 'glm' is of another family than llm \(Causal\).*docs/llms\.md",
    ),
    "family of ChatGLM": (
        lambda w: changed(siglip(w), llm_family="causal"),
        r"data\.llm_family: 'causal' is of another family than llm \(ChatGLM\)",
    ),
    "template of another family": (
        lambda w: changed(siglip(w), template="vicuna_v1"),
        r"data\.template: 'vicuna_v1' is for Vicuna.*not for the family 'glm'\. Take .*chatglm_zh",
    ),
    "width of the encoder": (
        lambda w: changed(siglip(w), "image_interface", {"encoder_width": 24}),
        r"parts\.image_interface\.fields\.encoder_width: is 24, and vision_encoder has 16.*=16",
    ),
    "width of the LLM": (
        lambda w: changed(clip(w), "image_interface", {"llm_width": 64}),
        r"parts\.image_interface\.fields\.llm_width: is 64, and llm has 32.*=32",
    ),
    "patches of a picture": (
        lambda w: changed(siglip(w), image={"size": 40, "normalization": "siglip"}),
        r"data\.image\.size: is 40, and vision_encoder has patches of 16 pixels.*such as",
    ),
    "number of embeddings": (
        lambda w: changed(siglip(w), embeddings={"image": 24}),
        r"data\.embeddings\.image: is 24, and image_interface makes 4 of an item.*=4",
    ),
    "number of queries": (
        lambda w: changed(clip(w), "image_interface", {"queries": 5}),
        r"data\.embeddings\.image: is 3, and image_interface makes 5",
    ),
    "normalization": (
        lambda w: changed(siglip(w), image={"size": 32}),
        r"data\.image\.normalization: is 'clip', and vision_encoder \(SiglipVision\) reads",
    ),
    "normalization of CLIP": (
        lambda w: changed(clip(w), image={"size": 32, "normalization": "siglip"}),
        r"data\.image\.normalization: is 'siglip', and .*reads 'clip'",
    ),
    "filterbanks": (
        lambda w: changed(heard(w), speech={}),
        r"data\.speech\.features: is 'kaldi', and speech_encoder .* reads 'whisper'.*=whisper",
    ),
    "filterbanks of the conformer": (
        lambda w: changed(small_cache.stage2_speech(w), speech={"features": "whisper"}),
        r"data\.speech\.features: is 'whisper', and speech_encoder .* reads 'kaldi'",
    ),
    "bins": (
        lambda w: changed(heard(w), "speech_encoder", {"bins": 128}),
        r"data\.speech\.bins: is 80, and speech_encoder reads 128 bins.*bins=128",
    ),
    "window": (
        lambda w: changed(heard(w), frames=(256, 500)),
        r"data\.frames: is 500, and speech_encoder has places for 416 frames",
    ),
    "width of Whisper": (
        lambda w: changed(heard(w), "speech_interface", {"encoder_width": 32}),
        r"parts\.speech_interface\.fields\.encoder_width: is 32, and speech_encoder has 16",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_what_does_not_fit_is_told(case, world):
    make, message = MISMATCHES[case]
    with pytest.raises(UserError, match=message):
        networks.model(make(world))


@pytest.mark.parametrize("run", ["whisper"], indirect=True)
def test_an_interface_goes_on_with_the_rate_that_it_learnt_from(run, world):
    """CIF of features of 80 ms does not read those of 20 ms."""
    stage, workdir = run
    again = changed(stage, "speech_encoder", {"stride": 1})
    again.init["speech_interface"] = str(workdir)
    message = r"parts\.speech_encoder: gives a feature every 20 ms, and .* learnt from 80 ms"
    with pytest.raises(UserError, match=message):
        parameters.parameters(System.build(again, mesh.make({})))


def commands(word: str) -> list[list[str]]:
    """Arguments of the commands `xllm WORD` of the page."""
    blocks = PAGE.read_text().split("```")[1::2]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(one)[2:] for one in lines if one.startswith(f"xllm {word} ")]


def parsed(arguments: list[str]) -> Stage:
    """The stage of a command, as the command parses it."""
    with test_flags.command("train"), test_flags.fresh_stages():
        code, said = test_flags.run(arguments)
        assert code == 0, said
        return copy.deepcopy(flags.FLAGS["config"].value)


TRAIN = {arguments[1].split("/")[-1]: arguments for arguments in commands("train")}


def test_the_page_s_commands_build_at_their_real_size():
    """Every parameter has a shape and a place, and the encoders are frozen."""
    assert len(TRAIN) >= 5
    for arguments in commands("train"):
        system = System.build(parsed(arguments), mesh.make({}))
        assert rules.flatten(system.specs).keys() == system.shapes.keys()
        assert system.trainable
        assert not any("_encoder/" in path for path in system.trainable)


@pytest.mark.parametrize("name", ["stage2_image", "stage2_speech"])
def test_preflight_counts_a_step_of_them(name):
    found = forecast.make(parsed(TRAIN[name]), targets.parse("h200:8"))
    assert found.flops > 0 and found.memory.total > 0 and not found.compiled


@pytest.mark.parametrize(
    "flag, message",
    [
        ("data.image.normalisation=siglip", "no such field.*data|image.normalisation: .*no such"),
        ("data.image.normalization=imagenet", "clip.*siglip"),
        ("data.speech.features=mfcc", "kaldi.*whisper"),
        ("parts.image_interface.network=mlp_interface.Mlp", "Mlp"),
        ("parts.vision_encoder.size=so400m", "so400m"),
    ],
)
def test_a_flag_of_a_choice_that_does_not_exist_is_told(flag, message):
    with test_flags.command("train"), test_flags.fresh_stages():
        code, said = test_flags.run(["--config=stage2_image", "--workdir=w", f"--config.{flag}"])
        if not code:
            with pytest.raises(UserError, match=re.compile(message)):
                networks.model(flags.FLAGS["config"].value)
            return
    assert code == 2 and re.search(message, said) and said.count("\n") == 1
