"""Packed kernels: their codes against float64 by hand, products, gradients and what is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_stage
from flax import linen as nn
from scipy.stats import norm
from test_convert_chatglm import quantized_release, same_bits, tensors_of, write_folder
from test_lora_training import batch_of

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.convert import files, quantize, run_export, run_import
from xllm_jax.convert.verify import chatglm_model
from xllm_jax.core import checkpoint, limits, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.lora_settings import Lora
from xllm_jax.core.stage import Part
from xllm_jax.models import glm, layers, quantized
from xllm_jax.preflight import memory
from xllm_jax.training.trainer import Trainer, stage_loss

SHAPE, LAYERS, INPUTS = (2, 4, 128, 6), 1, 2


def kernel(seed=0):
    made = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    made[0, 0, :64, 0] = 0  # a block without a scale
    return made


def test_nf4_codes_are_the_quantiles_that_qlora_tells():
    """The construction of appendix E, with bitsandbytes' offset: 8 quantiles below, 9 above."""
    offset = 0.9677083
    above, below = norm.ppf(np.linspace(offset, 0.5, 9))[:-1], norm.ppf(np.linspace(offset, 0.5, 8))
    made = np.sort([*above, 0.0, *-below[:-1]])
    np.testing.assert_allclose(quantized.NF4, made / made.max(), atol=3e-7)


def by_hand(weights, codes, block):
    """What each weight becomes: the nearest code times its block's scale, in float64."""
    flat = np.float64(weights).reshape(2, 4 * 128, 6)
    made = np.empty_like(flat)
    for start in range(0, flat.shape[1], block):
        part = flat[:, start : start + block]
        scale = np.abs(part).max(1, keepdims=True) / codes.max()
        near = np.abs(part[..., None] - scale[..., None] * codes).argmin(-1)
        made[:, start : start + block] = codes[near] * scale
    return made.reshape(weights.shape)


TABLES = {
    "int8": (np.arange(-127.0, 128), 512),
    "int4": (np.arange(-7.0, 8), 64),
    "int4_channel": (np.arange(-7.0, 8), 512),
    "nf4": (np.float64(quantized.NF4), 64),
}


@pytest.mark.parametrize("name", quantized.KINDS)
def test_a_weight_is_its_nearest_code(name):
    kind = quantized.KINDS[name]
    leaves = quantized.pack(kernel(), kind, LAYERS, INPUTS)
    ours = quantized.unpack(
        *(jnp.asarray(leaves[n]) for n in (kind.leaf, quantized.SCALE)), kind.codes, INPUTS, LAYERS
    )
    np.testing.assert_allclose(ours, by_hand(kernel(), *TABLES[name]), atol=1e-6)
    size = sum(x.nbytes for x in leaves.values())
    assert size < kernel().nbytes * {"int8": 0.26, "nf4": 0.2}.get(name, 0.2)
    wanted = quantized.shapes(kind, SHAPE, LAYERS, INPUTS)
    assert {n: x.shape for n, x in leaves.items()} == wanted


def test_two_codes_share_a_byte_the_first_in_its_high_half():
    kind = quantized.KINDS["int4"]
    made = quantized.pack(np.float32([[7.0], [-3.0]]), kind, 0, 1)
    assert made["kernel_int4"].tolist() == [[(7 << 4) | (-3 & 15)]]


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_products_and_gradients_are_those_of_the_unpacked_kernel(name):
    kind = quantized.KINDS[name]
    leaves = quantized.pack(kernel()[0], kind, 0, INPUTS)
    values, scale = jnp.asarray(leaves[kind.leaf]), jnp.asarray(leaves[quantized.SCALE])
    packed = quantized.Quantized(values, scale, kind.codes, INPUTS, jnp.float32)
    whole = by_hand(kernel(), *TABLES[name])[0]
    x = np.random.default_rng(1).normal(size=(3, 5, 4, 128)).astype(np.float32)
    y, pull = jax.vjp(lambda x: quantized.product(x, packed, INPUTS), jnp.asarray(x))
    np.testing.assert_allclose(y, np.tensordot(x, whole, 2), rtol=1e-4, atol=1e-4)
    back = np.random.default_rng(2).normal(size=y.shape).astype(np.float32)
    wanted = np.tensordot(back, whole, ((2,), (2,)))
    np.testing.assert_allclose(pull(jnp.asarray(back))[0], wanted, rtol=1e-4, atol=1e-4)


