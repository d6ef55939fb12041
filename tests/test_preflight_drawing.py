"""The account of a picture: FLOPs as others counted them, memory, mistakes; meshes draw alike."""

from __future__ import annotations

import collections
import importlib
import json
import sys
from pathlib import Path

import forked
import jax
import jax.numpy as jnp
import pytest
import small_outputs
import virtual_devices

from xllm_jax.assembly.system import System
from xllm_jax.core import mesh
from xllm_jax.core.errors import UserError
from xllm_jax.preflight import drawing, targets

HERE = Path(__file__).parent


def real():
    return importlib.import_module("xllm_jax.configs.stage_output_image").get_config("real")


@pytest.fixture(scope="module")
def found():
    """Stable Diffusion 1.5 on a v5e-16, without any base."""
    return drawing.forecast(real(), targets.parse("v5e-16"))


def test_flops_are_those_that_pytorch_counted(found):
    """torch's counter, 512 pixels, both outputs of guidance: 1.61 TFLOP a call, 82 for the 51
    calls of 50 steps, and 2.5 for the decoder (printed to that many digits)."""
    assert found.calls == 51 and found.size == (512, 512)
    assert found.call / 1e12 == pytest.approx(1.61, abs=0.006)
    assert found.call * 51 / 1e12 == pytest.approx(82, abs=0.5)
    assert found.decode / 1e12 == pytest.approx(2.5, abs=0.05)


def test_memory_and_seconds_follow(found):
    held = 859_520_964 + 49_490_199  # UNet, and the autoencoder's decoder with its product
    assert found.whole == 2 * held
    assert found.whole / 16 <= found.parameters < 1.2 * found.whole / 16
    assert found.seconds == pytest.approx(found.flops / 197e12)
    assert found.fits and "fits" in "\n".join(drawing.text(found))
    scores = 2 * 8 * 64**4 * 2  # both outputs, heads, places squared, bfloat16
    assert found.live > scores


def test_stable_diffusion_2_is_two_flags_away():
    """Those of docs/outputs.md: the stage's networks fit each other; pictures are larger."""
    page = (HERE.parent / "docs" / "outputs.md").read_text("utf-8")
    given = ("text_encoder.size=open_clip_vit_h_14", "image_projection.size=stable_diffusion_2")
    assert all(f"--config.parts.{flag}" in page for flag in given)
    stage = real()
    for flag in given:
        part, _, size = flag.partition(".size=")
        stage.parts[part].size = size
    system = System.build(stage, mesh.make({}, jax.devices()[:1]))
    sizes = collections.Counter()
    for path, leaf in system.shapes.items():
        sizes[path.partition("/")[0]] += leaf.size
    assert sizes["text_encoder"] == 340_387_840
    # The last product and its bias are a third wider than those beside Stable Diffusion 1.5.
    assert sizes["image_projection"] == 31_958_784 + 256 * (512 + 1)
    wide = drawing.forecast(stage, targets.parse("v5e-16"))
    assert wide.size == (768, 768) and wide.whole == 2 * (865_910_724 + 49_490_199)


def test_results_that_are_alive_are_counted():
    """By hand: two results are alive while the third is made, and an argument is not counted."""

    def program(x):
        a = jnp.outer(x, x)
        b = jnp.sin(a)
        return (a @ b).sum()

    jaxpr = jax.make_jaxpr(program)(jnp.zeros(16)).jaxpr
    assert 3 * 16 * 16 * 4 <= drawing.alive(jaxpr) <= 3 * 16 * 16 * 4 + 200


def test_what_cannot_be_drawn_is_one_line(tmp_path):
    stage, target = real(), targets.parse("v5e-16")
    with pytest.raises(UserError) as error:
        drawing.forecast(stage, target, "audio")
    assert error.value.field == "outputs"
    with pytest.raises(UserError) as error:
        drawing.forecast(stage, target, size=(500, 512))
    assert error.value.field == "--size"
    with pytest.raises(UserError) as error:
        drawing.of_stage(small_outputs.stage(tmp_path), "image")  # no decoder has 12 numbers
    assert error.value.field == "outputs.image.decoder"


def test_pictures_of_a_mesh_are_those_of_one_device():
    code = "import runpy; runpy.run_path('drawing_mesh_check.py', run_name='__main__')"
    done = forked.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        env=virtual_devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert made.pop("sharded") < 0.25
    assert len(made) == 3
    for latents, pictures in made.values():
        assert latents < 1e-4 and pictures <= 1
