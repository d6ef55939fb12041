"""CIF ASR models of MingLunHan/CIF-HieraDist (a fairseq fork) to our trees and back.

The tables build on each other: one conformer layer, the encoder, the CIF module, the decoder, and
the whole stage-1 model with the parts `speech_encoder`, `speech_interface/cif` and `asr_decoder`.
`interface_rows` is the rest of the speech interface as the X-LLM repository saves it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from xllm_jax.convert import ConversionPlan, Drop, Row, base_sizes, published_config, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.published_config import PublishedConfig
from xllm_jax.convert.sources import bert
from xllm_jax.convert.sources.bert import Layers, linear, norm
from xllm_jax.models import asr, cif, conformer
from xllm_jax.models.speech_interface import SpeechInterface

DEFAULTS = dict(
    decoder_attention_heads=None,
    pooling_layer_ids="6,12",
    layer_downsampling=True,
    cif_threshold=SpeechInterface.threshold,
    tail_handling_firing_threshold=SpeechInterface.tail_threshold,
)
"""Arguments of the recipe, for a file that leaves them out."""
FIXED = dict(
    frontend_type="conv2d",
    conformer_attn_type="espnet",
    conformer_pos_enc_type="rel_pos",
    activation_fn="relu",
    apply_conformer_encoder=True,
    do_encoder_attn=False,
    add_cif_ctxt_layers=False,
    decoder_normalize_before=True,
)
"""Arguments of which one value is converted."""
DROPPED = (
    Drop(r".*num_batches_tracked", "a counter; the momentum is constant"),
    Drop(r"decoder\.version", "fairseq's marker of the file format"),
    Drop(r".*_float_tensor", "fairseq's marker of the device"),
)


def heads_in(source: str, target: str, heads: int, layers: Layers, bias: bool = True):
    """Rows of a linear layer into heads."""
    sizes = (("h", heads),)
    rows = [Row(f"{source}.weight", f"{target}/kernel", "(h k) d -> d h k", layers, sizes)]
    if bias:
        rows.append(Row(f"{source}.bias", f"{target}/bias", "(h k) -> h k", layers, sizes))
    return tuple(rows)


def heads_out(source: str, target: str, heads: int, layers: Layers) -> tuple[Row, ...]:
    """Rows of a linear layer out of heads."""
    sizes = (("h", heads),)
    return (
        Row(f"{source}.weight", f"{target}/kernel", "d (h k) -> h k d", layers, sizes),
        Row(f"{source}.bias", f"{target}/bias", "", layers),
    )


def conformer_layer_rows(
    source: str, target: str, heads: int, layers: Layers = None
) -> tuple[Row, ...]:
    """Rows of one conformer layer; `source` and `target` end with their separators."""
    attention, convolution = f"{source}self_attn", f"{source}conv_module"
    rows = []
    for old, new in (("ffn1", "feed_forward_in"), ("ffn2", "feed_forward_out")):
        rows += norm(f"{source}{old}.layer_norm", f"{target}{new}_norm", layers)
        rows += linear(f"{source}{old}.w_1", f"{target}{new}/up", layers)
        rows += linear(f"{source}{old}.w_2", f"{target}{new}/down", layers)
    rows += norm(f"{source}self_attn_layer_norm", f"{target}attention_norm", layers)
    for old, new in (("q", "query"), ("k", "key"), ("v", "value")):
        rows += heads_in(f"{attention}.linear_{old}", f"{target}attention/{new}", heads, layers)
    pos = f"{attention}.linear_pos"
    rows += heads_in(pos, f"{target}attention/position", heads, layers, bias=False)
    rows += heads_out(f"{attention}.linear_out", f"{target}attention/output", heads, layers)
    for letter in "uv":
        name = f"{target}attention/bias_{letter}"
        rows.append(Row(f"{attention}.pos_bias_{letter}", name, "", layers))
    rows += norm(f"{convolution}.layer_norm", f"{target}convolution/layer_norm", layers)
    for old, new, pattern in (
        ("pointwise_conv1", "pointwise_in/kernel", "o i 1 -> i o"),
        ("depthwise_conv", "depthwise", "c 1 k -> k c"),
        ("pointwise_conv2", "pointwise_out/kernel", "o i 1 -> i o"),
    ):
        rows.append(
            Row(f"{convolution}.{old}.weight", f"{target}convolution/{new}", pattern, layers)
        )
    for old, new in (
        ("weight", "scale"),
        ("bias", "bias"),
        ("running_mean", "mean"),
        ("running_var", "variance"),
    ):
        leaf = f"{target}convolution/batch_norm/{new}"
        rows.append(Row(f"{convolution}.batch_norm.{old}", leaf, "", layers))
    rows += norm(f"{source}final_layer_norm", f"{target}output_norm", layers)
    return tuple(rows)


def encoder_rows(
    source: str, target: str, heads: int, depth: int, pools: Sequence[int], channels: int
) -> tuple[Row, ...]:
    """Rows of the speech encoder: front-end, projection and the stacks between the pools."""
    rows = [
        Row(
            f"{source}subsample.conv.0.weight",
            f"{target}front_end/conv/kernel",
            "o 1 i j -> (i j) o",
            sizes=(("i", 3),),
        ),
        Row(f"{source}subsample.conv.0.bias", f"{target}front_end/conv/bias"),
        Row(
            f"{source}subsample.out.0.weight",
            f"{target}front_end/project/kernel",
            "w (c f) -> f c w",
            sizes=(("c", channels),),
        ),
        Row(f"{source}subsample.out.0.bias", f"{target}front_end/project/bias"),
        *linear(f"{source}linear", f"{target}project"),
    ]
    for number, (start, end) in enumerate(itertools.pairwise([0, *pools, depth])):
        layers = tuple(range(start, end))
        name = f"{source}conformer_layers.{{layer}}."
        rows += conformer_layer_rows(name, f"{target}blocks_{number}/", heads, layers)
    return tuple(rows)


def cif_rows(source: str, target: str, kernel: int = 5, output: bool = False) -> tuple[Row, ...]:
    """Rows of the CIF module; `kernel` 0 for the dense weight predictor."""
    if kernel:
        rows = [
            Row(f"{source}conv.weight", f"{target}conv/kernel", "o i k -> k i o"),
            Row(f"{source}conv.bias", f"{target}conv/bias"),
        ]
    else:
        rows = [*linear(f"{source}dense_proj", f"{target}dense")]
    rows += linear(f"{source}weight_proj", f"{target}weight")
    if output:
        rows.append(Row(f"{source}cif_output_proj.weight", f"{target}output/kernel", "o i -> i o"))
    return tuple(rows)


def decoder_layer_rows(
    source: str, target: str, heads: int, layers: Layers = None, cross: bool = False
) -> tuple[Row, ...]:
    """Rows of one decoder layer; `source` and `target` end with their separators."""
    rows = []
    kinds = [("self_attn", "self")] + ([("encoder_attn", "cross")] if cross else [])
    for old, new in kinds:
        rows += norm(f"{source}{old}_layer_norm", f"{target}{new}_norm", layers)
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
            leaf = f"{target}{new}_attention/{name}"
            rows += heads_in(f"{source}{old}.{letter}_proj", leaf, heads, layers)
        leaf = f"{target}{new}_attention/output"
        rows += heads_out(f"{source}{old}.out_proj", leaf, heads, layers)
    rows += norm(f"{source}final_layer_norm", f"{target}feed_forward_norm", layers)
    rows += linear(f"{source}fc1", f"{target}feed_forward/up", layers)
    rows += linear(f"{source}fc2", f"{target}feed_forward/down", layers)
    return tuple(rows)


def decoder_rows(source: str, target: str, heads: int, depth: int) -> tuple[Row, ...]:
    """Rows of the decoder without its CTC head; every block is one of self-attention."""
    layers = tuple(range(depth))
    return (
        Row(f"{source}embed_tokens.weight", f"{target}embed"),
        Row(f"{source}project_in_dim.weight", f"{target}project_in/kernel", "o i -> i o"),
        *decoder_layer_rows(f"{source}layers.{{layer}}.", f"{target}self_blocks/", heads, layers),
        *norm(f"{source}layer_norm", f"{target}norm"),
        Row(f"{source}project_out_dim.weight", f"{target}project_out/kernel", "o i -> i o"),
        Row(f"{source}output_projection.weight", f"{target}output/kernel", "o i -> i o"),
    )


def rows(
    encoder_heads: int,
    encoder_depth: int,
    pools: Sequence[int],
    channels: int,
    decoder_heads: int,
    decoder_depth: int,
    kernel: int = 5,
    output: bool = False,
) -> tuple[Row, ...]:
    """Rows of a whole model: speech encoder, CIF, decoder and CTC head.

    Args:
      encoder_heads, encoder_depth, pools, channels: sizes of the speech encoder.
      decoder_heads, decoder_depth: sizes of the decoder.
      kernel, output: see `cif_rows`.
    """
    encoder = "speech_encoder/"
    return (
        *encoder_rows("encoder.", encoder, encoder_heads, encoder_depth, pools, channels),
        *cif_rows("encoder.cif.", "speech_interface/cif/", kernel, output),
        *linear("encoder.ctc_proj", "asr_decoder/ctc"),
        *decoder_rows("decoder.", "asr_decoder/", decoder_heads, decoder_depth),
    )


def interface_rows(depth: int, heads: int, source: str = "", target: str = "") -> tuple[Row, ...]:
    """Rows of C-Former and adapter in a checkpoint of the X-LLM repository.

    Args:
      depth, heads: sizes of the C-Former.
      source: what the tensors' names start with.
      target: what our paths start with, such as 'speech_interface/'.
    """
    old, new = f"{source}speech_bert_adaptor.", f"{target}c_former/bert/"
    return (
        *linear(f"{source}pre_bert_proj", f"{target}c_former/project"),
        *bert.rows(depth, heads, source=old, target=new, words=False),
        *linear(f"{source}post_bert_proj", f"{target}adapter"),
    )


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of a CIF ASR model of fairseq."""
    return {"encoder.cif.weight_proj.weight", "encoder.ctc_proj.weight"} <= checkpoint.keys()


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """Sizes of the speech encoder and of the decoder's blocks of self-attention.

    Raises:
      UserError: unknown size, or a file without the tensors that tell it.
    """
    encoder = sizes.row(conformer.SIZES, size)
    decoder = sizes.row(asr.SIZES, size)
    kernel, fires = 5, {}
    if checkpoint is not None:
        width = sizes.axis(checkpoint, "encoder.linear.weight", 0)
        encoder = sizes.row(conformer.SIZES, size, width=width)
        decoder = sizes.row(asr.SIZES, size, width=width)
        decoder["vocab"] = sizes.axis(checkpoint, "decoder.embed_tokens.weight", 0)
        decoder["self_blocks"] = sizes.depth(checkpoint, r"decoder\.layers\.(\d+)\..*")
        kernel = 5 if "encoder.cif.conv.weight" in checkpoint else 0
        told = _arguments(checkpoint)
        sizes.check_named(conformer.SIZES, size, told.get("encoder", {}))
        sizes.check_named(asr.SIZES, size, told.get("decoder", {}))
        encoder, decoder = encoder | told.get("encoder", {}), decoder | told.get("decoder", {})
        kernel = told.get("kernel", kernel)
        fires = told.get("fires", {})
    names = ("vocab", "width", "hidden", "heads", "self_blocks")
    return {
        "encoder": encoder | {"pools": list(encoder["pools"])},
        "decoder": {name: decoder[name] for name in names},
        "kernel": kernel,
        **({"fires": fires} if fires else {}),
    }


