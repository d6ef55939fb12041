"""Causal decoders as Hugging Face names them (LLaMA, Vicuna, Qwen2, Qwen3, GLM-4) and back.

Folders of `model*.safetensors` or `pytorch_model*.bin` with config.json, to `models/causal.py`.
GLM-4 keeps gate and up in one tensor, and pairs neighboring channels in its rotary positions; ours
are the same after a permutation of each head's channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from xllm_jax.convert import ConversionPlan, Drop, Row, mount, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.published_config import PublishedConfig
from xllm_jax.convert.sources import llama_config
from xllm_jax.models.causal import SIZES, Causal

WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.0."
FUSED = f"{LAYER}mlp.gate_up_proj.weight"
REPEATED = "head_repeated"  # the option: a tied head is written again
EXTRA_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
DROP = (Drop(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "computed, not read"),)


def rows(model: Causal) -> tuple[Row, ...]:
    """The table of a network; one that rotates a part of its channels is GLM-4's."""
    layers, paired = tuple(range(model.depth)), model.rotary_share < 1

    def layer(source: str, target: str, pattern: str = "", **more: bool) -> Row:
        return Row(f"model.layers.{{layer}}.{source}", f"layers/{target}", pattern, layers, **more)

    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feed_forward_norm",
    }
    if model.sandwich:
        norms |= {
            "post_self_attn_layernorm": "attention_output_norm",
            "post_mlp_layernorm": "feed_forward_output_norm",
        }
    if model.head_norms:
        norms |= {
            "self_attn.q_norm": "attention/query_norm",
            "self_attn.k_norm": "attention/key_norm",
        }
    up = (
        [("gate_up_proj", "gate", (0, 2)), ("gate_up_proj", "up", (1, 2))]
        if paired
        else [("gate_proj", "gate", None), ("up_proj", "up", None)]
    )
    return (
        Row(WORDS, "embedding"),
        *(layer(f"{theirs}.weight", f"{ours}/scale") for theirs, ours in norms.items()),
        *(row for name in ("query", "key", "value") for row in _projection(layer, model, name)),
        layer(
            "self_attn.o_proj.weight",
            "attention/out/kernel",
            "d (h k) -> h k d",
            sizes=(("h", model.heads),),
        ),
        *(
            layer(f"mlp.{theirs}.weight", f"feed_forward/{ours}/kernel", "o i -> i o", piece=piece)
            for theirs, ours, piece in (*up, ("down_proj", "down", None))
        ),
        Row("model.norm.weight", "final_norm/scale"),
        *(() if model.tied else (Row(HEAD, "head"),)),
    )


def _projection(layer: Callable[..., Row], model: Causal, name: str) -> list[Row]:
    """Rows of the queries, keys or values."""
    heads = model.heads if name == "query" else model.key_heads or model.heads
    source, target = f"self_attn.{name[0]}_proj", f"attention/{name}"
    theirs, ours, lengths = "h k", "k", {"h": heads}
    if model.rotary_share < 1 and name != "value":
        # Blocks of as many channels as are rotated; the order of the others does not matter.
        theirs, ours = "h r j c", "(r c j)"
        lengths |= {"r": round(1 / model.rotary_share), "c": 2}
    found = tuple(lengths.items())
    kernel = layer(
        f"{source}.weight", f"{target}/kernel", f"({theirs}) d -> d h {ours}", sizes=found
    )
    bias = layer(f"{source}.bias", f"{target}/bias", f"({theirs}) -> h {ours}", sizes=found)
    return [kernel, bias] if model.qkv_bias else [kernel]


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of a causal decoder of this kind."""
    return WORDS in checkpoint and f"{LAYER}input_layernorm.weight" in checkpoint


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """Fields of `Causal`, from config.json, a SIZES row or the shapes.

    Raises:
      UserError: unknown size, or a config.json of another model, or of what the network lacks.
    """
    if checkpoint is None:
        return sizes.row(SIZES, size)
    config = llama_config.read(checkpoint)
    if config is None:
        found = sizes.fitting(SIZES, size, checkpoint, **_measured(checkpoint))
    else:
        found = llama_config.fields(config)
        _check(checkpoint, config, found)
        if size:
            found = sizes.fitting(SIZES, size, checkpoint, **found)
    return found | ({REPEATED: HEAD in checkpoint} if found.get("tied") else {})


def options_of(base: Base) -> dict[str, Any]:
    """Fields of `Causal` from a base's parameters, as far as the published names need them."""
    query, key = ("llm/layers/attention/" + name + "/kernel" for name in ("query", "key"))
    sandwich = "llm/layers/attention_output_norm/scale" in base
    return dict(
        vocab=base.axis("llm/embedding", 0),
        width=base.axis(query, 1),
        depth=base.axis(query, 0),
        heads=base.axis(query, 2),
        key_heads=base.axis(key, 2),
        head_dim=base.axis(query, 3),
        hidden=base.axis("llm/layers/feed_forward/up/kernel", 2),
        qkv_bias="llm/layers/attention/query/bias" in base,
        head_norms="llm/layers/attention/query_norm/scale" in base,
        sandwich=sandwich,
        rotary_share=0.5 if sandwich else 1.0,
        tied="llm/head" not in base,
    )


def network(options: Mapping[str, Any]) -> Causal:
    """The model of such options, in float32."""
    return Causal(**{key: value for key, value in options.items() if key != REPEATED})


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The whole source as part 'llm'; configuration and tokenizer go beside it."""
    model = network(options)
    names = ("norm_epsilon", "theta", "rotary_share", "scaling")
    return ConversionPlan(
        table=mount("llm", rows(model)),
        shapes={"llm": sizes.shapes_of(model)},
        drop=DROP,
        tied={HEAD: WORDS} if model.tied and options.get(REPEATED, True) else {},
        extra_files=EXTRA_FILES,
        fields={"llm": {name: options[name] for name in names if name in options}},
    )


def _measured(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the tensors show."""
    return dict(
        vocab=sizes.axis(checkpoint, WORDS, 0),
        width=sizes.axis(checkpoint, WORDS, 1),
        depth=sizes.depth(checkpoint, r"model\.layers\.(\d+)\..*"),
        hidden=sizes.axis(checkpoint, f"{LAYER}mlp.down_proj.weight", 1),
    )


def _check(checkpoint: Checkpoint, config: PublishedConfig, found: Mapping[str, Any]) -> None:
    """Refuses a config.json that the tensors contradict."""
    measured = _measured(checkpoint)
    names = dict(vocab_size="vocab", hidden_size="width", num_hidden_layers="depth")
    names |= {"intermediate_size": "hidden"}
    config.agree(**{theirs: measured[ours] for theirs, ours in names.items()})
    channels = found.get("head_dim") or found["width"] // found["heads"]
    for field, letter, ours in (
        ("num_attention_heads", "q", "heads"),
        ("num_key_value_heads", "k", "key_heads"),
    ):
        shown = sizes.axis(checkpoint, f"{LAYER}self_attn.{letter}_proj.weight", 0)
        heads = found.get(ours) or found["heads"]
        if heads * channels != shown:
            raise config.refuse(field, f"and {shown} rows are no {heads} heads of {channels}")