class Stack(nn.Module):
    """Scanned dense layers, nothing computed again: what autodiff keeps, it keeps."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return jnp.sin(layers.Dense(64, name="dense")(x)), None

        return layers.stack(Layer, 3, broadcast=0)(name="layers")(x)[0]


def test_the_backward_pass_keeps_packed_kernels():
    """Of a scan without recomputation no float kernel is kept, and the packed ones not twice."""
    network, x = Stack(), jnp.zeros((2, 64))
    params = jax.eval_shape(network.init, jax.random.key(0), x)["params"]
    dense = {"bias": params["layers"]["dense"]["bias"]}
    shapes = quantized.shapes(quantized.KINDS["nf4"], (3, 64, 64), 1, 1)
    dense["kernel_nf4"] = jax.ShapeDtypeStruct(shapes["kernel_nf4"], jnp.uint8)
    dense["kernel_scale"] = jax.ShapeDtypeStruct(shapes["kernel_scale"], jnp.float32)

    def loss(params, batch, key):
        made = network.apply({"params": {"layers": params["layers"]}}, params["x"])
        return made.sum(), {}

    x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kept = {}
    for name, leaves in (("float", params["layers"]["dense"]), ("packed", dense)):
        frozen = {"layers": {"dense": leaves}}
        kept[name] = memory.kept(loss, {"x": x}, frozen, {}, jax.random.key(0))
    for found in kept.values():
        assert [(shape, str(dtype)) for _, shape, dtype in found] == [((3, 2, 64), "float32")]


def small(weights, **changes):
    made = small_stage.stage(
        trainable=(), lora=Lora(rank=4, targets="llm/layers/attention/.*"), unroll=1, **changes
    )
    made.parts = {"llm": Part("glm.ChatGLM", "tiny", dict(small_stage.GLM), weights)}
    return made


def test_a_stage_trains_adapters_on_a_packed_base():
    """The loss is that of unpacked kernels, and nothing of their size is kept in floats."""
    made = small("nf4")
    system = System.build(made)
    params = rules.flatten(parameters.parameters(system))
    packed = {p: x for p, x in params.items() if quantized.is_packed(p)}
    assert len(packed) == 8 and {str(x.dtype) for x in packed.values()} == {"uint8", "float32"}
    plain = {p: x for p, x in params.items() if p not in packed}
    for path, x in packed.items():
        if path.endswith("nf4"):
            scale = packed[path.replace("kernel_nf4", "kernel_scale")]
            inputs = 2 if "attention/out" in path else 1
            plain[path.removesuffix("_nf4")] = quantized.unpack(x, scale, "nf4", inputs, 1)
    batch, loss = batch_of(made), stage_loss(system, train=False)
    value = jax.jit(lambda params: loss(params, batch, None)[0])
    found, wanted = (value(rules.unflatten(flat)) for flat in (params, plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    trainer = Trainer(system)
    like = trainer.abstract_state
    kept = memory.kept(trainer.loss, like.trainable, like.frozen, batch, jax.random.key(0))
    stacks = {plain[p].shape for p in plain if p.endswith("kernel")}
    singles = {shape[1:] for shape in stacks}
    assert not [row for row in kept if row[1] in stacks | singles]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A converted base of floats, and one of every kind that was made of it."""
    folder = tmp_path_factory.mktemp("bases")
    model = glm.ChatGLM(**{**small_stage.GLM, "hidden": 48})
    tensors = tensors_of(model, np.float32)
    write_folder(folder / "published", model, tensors, "safetensors")
    run_import.run_import("chatglm", folder / "published", folder / "floats")
    for name in ("int8", "nf4"):
        before, after = quantize.run(folder / "floats", folder / name, name)
        assert after < before
    return folder


def leaves_of(folder):
    stores = checkpoint.open_leaves(folder)
    return {path: np.asarray(store.read().result()) for path, store in stores.items()}


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_base_is_packed_leaf_by_leaf(base, name):
    """Words, norms and biases stay bit by bit, kernels are packed layer by layer."""
    floats, found, kind = leaves_of(base / "floats"), leaves_of(base / name), quantized.KINDS[name]
    for path, x in floats.items():
        if not path.endswith("/kernel"):
            np.testing.assert_array_equal(found.pop(path), x)
            continue
        place, inputs = path.removesuffix("/kernel"), 2 if "attention/out" in path else 1
        wanted = quantized.pack(x, kind, 1, inputs)
        for leaf, values in wanted.items():
            np.testing.assert_array_equal(found.pop(f"{place}/{leaf}"), values)
    assert not found
    assert (base / name / "conversion.json").exists() and (base / name / "config.json").exists()
    with pytest.raises(UserError, match="is packed already"):
        quantize.run(base / name, base / "twice", "nf4")


