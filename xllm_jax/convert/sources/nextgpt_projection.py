"""NExT-GPT's projections (`TextFcLayer`, mode transformer) to `models/outputs/projection.py`.

One head a layer of the LLM; its names are those of PyTorch's `nn.Transformer`.
"""

from __future__ import annotations

from xllm_jax.convert import Row
from xllm_jax.convert.sources.bert import linear, norm
from xllm_jax.models.outputs.projection import TransformerHead

HEADS = 4
DEPTH = TransformerHead.depth


def rows(source: str = "", target: str = "head_0/", heads: int = HEADS) -> tuple[Row, ...]:
    """Table of one head.

    Args:
      source: what the tensors' names start with, such as 'gen_text_hidden_fcs.0.'.
      target: what our paths start with.
      heads: of the attention inside.
    """
    return (
        Row(f"{source}query_embs", f"{target}queries", "1 q d -> q d"),
        *linear(f"{source}fc", f"{target}inputs"),
        *_stack(f"{source}tfm.encoder", f"{target}encoder", heads, cross=False),
        *_stack(f"{source}tfm.decoder", f"{target}decoder", heads, cross=True),
        *linear(f"{source}model", f"{target}outputs"),
    )


def _stack(source: str, target: str, heads: int, cross: bool) -> tuple[Row, ...]:
    """Rows of the encoder or the decoder, its final norm included."""
    old, layers = f"{source}.layers.{{layer}}", tuple(range(DEPTH))
    attentions = {"self_attn": "attention"} | (
        {"multihead_attn": "cross_attention"} if cross else {}
    )
    norms = [f"{target}/{name}_norm" for name in (*attentions.values(), "feed_forward")]
    return (
        *(
            row
            for theirs, ours in attentions.items()
            for row in _attention(f"{old}.{theirs}", f"{target}/{ours}", heads, layers)
        ),
        *linear(f"{old}.linear1", f"{target}/feed_forward/up", layers),
        *linear(f"{old}.linear2", f"{target}/feed_forward/down", layers),
        *(row for n, ours in enumerate(norms, 1) for row in norm(f"{old}.norm{n}", ours, layers)),
        *norm(f"{source}.norm", f"{target}_norm"),
    )


def _attention(source: str, target: str, heads: int, layers: tuple[int, ...]) -> tuple[Row, ...]:
    """Rows of one attention, whose three projections lie in one tensor."""
    sizes = (("h", heads),)
    packed = [
        Row(f"{source}.in_proj_{kind}", f"{target}/{name}/{leaf}", pattern, layers, sizes, (n, 3))
        for n, name in enumerate(("query", "key", "value"))
        for kind, leaf, pattern in (
            ("weight", "kernel", "(h k) d -> d h k"),
            ("bias", "bias", "(h k) -> h k"),
        )
    ]
    out = f"{source}.out_proj"
    return (
        *packed,
        Row(f"{out}.weight", f"{target}/out/kernel", "d (h k) -> h k d", layers, sizes),
        Row(f"{out}.bias", f"{target}/out/bias", "", layers),
    )
