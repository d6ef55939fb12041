"""The PyTorch side of `stage2_image.py`: BLIP-2 parts of transformers, a ChatGLM-shaped decoder.

Frozen parts are bfloat16 and without parameter gradients, trained parts float32 under autocast, as
BLIP-2 is trained; attention is SDPA everywhere; everything is under `torch.compile`.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import stage2_image
import torch
from torch import nn
from torch.nn import functional
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

ALPHA = (2 * 28) ** 0.5


def turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary positions of `[B, T, heads, head_dim]`: two halves, each by its own position."""
    first, second, third, fourth = x.float().chunk(4, dim=-1)
    turned = torch.cat([-second, first, -fourth, third], dim=-1)
    return (x.float() * cosine + turned * sine).to(x.dtype)


def tables(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[B, T, 1, head_dim]` of `[B, T, 2]` positions."""
    channels = head_dim // 2
    exponent = torch.arange(0, channels, 2, device=positions.device).float() / channels
    frequency = (1.0 / 10000.0**exponent).half().float()
    angles = positions[..., None].float() * frequency  # [B, T, 2, channels / 2]
    angles = torch.cat([angles, angles], dim=-1).flatten(-2)[:, :, None]
    return angles.cos(), angles.sin()


class Layer(nn.Module):
    """One layer of ChatGLM: the residual is the normalized input times alpha."""

    def __init__(self, width: int, heads: int, hidden: int, alpha: float):
        super().__init__()
        self.heads, self.alpha = heads, alpha
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(
        self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """`[B, T, D]`; mask `[B, 1, T, T]` bool, True = visible."""
        normed = self.attention_norm(x)
        qkv = self.qkv(normed).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.unbind(2)
        query, key = turn(query, cosine, sine), turn(key, cosine, sine)
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )
        x = self._residual(normed, self.out(mixed.transpose(1, 2).flatten(-2)))
        normed = self.feed_forward_norm(x)
        hidden = functional.gelu(self.up(normed), approximate="tanh")
        return self._residual(normed, self.down(hidden))

    def _residual(self, normed: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (normed.float() * self.alpha + y.float()).to(normed.dtype)


class Decoder(nn.Module):
    """ChatGLM; its head is the word embedding."""

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        width, alpha = sizes["width"], sizes.get("alpha") or ALPHA
        self.heads = sizes["heads"]
        self.embedding = nn.Embedding(sizes["vocab"], width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(
            Layer(width, sizes["heads"], sizes["hidden"], alpha) for _ in range(sizes["depth"])
        )
        self.final_norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` embeddings to final states."""
        cosine, sine = tables(positions, x.shape[-1] // self.heads)
        for layer in self.layers:
            x = layer(x, cosine, sine, mask)
        return self.final_norm(x)


class Model(nn.Module):
    """All three parts and the loss on the answer."""

    def __init__(self, sizes: dict[str, dict[str, Any]], device: str, frozen: torch.dtype):
        super().__init__()
        self.frozen = frozen
        with torch.device(device):
            torch.set_default_dtype(frozen)
            self.vision = Blip2VisionModel(vision_config(sizes["vision_encoder"]))
            self.llm = Decoder(sizes["llm"])
            self.requires_grad_(False)
            torch.set_default_dtype(torch.float32)
            wanted, width = sizes["image_interface"], sizes["llm"]["width"]
            self.norm = nn.LayerNorm(wanted["encoder_width"])
            self.queries = nn.Parameter(torch.randn(1, wanted["queries"], wanted["width"]) * 0.02)
            self.qformer = Blip2QFormerModel(qformer_config(wanted))
            self.adapter = nn.Linear(wanted["width"], width)
        del self.vision.post_layernorm  # it trains: `norm` is in its place

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures `[B, 3, side, side]` to features; no gradients."""
        with torch.no_grad():
            x = self.vision.embeddings(pixels.to(self.frozen)).to(self.frozen)
            for layer in self.vision.encoder.layers:
                x = layer(x)
        return x

    def interface(self, features: torch.Tensor) -> torch.Tensor:
        """Features to LLM embeddings, float32 parameters under autocast."""
        kind = features.device.type
        cast = torch.autocast(kind, torch.bfloat16) if self.frozen == torch.bfloat16 else None
        with cast or contextlib.nullcontext():
            image = self.norm(features)
            rows = self.queries.expand(len(features), -1, -1)
            rows = self.qformer.dropout(self.qformer.layernorm(rows))
            states = self.qformer.encoder(
                rows, encoder_hidden_states=image, query_length=rows.shape[1]
            )
            return self.adapter(states.last_hidden_state)

    def forward(
        self,
        pixels: torch.Tensor,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        index: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """The mean loss of the answers; the picture stands from the second position on."""
        media = self.interface(self.features(pixels)).to(self.frozen)
        words = self.llm.embedding(ids)
        x = torch.cat([words[:, :1], media, words[:, 1 + media.shape[1] :]], dim=1)
        states = self.llm(x, positions, mask)
        chosen = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
        logits = functional.linear(chosen, self.llm.embedding.weight)
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def vision_config(sizes: dict[str, Any]) -> Blip2VisionConfig:
    """Of the frozen ViT."""
    made = Blip2VisionConfig(
        hidden_size=sizes["width"],
        intermediate_size=sizes["hidden"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch"],
        layer_norm_eps=1e-6,
    )
    made._attn_implementation = "sdpa"
    return made


def qformer_config(sizes: dict[str, Any]) -> Blip2QFormerConfig:
    """Of the trained Q-Former, without text."""
    dropout = sizes.get("dropout", 0.1)
    made = Blip2QFormerConfig(
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["hidden"],
        encoder_hidden_size=sizes["encoder_width"],
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        cross_attention_frequency=2,
        use_qformer_text_input=False,
    )
    made._attn_implementation = "sdpa"
    return made


def load(model: Model, file: Path) -> None:
    """Takes the weights of our side."""
    with np.load(file) as stored:
        arrays = {path: torch.from_numpy(leaf) for path, leaf in stored.items()}
    dense, norm = copiers(arrays)
    with torch.no_grad():
        load_vision(model.vision, arrays, dense, norm)
        load_interface(model, arrays, dense, norm)
        load_llm(model.llm, arrays, dense, norm)


def copiers(arrays: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """What copies a dense layer and a norm of ours, `{path: leaf}`, into those of PyTorch."""

    def dense(linear: nn.Linear, path: str, number: Any = (), inputs: int = 1) -> None:
        kernel = arrays[f"{path}/kernel"][number]
        rows = int(np.prod(kernel.shape[:inputs]))
        linear.weight.copy_(kernel.reshape(rows, -1).T)
        linear.bias.copy_(arrays[f"{path}/bias"][number].flatten())

    def norm(layer: nn.LayerNorm, path: str, number: Any = ()) -> None:
        layer.weight.copy_(arrays[f"{path}/scale"][number])
        layer.bias.copy_(arrays[f"{path}/bias"][number])

    return dense, norm


def load_vision(vision: nn.Module, arrays: dict[str, Any], dense: Any, norm: Any) -> None:
    """The ViT; queries, keys and values are one matrix there, keys without bias."""
    root, tables_ = "vision_encoder/layers", "vision_encoder/embeddings"
    patches = vision.embeddings.patch_embedding
    patches.weight.copy_(arrays[f"{tables_}/patches/kernel"].permute(3, 2, 0, 1))
    patches.bias.copy_(arrays[f"{tables_}/patches/bias"])
    vision.embeddings.class_embedding.copy_(arrays[f"{tables_}/class_token"][None, None])
    vision.embeddings.position_embedding.copy_(arrays[f"{tables_}/positions"][None])
    for n, layer in enumerate(vision.encoder.layers):
        attention = layer.self_attn
        names = [f"{root}/attention/{name}" for name in ("query", "key", "value")]
        kernels = [arrays[f"{name}/kernel"][n].flatten(1).T for name in names]
        attention.qkv.weight.copy_(torch.cat(kernels))
        biases = [arrays[f"{name}/bias"][n].flatten() for name in (names[0], names[2])]
        attention.qkv.bias.copy_(torch.cat([biases[0], torch.zeros_like(biases[0]), biases[1]]))
        dense(attention.projection, f"{root}/attention/out", n, 2)
        dense(layer.mlp.fc1, f"{root}/feed_forward/up", n)
        dense(layer.mlp.fc2, f"{root}/feed_forward/down", n)
        norm(layer.layer_norm1, f"{root}/attention_norm", n)
        norm(layer.layer_norm2, f"{root}/feed_forward_norm", n)


def load_interface(model: Model, arrays: dict[str, Any], dense: Any, norm: Any) -> None:
    """Norm, queries, Q-Former and adapter."""
    norm(model.norm, "image_interface/norm")
    model.queries.copy_(arrays["image_interface/queries"][None])
    dense(model.adapter, "image_interface/adapter")
    norm(model.qformer.layernorm, "image_interface/qformer/embeddings/norm")
    for number, layer in enumerate(model.qformer.encoder.layer):
        n = number // 2
        root = f"image_interface/qformer/groups/layer_{number % 2}"
        parts = [(layer.attention, "attention")]
        parts += [(layer.crossattention, "cross_attention")] if layer.has_cross_attention else []
        for part, name in parts:
            for kind in ("query", "key", "value"):
                dense(getattr(part.attention, kind), f"{root}/{name}/{kind}", n)
            dense(part.output.dense, f"{root}/{name}/out", n, 2)
            norm(part.output.LayerNorm, f"{root}/{name}_end/norm", n)
        dense(layer.intermediate_query.dense, f"{root}/query_feed_forward/up", n)
        dense(layer.output_query.dense, f"{root}/query_feed_forward/down", n)
        norm(layer.output_query.LayerNorm, f"{root}/query_feed_forward_end/norm", n)


def load_llm(llm: Decoder, arrays: dict[str, Any], dense: Any, norm: Any) -> None:
    """ChatGLM."""
    llm.embedding.weight.copy_(arrays["llm/embedding"])
    norm(llm.final_norm, "llm/final_norm")
    for n, layer in enumerate(llm.layers):
        dense(layer.qkv, "llm/layers/attention/qkv", n)
        dense(layer.out, "llm/layers/attention/out", n, 2)
        dense(layer.up, "llm/layers/feed_forward/up", n)
        dense(layer.down, "llm/layers/feed_forward/down", n)
        norm(layer.attention_norm, "llm/layers/attention_norm", n)
        norm(layer.feed_forward_norm, "llm/layers/feed_forward_norm", n)


def tensors(batch: Any, device: str) -> list[torch.Tensor]:
    """Arguments of `Model.forward`."""
    place = np.arange(batch.ids.shape[1])
    mask = batch.context[:, None, None, :] | (place[None, :] <= place[:, None])
    pixels = np.moveaxis(batch.media["image"].values[:, 0], -1, 1)
    arrays = (pixels, batch.ids, batch.positions, mask, batch.answer_index, batch.targets)
    made = [torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in arrays]
    return [x.long() if x.dtype == torch.int32 else x for x in made]


def side(choice: argparse.Namespace) -> dict[str, Any]:
    """Compiles and times the PyTorch step."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    stage = stage2_image.stage_of(choice, gpu=False)
    frozen = torch.bfloat16 if stage.frozen == "bfloat16" else torch.float32
    model = Model(stage2_image.sizes_of(stage), device, frozen).train()
    if choice.size == "tiny":
        load(model, Path(choice.folder) / "weights.npz")
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=stage2_image.RATE,
        betas=stage2_image.BETAS,
        eps=stage2_image.EPSILON,
        weight_decay=0.0,
        fused=cuda,
    )
    arguments = tensors(stage2_image.batch_of(stage), device)
    mode = choice.torch_mode
    call = model if mode == "none" else torch.compile(model, mode=mode)

    def advance() -> torch.Tensor:
        loss = call(*arguments)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    started = time.monotonic()
    first = float(advance())
    compiling = time.monotonic() - started
    losses, seconds = stage2_image.timed(choice, advance, float, float, warm=2)
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "version": f"torch {torch.__version__}",
        "losses": [first, *losses],
        "seconds": seconds,
        "compile_seconds": compiling,
        "peak_gib": torch.cuda.max_memory_allocated() / stage2_image.GIB if cuda else 0.0,
    }
