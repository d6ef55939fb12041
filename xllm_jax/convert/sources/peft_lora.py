"""Adapters as PEFT names them, to the tree of `models/lora.py`: a causal decoder's attention."""

from __future__ import annotations

from collections.abc import Iterable

from xllm_jax.convert import Row
from xllm_jax.models.causal import Causal

SOURCE = "base_model.model."  # what PEFT puts before the model's own names
TARGETS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}


def rows(
    model: Causal,
    targets: Iterable[str],
    source: str = SOURCE,
    adapter: str = ".default",
    target: str = "",
) -> tuple[Row, ...]:
    """Table of the adapters of some projections.

    Args:
      model: the base.
      targets: of TARGETS.
      source: what the tensors' names start with.
      adapter: '.default' in a whole state dict, '' in `adapter_model.safetensors`.
      target: what our paths start with.
    """
    layers, made = tuple(range(model.depth)), []
    for name in targets:
        heads = model.heads if name in ("q_proj", "o_proj") else model.key_heads or model.heads
        old = f"{source}model.layers.{{layer}}.self_attn.{name}"
        new, sizes = f"{target}layers/attention/{TARGETS[name]}", (("h", heads),)
        patterns = {"A": "r d -> d r", "B": "(h k) r -> r h k"}
        if name == "o_proj":
            patterns = {"A": "r (h k) -> h k r", "B": "d r -> r d"}
        made += [
            Row(
                f"{old}.lora_{letter}{adapter}.weight",
                f"{new}/lora_{letter.lower()}",
                pattern,
                layers,
                sizes if "h" in pattern else (),
            )
            for letter, pattern in patterns.items()
        ]
    return tuple(made)
