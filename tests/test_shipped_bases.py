"""The miniature's stages and the backbones that ship for them are of one make."""

import importlib
from pathlib import Path

import pytest

from xllm_jax.assembly import parameters
from xllm_jax.assembly.networks import model
from xllm_jax.assembly.system import System
from xllm_jax.configs import networks, world_blip2, world_vision
from xllm_jax.convert.sources import world
from xllm_jax.core import base_description, mesh
from xllm_jax.core.errors import UserError
from xllm_jax.data.synthetic_world import build

SHIPPED = Path(build.__file__).parent / "backbones"
STAGES = (
    "stage2_image",
    "stage2_video",
    "stage2_speech",
    "stage3_instruction",
    "stage_output_image",
    "stage_output_denoising",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the bases that `xllm build-backbones` writes, but for BERT's."""
    root = tmp_path_factory.mktemp("demo")
    vision = model(world_vision.get_config()).networks["vision_encoder"]
    interface = model(world_blip2.get_config()).networks["image_interface"]
    world.import_llm(SHIPPED / "llm", root / "bases/llm")
    world.import_vision(vision, SHIPPED / "vision_encoder", root / "bases/vision_encoder")
    world.import_blip2(interface, SHIPPED / "blip2_stage2", root / "bases/blip2_stage2")
    world.import_decoder(SHIPPED / "image_decoder", root / networks.DECODER)
    return root


@pytest.mark.parametrize("name", STAGES)
def test_a_tiny_stage_takes_what_ships(name, root, monkeypatch):
    """No field that a base was made for has another value, and every leaf has its shape."""
    monkeypatch.chdir(root)
    stage = importlib.import_module(f"xllm_jax.configs.{name}").get_config("tiny")
    system = System.build(stage, mesh.make({}))
    known = [name for name, source in stage.init.items() if (root / place(source)).is_dir()]
    assert "llm" in known
    for prefix in known:
        source = stage.init[prefix]
        parameters.check_fields(system.model.networks, source, prefix)
        folder, inner = parameters.origin(source, prefix)
        held = base_description.base_about(folder)["shapes"]
        wanted = parameters.below(prefix, system.shapes)
        for path, leaf in wanted.items():
            assert held[inner + path[len(prefix) :]][0] == list(leaf.shape), path


def place(source: str) -> str:
    """The folder of a row of `init`."""
    return source.removesuffix("*").partition(":")[0] or "nowhere"


def test_another_scaling_is_refused(root, monkeypatch):
    """What the check above would find."""
    monkeypatch.chdir(root)
    stage = importlib.import_module("xllm_jax.configs.stage_output_denoising").get_config("tiny")
    stage.parts["autoencoder"] = networks.autoencoder("tiny")
    source = stage.init["autoencoder"]
    with pytest.raises(UserError, match="scaling"):
        parameters.check_fields(model(stage).networks, source, "autoencoder")
