"""BLIP-2 as Hugging Face saves it: which of its networks a folder holds, and their sizes.

`Blip2VisionModel` and `Blip2QFormerModel` can stand alone; their names then begin where those of
the whole model go on behind `vision_model.` and `qformer.`.
"""

from __future__ import annotations

from typing import Any

from xllm_jax.convert import published_config, sizes
from xllm_jax.convert.files import Checkpoint
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.vit import VisionTransformer

MARKS = {
    "": "qformer.layernorm.weight",
    "vision_model.": "encoder.layers.0.self_attn.qkv.weight",
    "qformer.": "encoder.layer.0.crossattention.attention.query.weight",
}
"""{what names lack where a network stands alone: a tensor that shows it}."""
NORM = "vision_model.post_layernorm.weight"
SEEN = "vision_model.embeddings.class_embedding"
VISION = dict(num_attention_heads=16, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True)
QFORMER = dict(num_attention_heads=12, hidden_act="gelu", layer_norm_eps=1e-12)
QFORMER |= dict(cross_attention_frequency=2)
"""Of transformers' configurations."""


def missing_start(checkpoint: Checkpoint) -> str | None:
    """What the names of a network that stands alone lack: a key of MARKS, None for another file."""
    found = (start for start, mark in MARKS.items() if mark in checkpoint)
    start = next(found, None)
    alone = {"vision_model.": "post_layernorm.weight", "qformer.": "layernorm.weight"}
    return start if not start or alone[start] in checkpoint else None


def whole(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names of the whole model."""
    start = missing_start(checkpoint)
    if not start:
        return checkpoint
    return checkpoint.under({name: f"{start}{name}" for name in checkpoint}, checkpoint.renamed)


def vision_fields(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Fields of the vision encoder, and of the norm behind it; None without config.json.

    Args:
      checkpoint: under the names of the whole model.

    Raises:
      UserError: config.json contradicts the tensors, or describes what no network here computes.
    """
    config = published_config.read(
        checkpoint, VISION, ("blip-2", "blip_2_vision_model"), "vision_config"
    )
    if config is None:
        return None
    patch = sizes.axis(checkpoint, "vision_model.embeddings.patch_embedding.weight", -1)
    cells = sizes.axis(checkpoint, "vision_model.embeddings.position_embedding", -2) - 1
    layers = "vision_model.encoder.layers"
    fields = dict(
        image_size=round(cells**0.5) * patch,
        patch=patch,
        width=sizes.axis(checkpoint, SEEN, -1),
        depth=sizes.depth(checkpoint, rf"{layers}\.(\d+)\..*"),
        hidden=sizes.axis(checkpoint, f"{layers}.0.mlp.fc1.bias", 0),
    )
    names = dict(image_size="image_size", patch="patch_size", width="hidden_size")
    names |= dict(depth="num_hidden_layers", hidden="intermediate_size")
    config.only(qkv_bias=True)
    config.agree(**{theirs: fields[ours] for ours, theirs in names.items()})
    epsilon = config.epsilon()
    fields |= {"heads": config.heads(fields["width"])}
    fields |= published_config.other_than(
        VisionTransformer, activation=config.activation(), epsilon=epsilon
    )
    return fields, published_config.other_than(QFormerInterface, norm_epsilon=epsilon)


def qformer_fields(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Fields of the Q-Former alone; None without config.json.

    Args:
      checkpoint: under the names of the whole model.

    Raises:
      UserError: config.json contradicts the tensors, or describes what no network here computes.
    """
    config = published_config.read(
        checkpoint, QFORMER, ("blip-2", "blip_2_qformer"), "qformer_config"
    )
    if config is None:
        return None
    layers = "qformer.encoder.layer"
    fields = dict(
        width=sizes.axis(checkpoint, MARKS[""], 0),
        depth=sizes.depth(checkpoint, rf"{layers}\.(\d+)\..*"),
        hidden=sizes.axis(checkpoint, f"{layers}.0.intermediate_query.dense.bias", 0),
    )
    encoder = sizes.axis(checkpoint, f"{layers}.0.crossattention.attention.key.weight", 1)
    config.agree(
        hidden_size=fields["width"],
        num_hidden_layers=fields["depth"],
        intermediate_size=fields["hidden"],
        encoder_hidden_size=encoder,
    )
    reading = [
        n
        for n in range(fields["depth"])
        if f"{layers}.{n}.crossattention.attention.key.weight" in checkpoint
    ]
    frequency = reading[1] if len(reading) > 1 else config.values["cross_attention_frequency"]
    config.agree(cross_attention_frequency=frequency)
    told = dict(activation=config.activation(), epsilon=config.epsilon())
    return fields | {
        "encoder_width": encoder,
        "cross_attention_frequency": frequency,
        "heads": config.heads(fields["width"]),
        **published_config.other_than(ContrastModel, **told),
    }