def test_a_stage_says_how_its_base_is_packed(base):
    made = small("nf4", init={"llm": str(base / "nf4")})
    made.parts["llm"].fields |= {"hidden": 48}
    flat = rules.flatten(parameters.parameters(System.build(made)))
    np.testing.assert_array_equal(
        flat["llm/layers/attention/qkv/kernel_nf4"],
        leaves_of(base / "nf4")["llm/layers/attention/qkv/kernel_nf4"],
    )
    for weights, folder, told in (
        ("int8", "nf4", r"holds nf4.*weights=nf4"),
        ("", "nf4", r"holds nf4.*weights=nf4"),
        ("int8", "floats", r"holds floats.*xllm quantize --weights=int8"),
    ):
        made.parts["llm"].weights, made.init = weights, {"llm": str(base / folder)}
        with pytest.raises(UserError, match=told):
            parameters.parameters(System.build(made))


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_of_a_published_release_are_used_as_they_are(bits, tmp_path):
    """The outputs are those of the dequantized release, and export gives its bytes back."""
    model = glm.ChatGLM(**small_stage.GLM | {"alpha": None})
    tensors, _ = quantized_release(model, bits, embeddings=bits == 4)
    write_folder(tmp_path / "glm", model, tensors)
    run_import.run_import("chatglm", tmp_path / "glm", tmp_path / "packed", keep_packed=True)
    run_import.run_import("chatglm", tmp_path / "glm", tmp_path / "floats")
    made, found = small("int8" if bits == 8 else "int4_channel"), {}
    made.lora, made.trainable = Lora(), ("llm/final_norm/.*",)
    made.parts["llm"].fields["alpha"] = None
    for name in ("packed", "floats"):
        made.init = {"llm": str(tmp_path / name)}
        made.parts["llm"].weights = made.parts["llm"].weights if name == "packed" else ""
        system = System.build(made)
        params, loss = parameters.parameters(system), stage_loss(system, train=False)
        found[name] = float(jax.jit(lambda p, loss=loss: loss(p, batch_of(made), None)[0])(params))
    assert abs(found["packed"] - found["floats"]) < 1e-4 * found["floats"]  # rounded to half there
    run_export.run_export("chatglm", tmp_path / "packed", tmp_path / "back")
    back = files.open_checkpoint(tmp_path / "back")
    assert set(back) == tensors.keys()
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


def test_distance_to_floats_on_the_recordings_inputs(golden):
    """Kernels are off by their codes' rounding, which this model of random weights magnifies: its
    final states are by eight times as much."""
    reference = chatglm_model.Reference(golden / "chatglm")
    model, params = reference.loaded
    with np.load(golden / "chatglm" / "cases_text.npz") as cases:
        ids = cases["gmask.input_ids"]
    layout, found, off = chatglm_model.layout_of(ids, reference.specials), {}, {}
    for name in ("", "int8", "nf4"):
        flat = rules.flatten(params)
        for path in [p for p in flat if name and p.endswith("/kernel")]:
            inputs, kernel = 2 if "attention/out" in path else 1, np.asarray(flat.pop(path))
            kind, place = quantized.KINDS[name], path.removesuffix("/kernel")
            leaves = quantized.pack(kernel, kind, 1, inputs)
            flat |= {f"{place}/{leaf}": jnp.asarray(x) for leaf, x in leaves.items()}
            back = (flat[f"{place}/{leaf}"] for leaf in (kind.leaf, quantized.SCALE))
            back = np.asarray(quantized.unpack(*back, kind.codes, inputs, 1))
            off[name, path] = np.linalg.norm(back - kernel) / np.linalg.norm(kernel)
        found[name] = np.float64(
            chatglm_model.forward(model, rules.unflatten(flat), ids, layout)[1]
        )
    far = {n: np.linalg.norm(x - found[""]) / np.linalg.norm(found[""]) for n, x in found.items()}
    most = {n: max(x for (m, _), x in off.items() if m == n) for n in ("int8", "nf4")}
    assert most["int8"] < 0.01 and most["nf4"] < 0.1, most
    assert far["int8"] < 0.1 and far["nf4"] < 0.8 and far["int8"] * 5 < far["nf4"], far


def test_a_release_of_floats_has_no_integers_to_keep(base):
    with pytest.raises(UserError, match="integers of as many bits"):
        run_import.run_import("chatglm", base / "published", base / "none", keep_packed=True)


def test_what_cannot_be_packed_is_one_line():
    with pytest.raises(UserError, match=r"parts\.llm\.weights: cannot be 'int3'"):
        limits.check(small("int3"))
    made = small("int8")
    made.trainable = ("llm/layers/feed_forward/.*",)
    with pytest.raises(UserError, match=r"trainable.*feed_forward/down/kernel_int8 is quantized"):
        _ = System.build(made).trainable
    made = small("nf4")
    made.parts["llm"].fields["hidden"] = 65
    with pytest.raises(UserError, match=r"parts\.llm\.weights.*odd number of inputs.*int8"):
        _ = System.build(made).tree
