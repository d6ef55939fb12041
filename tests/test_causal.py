"""Causal decoders: sizes as published, and every family against its torch class in transformers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.convert import import_tree, sizes
from xllm_jax.convert.published_config import PublishedConfig
from xllm_jax.convert.sources import llama, llama_config
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import causal, rotary

torch = pytest.importorskip("torch")

PUBLISHED = {
    "vicuna_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "glm4_9b": 9_400_279_040,
}
BOUND = 1e-5
VOCAB, WIDTH = 59, 32
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    attn_implementation="eager",
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
GLM_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama_whole_heads": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR}),
    "qwen2": ("Qwen2", {}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "glm4": ("Glm4", {"head_dim": 16, "attention_bias": True, "rope_parameters": GLM_ROPE}),
}


@pytest.mark.parametrize("size", causal.SIZES)
def test_sizes_and_sharding_rows(size):
    shapes = sizes.shapes_of(causal.Causal(**causal.SIZES[size]))
    if size in PUBLISHED:
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[size]
    rules.assign(causal.SHARDING, shapes)  # total and used


@dataclasses.dataclass
class Pair:
    """One network in torch and in ours."""

    theirs: torch.nn.Module
    ours: causal.Causal
    params: dict

    @functools.cached_property
    def run(self):
        """`(ids, segments, positions, cache) -> (logits, cache)`."""

        def run(ids, segments, positions, cache=None):
            variables, context = {"params": self.params}, jnp.zeros(ids.shape, bool)
            x = self.ours.apply(variables, ids, method="embed")
            places = positions[..., None]
            states, cache = self.ours.apply(variables, x, segments, context, places, cache)
            return self.ours.apply(variables, states, method="logits"), cache

        return jax.jit(run)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    import transformers

    name, more = FAMILIES[request.param]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**(SMALL | more))
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, leaf in theirs.named_parameters():
            centre = 1.0 if leaf.ndim == 1 and "bias" not in path else 0.0
            leaf.copy_(centre + 0.2 * torch.randn_like(leaf))
    said = config.to_diff_dict() | {"model_type": config.model_type}
    values = llama_config.DEFAULTS | llama_config.KINDS[config.model_type] | said
    found = llama_config.fields(PublishedConfig(values, "config.", frozenset(said)))
    ours = llama.network(found)
    tensors = {key: leaf.numpy() for key, leaf in theirs.state_dict().items()}
    if ours.tied:
        del tensors[llama.HEAD]
    params, _ = import_tree(llama.rows(ours), tensors, sizes.shapes_of(ours))
    with jax.default_matmul_precision("highest"):
        yield Pair(theirs, ours, params)


def ids_of(*shape):
    return np.random.default_rng(5).integers(1, VOCAB, shape).astype(np.int32)


def close(ours, theirs, where=...):
    theirs = theirs.detach().numpy()
    scale = max(1.0, float(np.abs(theirs[where]).max()))
    np.testing.assert_allclose(
        np.asarray(ours)[where] / scale, theirs[where] / scale, rtol=0, atol=BOUND
    )


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_forward_and_gradients_to_the_inputs(pair, side):
    ids, mask = ids_of(3, 21), np.ones((3, 21), np.int32)
    for row, count in enumerate((0, 4, 9) if side != "none" else ()):
        mask[row, slice(0, count) if side == "left" else slice(21 - count, 21)] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0).astype(np.int32)
    weights = np.random.default_rng(6).normal(size=(3, 21, VOCAB)).astype(np.float32)
    weights *= mask[..., None]

    embedded = pair.theirs.model.embed_tokens(torch.tensor(ids)).detach().requires_grad_()
    expected = pair.theirs(
        inputs_embeds=embedded,
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions),
    ).logits
    (expected * torch.tensor(weights)).sum().backward()

    def ours(x):
        states, _ = pair.ours.apply(
            {"params": pair.params}, x, mask, np.zeros(mask.shape, bool), positions[..., None]
        )
        logits = pair.ours.apply({"params": pair.params}, states, method="logits")
        return (logits * weights).sum(), logits

    gradient, logits = jax.jit(jax.grad(ours, has_aux=True))(jnp.asarray(embedded.detach().numpy()))
    close(logits, expected, mask > 0)
    close(gradient, embedded.grad, mask > 0)


def test_given_positions(pair):
    ids = ids_of(2, 11)
    positions = np.sort(ids_of(2, 11), axis=1)
    expected = pair.theirs(torch.tensor(ids), position_ids=torch.tensor(positions)).logits
    close(pair.run(ids, np.ones_like(ids), positions)[0], expected)


def test_cached_decoding(pair):
    """A prompt, then token by token; rows of different length, which padding fills behind."""
    ids, prompts, steps = ids_of(2, 12), (7, 4), 4
    segments = np.zeros((2, 7), np.int32)
    for row, count in enumerate(prompts):
        segments[row, :count] = 1
    positions = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))
    logits, cache = pair.run(ids[:, :7], segments, positions, pair.ours.init_cache(2, 12))
    made = [[np.asarray(logits[row, count - 1])] for row, count in enumerate(prompts)]
    for step in range(steps):
        fed = np.stack([ids[row, count + step] for row, count in enumerate(prompts)])[:, None]
        place = np.asarray(prompts, np.int32)[:, None] + step
        logits, cache = pair.run(fed, np.ones_like(fed), place, cache)
        for row in range(2):
            made[row].append(np.asarray(logits[row, 0]))
    for row, count in enumerate(prompts):
        expected = pair.theirs(torch.tensor(ids[row : row + 1, : count + steps])).logits
        close(np.stack(made[row]), expected[0, count - 1 :])


def test_packed_rows_do_not_see_each_other(pair):
    ids = ids_of(1, 14)
    segments = np.asarray([[1] * 5 + [2] * 9], np.int32)
    positions = np.asarray([[*range(5), *range(9)]], np.int32)
    logits, _ = pair.run(ids, segments, positions)
    for part in (slice(0, 5), slice(5, 14)):
        close(logits[:, part], pair.theirs(torch.tensor(ids[:, part])).logits)


def test_states_between_the_layers(pair):
    ids, watched = ids_of(2, 9), np.asarray([[2, 5], [8, 0]], np.int32)
    expected = pair.theirs.model(torch.tensor(ids), output_hidden_states=True).hidden_states
    places = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))[..., None]
    rows = (np.ones_like(ids), np.zeros(ids.shape, bool), places)

    @jax.jit
    def between(ids):
        x = pair.ours.apply({"params": pair.params}, ids, method="embed")
        return pair.ours.apply({"params": pair.params}, x, *rows, watched=watched)[-1]

    seen = between(ids)
    for layer in range(pair.ours.depth):
        close(seen[layer], expected[layer][torch.arange(2)[:, None], torch.tensor(watched)])


def test_remat_changes_nothing(pair):
    ids, segments = ids_of(1, 9), np.ones((1, 9), np.int32)
    places = np.arange(9, dtype=np.int32)[None, :, None]

    def gradient(model):
        def loss(params):
            x = model.apply({"params": params}, ids, method="embed")
            states, _ = model.apply({"params": params}, x, segments, segments < 0, places)
            return jnp.square(model.apply({"params": params}, states, method="logits")).sum()

        return rules.flatten(jax.jit(jax.grad(loss))(pair.params))

    kept, again = gradient(pair.ours), gradient(pair.ours.clone(remat="all"))
    for path, leaf in kept.items():
        np.testing.assert_allclose(again[path], leaf, rtol=1e-4, atol=1e-4 * np.abs(leaf).max())


def test_bfloat16_stays_near_float32():
    """Norms and softmax stay in float32, so that the distance is that of the products alone."""
    model = causal.Causal(**causal.SIZES["tiny"])
    params = jax.jit(model.init)(jax.random.key(0), *model.example())
    ids, segments = ids_of(2, 16), np.ones((2, 16), np.int32)
    places = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))[..., None]

    def states(model):
        def run(params):
            x = model.apply(params, ids, method="embed")
            return model.apply(params, x, segments, segments < 0, places)[0]

        return np.asarray(jax.jit(run)(params), np.float32)

    full, half = states(model), states(model.clone(dtype=jnp.bfloat16))
    error = np.abs(half - full).max() / np.abs(full).max()
    assert 0 < error < 0.03


@pytest.mark.parametrize(
    "scaling, told",
    [
        ({"kind": "dynamic"}, "unknown kind 'dynamic'"),
        ({"kind": "linear"}, "linear needs 'factor'"),
        ({"kind": "linear", "factor": 2.0, "fator": 1.0}, "linear has no key 'fator'"),
        ({"factor": 2.0}, "plain has no key 'factor'"),
    ],
)
def test_scalings_that_are_not_known(scaling, told):
    with pytest.raises(UserError, match=told):
        rotary.make(8, 10000.0, scaling)
