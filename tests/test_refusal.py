"""What the TPU compiler says of programs that do not fit, and what the preflight makes of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from xllm_jax.configs import stage2_image
from xllm_jax.preflight import forecast, memory, refusal, report, targets

GIB = 2**30
# Recorded: stage 2, image, at the real size for v5e:1x1.
EARLY = """\
RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required \
for HLO temporaries (23.08G) exceeds available HBM (15.75G). HLO module: jit_step.
See https://openxla.org/xla/errors/error_1000 for more details."""
# The other message, as public bug reports begin.
LATE = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used \
17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."""


@pytest.mark.parametrize(("message", "total"), [(EARLY, 23.08), (LATE, 17.5)])
def test_what_was_wanted_and_what_there_is(message, total):
    assert refusal.read(message) == refusal.Refusal(int(total * GIB), int(15.75 * GIB))


def test_other_errors_are_none_of_this():
    assert refusal.read("INVALID_ARGUMENT: cannot split 3 by 2") is None


@pytest.fixture(scope="module")
def lowered():
    stage, target = stage2_image.get_config("tiny"), targets.parse("v5e:1x1")
    made = forecast.prepare(stage, target, compiles=False)
    return made, forecast.uncompiled(stage, target, made)


def test_the_page_blames_what_autodiff_keeps(lowered):
    made = forecast.from_refusal(refusal.read(EARLY), *lowered, seconds=1.0)
    assert not made.fits and made.memory.total == int(23.08 * GIB)
    page = report.text(made, None, None)
    assert "23.08 of 15.75: DOES NOT FIT" in page
    assert "the compiler wants 23.08 GiB a chip, 7.33 too many" in page
    data = made.stage.data
    hidden = f"kept float32[5,{data.rows},{data.length},512] jvp(ChatGLM)/layers/feed_forward"
    assert hidden in page and "parameter llm/layers" in page


def test_what_is_kept_has_the_name_of_its_layer():
    weights = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    x = jax.ShapeDtypeStruct((3, 16), jnp.float32)

    def loss(params, x, key):
        def layer(x, w):
            with jax.named_scope("layer"):
                return jnp.sin(x @ w), None

        return jax.lax.scan(layer, x, params["w"])[0].sum(), {}

    key = jax.eval_shape(lambda: jax.random.key(0))
    found = memory.kept(loss, {"w": weights}, {}, x, key)
    inputs_and_slopes = 2 * 5 * 3 * 16 * 4  # of every layer: its input, and the cosine
    assert memory.residuals(found) == inputs_and_slopes
    names = [name for name, _ in memory.largest_kept(found, chips=1, count=2)]
    assert all(name.startswith("float32[5,3,16]") for name in names)
    assert any("layer" in name for name in names)