def _arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the trainer's arguments within the file, and its tensors, tell of the sizes.

    Returns:
      `encoder`, `decoder`, `kernel` and `fires`, thresholds of CIF that are not its own; empty
      where the file has no arguments.

    Raises:
      UserError: an argument contradicts the tensors, or asks for what no network here computes.
    """
    settings = checkpoint.settings()
    if "encoder_attention_heads" not in settings:
        return {}
    place = f"{checkpoint.path}: cfg.model."
    config = PublishedConfig(DEFAULTS | settings, place, frozenset(settings))
    config.only(**FIXED)
    block, layer = "encoder.conformer_layers.0", "decoder.layers.0"
    encoder = dict(
        width=sizes.axis(checkpoint, "encoder.linear.weight", 0),
        hidden=sizes.axis(checkpoint, f"{block}.ffn1.w_1.weight", 0),
        depth=sizes.depth(checkpoint, r"encoder\.conformer_layers\.(\d+)\..*"),
        kernel=sizes.axis(checkpoint, f"{block}.conv_module.depthwise_conv.weight", 2),
        channels=sizes.axis(checkpoint, "encoder.subsample.conv.0.weight", 0),
    )
    decoder = dict(
        width=sizes.axis(checkpoint, f"{layer}.fc1.weight", 1),
        hidden=sizes.axis(checkpoint, f"{layer}.fc1.weight", 0),
    )
    config.agree(
        encoder_embed_dim=encoder["width"],
        encoder_layers=encoder["depth"],
        encoder_ffn_embed_dim=encoder["hidden"],
        decoder_embed_dim=decoder["width"],
        decoder_ffn_embed_dim=decoder["hidden"],
    )
    encoder["heads"] = config.heads(encoder["width"], "encoder_attention_heads")
    decoder["heads"] = config.heads(decoder["width"], "decoder_attention_heads")
    pools = [int(layer) for layer in str(config.values["pooling_layer_ids"]).split(",") if layer]
    fires = dict(
        threshold=config.values["cif_threshold"],
        tail_threshold=config.values["tail_handling_firing_threshold"],
    )
    conv = "encoder.cif.conv.weight"
    return {
        "encoder": encoder | {"pools": pools if config.values["layer_downsampling"] else []},
        "decoder": decoder,
        "kernel": sizes.axis(checkpoint, conv, 2) if conv in checkpoint else 0,
        "fires": published_config.other_than(SpeechInterface, **fires),
    }


def options_of(base: Base) -> dict[str, Any]:
    """Sizes from a base's parameters."""
    layer, fires = "asr_decoder/self_blocks", "speech_interface/cif/conv/kernel"
    query = f"{layer}/self_attention/query/kernel"
    return {
        "encoder": base_sizes.speech_encoder(base, "speech_encoder"),
        "decoder": dict(
            vocab=base.axis("asr_decoder/embed", 0),
            width=base.axis(query, 1),
            hidden=base.axis(f"{layer}/feed_forward/up/kernel", 2),
            heads=base.axis(query, 2),
            self_blocks=base.axis(query, 0),
        ),
        "kernel": base.axis(fires, 0) if fires in base else 0,
    }


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """Parts 'speech_encoder', 'speech_interface' (its CIF alone) and 'asr_decoder'."""
    encoder = conformer.SpeechEncoder(**options["encoder"])
    decoder = asr.ASRDecoder(**options["decoder"])
    fire = cif.CIF(max_tokens=2, kernel=options["kernel"])
    frames = jnp.zeros((1, 2, encoder.width)), jnp.full(1, 2, jnp.int32)
    table = rows(
        encoder.heads,
        encoder.depth,
        encoder.pools,
        encoder.channels,
        decoder.heads,
        decoder.self_blocks,
        options["kernel"],
    )
    shapes = {
        "speech_encoder": sizes.shapes_of(encoder),
        "speech_interface": {"cif": sizes.shapes_of(fire, *frames)},
        "asr_decoder": sizes.shapes_of(decoder),
    }
    fields = {"speech_interface": options.get("fires", {})}
    return ConversionPlan(table=table, shapes=shapes, drop=DROPPED, fields=fields)
