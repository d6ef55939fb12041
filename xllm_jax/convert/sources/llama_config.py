"""config.json of causal decoders: which of its fields are read, and which are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import published_config
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.published_config import PublishedConfig
from xllm_jax.core.errors import UserError
from xllm_jax.models import rotary

# Where a file leaves a field out, transformers has these values.
DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000.0,
    "vocab_size": 0,
    "hidden_size": 0,
    "intermediate_size": 0,
    "num_hidden_layers": 0,
    "num_attention_heads": 0,
    "max_position_embeddings": 2048,
}
QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
GLM = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131072,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": QWEN,
    "qwen3": QWEN | {"head_dim": 128},
    "glm4": GLM,
}
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# Read, or of training, files and generation alone.
KNOWN = frozenset(
    {
        *DEFAULTS,
        *ROPE,
        *("model_type", "architectures", "auto_map", "_name_or_path", "name_or_path"),
        *("torch_dtype", "dtype", "transformers_version", "initializer_range", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_sequence_length", "pretraining_tp"),
        *("attention_dropout", "sliding_window", "max_window_layers", "use_sliding_window"),
        *("layer_types", "_attn_implementation", "id2label", "label2id", "return_dict"),
        *("chunk_size_feed_forward", "unsloth_version", "task_specific_params", "problem_type"),
    }
)
SCALINGS = {"default": "plain", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
LENGTH = rotary.LENGTH


def read(checkpoint: Checkpoint) -> PublishedConfig | None:
    """The config.json beside a checkpoint; None where there is none.

    Raises:
      UserError: it is of another model, or says what the network does not have.
    """
    kind = checkpoint.config().get("model_type")
    defaults = DEFAULTS | KINDS.get(kind, {})
    config = published_config.read(checkpoint, defaults, tuple(KINDS))
    if config is None:
        return None
    for name in sorted(config.said - KNOWN):
        if config.values[name]:  # what is off or empty changes nothing
            raise config.refuse(name, "which this network does not know")
    config.only(hidden_act="silu", mlp_bias=False)
    if kind in ("llama", "qwen3"):
        config.only(attention_bias=False)
    _refuse_windows(config, kind)
    return config


def fields(config: PublishedConfig) -> dict[str, Any]:
    """Fields of `Causal`.

    Raises:
      UserError: heads that do not divide, or rotary positions that are not known.
    """
    values, kind = config.values, config.values.get("model_type", "llama")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values["head_dim"] or width // config.heads(width)
    key_heads = values["num_key_value_heads"] or heads
    if not isinstance(key_heads, int) or key_heads < 1 or heads % key_heads:
        raise config.refuse("num_key_value_heads", f"which does not divide the {heads} heads")
    theta, share, scaling = _rotary(config)
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise config.refuse("head_dim", "rotary positions pair the channels of a head")
    if kind == "glm4" and (head_dim * share % 2 or (1 / share) % 1):
        raise config.refuse("partial_rotary_factor", "and a head is no multiple of what it rotates")
    if kind != "glm4" and share != 1:
        raise config.refuse("partial_rotary_factor", f"{kind} rotates whole heads")
    return dict(
        vocab=values["vocab_size"],
        width=width,
        depth=values["num_hidden_layers"],
        heads=heads,
        hidden=values["intermediate_size"],
        key_heads=key_heads,
        head_dim=head_dim,
        norm_epsilon=config.epsilon("rms_norm_eps"),
        qkv_bias=kind == "qwen2" or bool(values["attention_bias"]),
        head_norms=kind == "qwen3",
        sandwich=kind == "glm4",
        tied=bool(values["tie_word_embeddings"]),
        theta=theta,
        rotary_share=share,
        scaling=scaling,
    )


def _refuse_windows(config: PublishedConfig, kind: str | None) -> None:
    """Refuses a sliding window, which Qwen's files name also where they do not use it."""
    values = config.values
    sliding = [one for one in values.get("layer_types") or () if one != "full_attention"]
    if sliding:
        raise config.refuse("layer_types", "this network knows 'full_attention' only")
    if values.get("use_sliding_window"):
        raise config.refuse("use_sliding_window", "this network has no sliding window")
    if values.get("sliding_window") and kind not in ("qwen2", "qwen3"):
        raise config.refuse("sliding_window", "this network has no sliding window")


def _rotary(config: PublishedConfig) -> tuple[float, float, dict[str, Any]]:
    """(theta, share of the channels, scaling), from the fields of either age of transformers."""
    values = config.values
    newer = values.get("rope_parameters")
    name = "rope_parameters" if newer else "rope_scaling"
    said = newer or values.get("rope_scaling") or {}
    if not isinstance(said, Mapping):
        raise config.refuse(name, "it is an object")
    rest = dict(said)
    theta = rest.pop("rope_theta", values["rope_theta"])
    share = rest.pop("partial_rotary_factor", values["partial_rotary_factor"])
    older = rest.pop("type", "default")
    kind = rest.pop("rope_type", older)
    if kind not in SCALINGS:
        raise config.refuse(name, f"known are {', '.join(SCALINGS)}")
    scaling: dict[str, Any] = {}
    if kind != "default":
        scaling = {"kind": SCALINGS[kind]} | {key: value for key, value in rest.items() if value}
    if kind in ("llama3", "yarn"):
        scaling.setdefault(LENGTH, values["max_position_embeddings"])
    try:
        rotary.make(64, float(theta), scaling)
    except (UserError, ValueError, TypeError) as error:
        raise config.refuse(name, " ".join(str(error).split())[:200]) from error
    return float(theta), float(share), scaling
