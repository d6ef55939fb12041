"""The rows of `cpu.py`: one piece of work each, on both sides, with the same weights and inputs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import cpu_torch
import jax
import jax.numpy as jnp
import numpy as np
import stage2_image_torch as peers
import torch
import transformers
from cpu_pair import Call, Compared, Pair, Work, drawn, params_of, stack_of, tensors
from torch.nn import functional

from xllm_jax.convert import export_tree
from xllm_jax.convert.sources import llama
from xllm_jax.inference import decoding
from xllm_jax.models import causal, cif, conformer, glm, interfaces, vit

VIT = {
    "medium": dict(image_size=160, patch=16, width=384, depth=4, heads=6, hidden=1536),
    "tiny": dict(image_size=32, patch=16, width=32, depth=2, heads=2, hidden=64),
}
QFORMER = {
    "medium": dict(
        queries=32,
        width=384,
        depth=4,
        heads=6,
        hidden=1536,
        encoder_width=384,
        llm_width=384,
        dropout=0.0,
    ),
    "tiny": dict(
        queries=4,
        width=32,
        depth=2,
        heads=2,
        hidden=64,
        encoder_width=32,
        llm_width=32,
        dropout=0.0,
    ),
}
GLM = {
    "medium": dict(vocab=8192, width=384, depth=4, heads=6, hidden=1536, alpha=None),
    "tiny": dict(vocab=64, width=32, depth=2, heads=2, hidden=64, alpha=None),
}
CONFORMER = {
    "medium": dict(
        width=256, hidden=1024, heads=4, kernel=31, depth=4, pools=(2,), channels=64, bins=80
    ),
    "tiny": dict(width=32, hidden=64, heads=2, kernel=7, depth=2, pools=(1,), channels=4, bins=80),
}
CAUSAL = {
    "medium": dict(vocab=2048, width=384, depth=4, heads=6, hidden=1024),
    "tiny": dict(vocab=64, width=32, depth=2, heads=2, hidden=64),
}
SPREAD = 0.06  # of the decoder's weights: scores so far apart that rounding changes no token
THRESHOLD = cif.Firing().threshold


def _vit(size: str, backward: bool) -> Pair:
    """Pictures to features, and with `backward` gradients of all parameters."""
    sizes, batch = VIT[size], 2
    network = vit.VisionTransformer(**sizes, unroll=sizes["depth"])
    pixels = drawn(0, (batch, sizes["image_size"], sizes["image_size"], 3))
    params = params_of(network, pixels)
    module = peers.Blip2VisionModel(peers.vision_config(sizes))
    del module.post_layernorm
    told = f"{batch} pictures of {sizes['image_size']}², patch {sizes['patch']}, {stack_of(sizes)}"
    given = torch.from_numpy(np.moveaxis(np.asarray(pixels), -1, 1).copy())

    def features(x: torch.Tensor) -> torch.Tensor:
        x = module.embeddings(x)
        for layer in module.encoder.layers:
            x = layer(x)
        return x

    run = lambda p, x: network.apply({"params": p}, x)[0]  # noqa: E731
    work = Work(run, params, pixels, features, module, given, _fill_vision)
    return work.backward(told) if backward else work.forward(told)


def _fill_vision(module: Any, arrays: dict[str, torch.Tensor]) -> None:
    arrays = {f"vision_encoder/{path}": leaf for path, leaf in arrays.items()}
    with torch.no_grad():
        peers.load_vision(module, arrays, *peers.copiers(arrays))


class _Interface(torch.nn.Module):
    """Parts of `stage2_image_torch.Model` that its `interface` and loader work on."""

    frozen = torch.float32
    forward = peers.Model.interface

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        self.norm = torch.nn.LayerNorm(sizes["encoder_width"])
        self.queries = torch.nn.Parameter(torch.zeros(1, sizes["queries"], sizes["width"]))
        self.qformer = peers.Blip2QFormerModel(peers.qformer_config(sizes))
        self.adapter = torch.nn.Linear(sizes["width"], sizes["llm_width"])


def _fill_interface(module: Any, arrays: dict[str, torch.Tensor]) -> None:
    arrays = {f"image_interface/{path}": leaf for path, leaf in arrays.items()}
    with torch.no_grad():
        peers.load_interface(module, arrays, *peers.copiers(arrays))


def qformer_backward(size: str) -> Pair:
    """Frozen features through Q-Former and adapter, and gradients of all parameters."""
    sizes, (batch, patches) = QFORMER[size], (4, 101) if size == "medium" else (2, 5)
    network = interfaces.QFormerInterface(**sizes, unroll=sizes["depth"])
    features, lengths = drawn(0, (batch, patches, sizes["encoder_width"])), jnp.full(batch, patches)
    params = params_of(network, features, lengths)
    told = f"{batch} x {patches} features, {sizes['queries']} queries, {stack_of(sizes)}"
    run = lambda p, x: network.apply({"params": p}, x, lengths, train=True)[0]  # noqa: E731
    module = _Interface(sizes)
    given = torch.from_numpy(np.array(features))
    return Work(run, params, features, module, module, given, _fill_interface).backward(told)


def conformer_backward(size: str) -> Pair:
    """Filterbanks to features with BatchNorm by the batch, and gradients of all parameters."""
    sizes, (batch, frames) = CONFORMER[size], (2, 400) if size == "medium" else (2, 41)
    network = conformer.SpeechEncoder(**sizes, dropout=0.0, unroll=sizes["depth"])
    values, lengths = drawn(0, (batch, frames, sizes["bins"])), jnp.full(batch, frames)
    params = params_of(network, values, lengths)
    told = f"{batch} utterances of {frames} frames, kernel {sizes['kernel']}, {stack_of(sizes)}"
    run = lambda p, x: network.apply({"params": p}, x, lengths, train=True)[0]  # noqa: E731
    module, given = cpu_torch.Conformer(sizes), torch.from_numpy(np.array(values))
    fill = cpu_torch.load_conformer
    return Work(run, params, values, module, module, given, fill).backward(told)


def glm_inputs(size: str) -> Pair:
    """Packed rows through a frozen GLM, loss at the answers, gradient of the inputs."""
    sizes, (rows, length) = GLM[size], (2, 128) if size == "medium" else (2, 16)
    network = glm.ChatGLM(**sizes, unroll=sizes["depth"])
    layout, index, targets = _packed(rows, length, sizes["vocab"])
    x = drawn(0, (rows, length, sizes["width"]))
    params = params_of(network, x, *layout)
    module = peers.Decoder({**sizes, "alpha": network.alpha}).requires_grad_(False)
    arrays = {f"llm/{path}": leaf for path, leaf in tensors(params).items()}
    with torch.no_grad():
        peers.load_llm(module, arrays, *peers.copiers(arrays))

    def loss(x: Any, params: Any) -> Any:
        states, _ = network.apply({"params": params}, x, *layout)
        chosen = jnp.take_along_axis(states, index[..., None], axis=1)
        scores = network.apply({"params": params}, chosen, method="logits")
        told = jax.nn.log_softmax(scores)
        return -jnp.take_along_axis(told, targets[..., None], axis=-1).mean()

    step = jax.jit(jax.value_and_grad(loss))
    given = torch.from_numpy(np.array(x)).requires_grad_()
    place = jnp.broadcast_to(jnp.arange(length), (rows, length))
    segments, context, positions = layout
    seen = glm.visible(segments, place, segments, context, place)
    mask, where, chosen_index, wanted = (
        torch.from_numpy(np.array(leaf)) for leaf in (seen, positions, index, targets)
    )
    picked = chosen_index.long()[..., None].expand(-1, -1, sizes["width"])

    def scored(x: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(
            module(x, where, mask).gather(1, picked), module.embedding.weight
        )
        return functional.cross_entropy(logits.flatten(0, 1), wanted.long().flatten())

    def theirs(wrap: Call) -> Callable[[], Any]:
        call = wrap(scored)

        def advance() -> tuple[torch.Tensor, torch.Tensor]:
            given.grad = None
            made = call(given)
            made.backward()
            assert given.grad is not None
            return made.detach(), given.grad

        return advance

    def compared(ours: Any, other: Any) -> Compared:
        yield from (("loss", ours[0], other[0]), ("gradient of the input", ours[1], other[1]))

    told = f"{rows} x {length} tokens, {index.size} answers, {sizes['vocab']} words, "
    ours = lambda: jax.block_until_ready(step(x, params))  # noqa: E731
    return Pair(told + stack_of(sizes), ours, theirs, compared)


def _packed(rows: int, length: int, vocab: int) -> tuple[tuple[Any, Any, Any], Any, Any]:
    """Two conversations a row, half of each its answer: (layout, answer index, targets)."""
    half = length // 2
    place = np.tile(np.arange(half, dtype=np.int32), 2)
    seen = half // 2
    positions = np.stack([np.minimum(place, seen - 1), np.maximum(place - seen + 1, 0)], -1)
    segments = np.repeat(np.arange(1, 3, dtype=np.int32), half)
    index = np.flatnonzero((place >= seen - 1) & (place < half - 1)).astype(np.int32)
    targets = np.random.default_rng(2).integers(0, vocab, (rows, index.size))
    layout = (segments, place < seen, positions)
    tiled = tuple(jnp.asarray(np.stack([leaf] * rows)) for leaf in layout)
    return tiled, jnp.asarray(np.stack([index] * rows)), jnp.asarray(targets, jnp.int32)


def _cif(size: str, backward: bool, loop: Call) -> Pair:
    """Frames and weights to tokens, and with `backward` gradients of both."""
    batch, length, width, most = (16, 200, 256, 48) if size == "medium" else (3, 20, 8, 8)
    rng = np.random.default_rng(0)
    frames = drawn(0, (batch, length, width))
    alpha = jnp.asarray(rng.uniform(0.05, 0.35, (batch, length)), jnp.float32)
    counts = jnp.asarray(rng.integers(most // 2, most, batch), jnp.int32)
    lengths, weights = jnp.full(batch, length), drawn(1, (batch, most, width))
    x, told, wanted, factor = (
        torch.from_numpy(np.array(leaf)) for leaf in (frames, alpha, counts, weights)
    )

    def run(frames: Any, alpha: Any) -> Any:
        return cif.integrate_and_fire(frames, alpha, lengths, most, counts).embeddings

    def loss(frames: Any, alpha: Any) -> tuple[Any, Any]:
        made = run(frames, alpha)
        return (made * weights).sum(), made

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True) if backward else run)

    def theirs(wrap: Call) -> Callable[[], Any]:
        call = wrap(functools.partial(loop, threshold=THRESHOLD))

        def forward() -> torch.Tensor:
            with torch.inference_mode():
                return call(x, told, wanted)

        def advance() -> Any:
            leaves = [leaf.detach().requires_grad_() for leaf in (x, told)]
            made = call(*leaves, wanted)
            (made * factor[:, : made.shape[1]]).sum().backward()
            return [leaf.grad for leaf in leaves], made.detach()

        return advance if backward else forward

    def compared(ours: Any, other: Any) -> Compared:
        made, expected = (ours[1], other[1]) if backward else (ours, other)
        yield "tokens", np.asarray(made)[:, : expected.shape[1]], expected
        yield "places behind them", np.asarray(made)[:, expected.shape[1] :].any(), np.False_
        if backward:
            yield "gradient of the frames", ours[0][0], other[0][0]
            yield "gradient of the weights", ours[0][1], other[0][1]

    sizes = f"{batch} x {length} frames of {width} to at most {most} tokens"
    return Pair(sizes, lambda: jax.block_until_ready(step(frames, alpha)), theirs, compared)


def decode_greedy(size: str) -> Pair:
    """A prompt, then tokens one by one with a cache, batch 1, against `generate`."""
    sizes, (prompt, count) = CAUSAL[size], (32, 32) if size == "medium" else (5, 4)
    network = causal.Causal(**sizes, unroll=sizes["depth"])
    row = jnp.ones((1, prompt), jnp.int32)
    place = jnp.arange(prompt)[None, :, None]
    ids = jnp.asarray(np.random.default_rng(3).integers(3, sizes["vocab"], (1, prompt)), jnp.int32)
    params = params_of(network, *network.example(), spread=SPREAD)
    how = decoding.Decoding(ends=(-1,), pad=0, position_step=(1,), max_new_tokens=count)

    def answer(params: Any, ids: Any) -> Any:
        llm = functools.partial(network.apply, {"params": params})
        layout = (row, row < 0, place)
        state = decoding.prefill(llm, llm(ids, method="embed"), *layout, count)
        return decoding.decode(llm, state, how, None).tokens

    step = jax.jit(answer)
    module, given = _llama(sizes, params), torch.from_numpy(np.array(ids)).long()
    mask = torch.ones_like(given)

    def theirs(wrap: Call) -> Callable[[], Any]:
        call = copy.copy(module)
        call.forward = wrap(module.forward)
        options = dict(do_sample=False, min_new_tokens=count, max_new_tokens=count)

        def generate() -> torch.Tensor:
            with torch.inference_mode():
                return call.generate(given, attention_mask=mask, **options)[:, prompt:]

        return generate

    def compared(ours: Any, other: Any) -> Compared:
        yield "tokens", ours, other

    told = f"prompt of {prompt}, {count} tokens, {sizes['vocab']} words, {stack_of(sizes)}"
    return Pair(told, lambda: jax.block_until_ready(step(params, ids)), theirs, compared)


def _llama(sizes: dict[str, Any], params: Any) -> transformers.LlamaForCausalLM:
    """The same LLM in transformers, through the table of our converter."""
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["hidden"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    module = transformers.LlamaForCausalLM(config).eval()
    arrays = jax.tree.map(np.asarray, {"llm": params})
    named = export_tree(llama.plan(sizes).table, arrays)
    state = {name: torch.from_numpy(np.array(leaf)) for name, leaf in named.items()}
    module.load_state_dict(state, strict=True)
    return module


LEAN, RECORDED = cpu_torch.integrate_and_fire, cpu_torch.recorded_integrate_and_fire
ROWS: dict[str, tuple[Callable[[str], Pair], float | None]] = {
    "vit_forward": (functools.partial(_vit, backward=False), 1.0),
    "vit_backward": (functools.partial(_vit, backward=True), 1.0),
    "qformer_backward": (qformer_backward, 1.0),
    "glm_inputs": (glm_inputs, 1.3),
    "conformer_backward": (conformer_backward, 0.9),
    "cif_forward": (functools.partial(_cif, backward=False, loop=RECORDED), 75.0),
    "cif_backward": (functools.partial(_cif, backward=True, loop=RECORDED), 250.0),
    "cif_forward_lean": (functools.partial(_cif, backward=False, loop=LEAN), None),
    "cif_backward_lean": (functools.partial(_cif, backward=True, loop=LEAN), None),
    "decode_greedy": (decode_greedy, 1.1),
}
"""{row: (size to its pair, how many times PyTorch's CPU time over ours is the goal)}."""
