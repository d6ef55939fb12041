"""NExT-GPT's delta of its first version (`pytorch_model.pt`, such as 7b_tiva_v0's), and back.

What was trained beside Vicuna and ImageBind, as a base with these parts, as far as the file goes:

    image_projection, video_projection, audio_projection   one head for each layer that is read
    signal_tokens       rows of the added tokens in both tables
    llm                 both tables whole: they were trained, too, and rows were added to them; and
                        the adapters of its attention, as a stage's `lora` has them
    media_projection    the linear map from ImageBind's vectors

The rows of signal tokens stand in the tables of `llm` as well, which must have them; an export
takes them from `signal_tokens`. Names are those of the last stage where there are adapters, else
those of the stages before. What scales the adapters, alpha / rank, no tensor tells: alpha is the
published 32, or `lora_alpha` of a config.json beside the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from xllm_jax.convert import ConversionPlan, Row, mount, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint, Derived, View
from xllm_jax.convert.sources import llama, nextgpt_projection, peft_lora
from xllm_jax.core.errors import UserError
from xllm_jax.models import causal
from xllm_jax.models.outputs.projection import LAST, TransformerProjection
from xllm_jax.models.outputs.signal_tokens import SignalTokens

HEADS = {
    "image": "gen_text_hidden_fcs.",
    "video": "gen_text_hidden_fcs_video.",
    "audio": "gen_text_hidden_fcs_audio.",
}
"""{modality: what the names of its projections begin with}, one number a layer behind it."""
COUNTS = {"image": 4, "video": 24, "audio": 8}
"""Signal tokens of a run; in this order they are the last rows of both tables."""
MEDIA = "llama_proj."
PLAIN, ADAPTED = "llama_model.", "llama_model.base_model.model."
TABLES = {"embedding": llama.WORDS, "head": llama.HEAD}
ALPHA = 32
ADAPTERS = "llm/layers/attention/"


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether tensors are those of a delta of NExT-GPT."""
    return any(name.startswith((*HEADS.values(), MEDIA)) for name in checkpoint)


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """What the delta holds, and of which sizes.

    Args:
      checkpoint: the file; a config.json of the LLM beside it tells its number of heads.
      size: a row of SIZES of `models/causal.py` that tells it else.

    Raises:
      UserError: sizes that nothing tells, or tables that are shorter than what was added.
    """
    if checkpoint is None:
        raise UserError("is told by the base's parameters", field="--size", hint="Leave --size out")
    adapted = any(name.startswith(ADAPTED) for name in checkpoint)
    start = ADAPTED if adapted else PLAIN
    heads = {}
    for kind, name in HEADS.items():
        number = sizes.depth(checkpoint, re.escape(name) + r"(\d+)\..*")
        if number:
            heads[kind] = _head(checkpoint, f"{name}0.") | {"layers": number}
    found: dict[str, Any] = {"start": start, "heads": heads, "tables": None, "media": None}
    if f"{start}{llama.WORDS}" in checkpoint or f"{start}{llama.HEAD}" in checkpoint:
        shape = (sizes.axis(checkpoint, f"{start}{llama.WORDS}", n) for n in (0, 1))
        found["tables"] = list(shape)
        if found["tables"][0] <= sum(COUNTS.values()):
            what = f"has {found['tables'][0]} rows, fewer than NExT-GPT adds"
            where = checkpoint.where(f"{start}{llama.WORDS}")
            raise UserError(what, field=where, hint="Give the delta of its first version")
    if any(name.startswith(MEDIA) for name in checkpoint):
        found["media"] = [sizes.axis(checkpoint, f"{MEDIA}weight", n) for n in (1, 0)]
    return found | {"lora": _adapters(checkpoint, size) if adapted else None}


def _head(checkpoint: Checkpoint, start: str) -> dict[str, int]:
    """Fields of a projection, by one of its heads."""
    return dict(
        width=sizes.axis(checkpoint, f"{start}fc.weight", 0),
        llm_width=sizes.axis(checkpoint, f"{start}fc.weight", 1),
        queries=sizes.axis(checkpoint, f"{start}query_embs", 1),
        output_width=sizes.axis(checkpoint, f"{start}model.weight", 0),
    )


def _adapters(checkpoint: Checkpoint, size: str) -> dict[str, Any] | None:
    """What the adapters belong to: fields of `Causal`, the rank and the adapted products."""
    attention = f"{ADAPTED}model.layers.0.self_attn."
    letter = ".lora_{}.default.weight"
    targets = [
        name
        for name in peft_lora.TARGETS
        if attention + name + letter.format("A") in checkpoint
        or attention + name + letter.format("B") in checkpoint
    ]
    if not targets:
        return None
    first = attention + targets[0]
    depth = sizes.depth(checkpoint, re.escape(f"{ADAPTED}model.layers.") + r"(\d+)\..*lora_.*")
    width = sizes.axis(checkpoint, f"{attention}{targets[0]}{letter.format('A')}", 1)
    fields = {"width": width, "depth": depth}
    config = checkpoint.config()
    if "num_attention_heads" in config:
        heads = config["num_attention_heads"]
        if type(heads) is not int or heads < 1 or width % heads:
            where = f"{checkpoint.config_file()}: num_attention_heads"
            what = f"is {str(heads)[:40]}, and the adapters' width is {width}"
            raise UserError(what, field=where, hint="Put Vicuna's config.json beside the delta")
        key_heads = config.get("num_key_value_heads", heads)
    else:
        row = sizes.fitting(causal.SIZES, size, checkpoint, **fields)
        heads, key_heads = row["heads"], row.get("key_heads")
    rank = sizes.axis(checkpoint, first + letter.format("A"), 0)
    alpha = config.get("lora_alpha", ALPHA)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0 or not rank:
        where = f"{checkpoint.config_file()}: lora_alpha"
        raise UserError(f"is {str(alpha)[:40]}", field=where, hint=f"It is {ALPHA} as published")
    fields |= {"heads": heads, "key_heads": key_heads, "rank": rank, "scale": alpha / rank}
    return fields | {"of": targets}


def options_of(base: Base) -> dict[str, Any]:
    """The same from a base's parameters."""
    heads = {}
    for kind in HEADS:
        at = f"{kind}_projection/head_"
        if number := base.count(re.escape(at) + r"(\d+)/"):
            heads[kind] = dict(
                width=base.axis(f"{at}0/inputs/kernel", 1),
                llm_width=base.axis(f"{at}0/inputs/kernel", 0),
                queries=base.axis(f"{at}0/queries", 0),
                output_width=base.axis(f"{at}0/outputs/kernel", 1),
                layers=number,
            )
    table, media = "llm/embedding", "media_projection/kernel"
    found = {
        "heads": heads,
        "tables": [base.axis(table, n) for n in (0, 1)] if table in base else None,
        "media": [base.axis(media, n) for n in (0, 1)] if media in base else None,
        "lora": _adapters_of(base),
    }
    if not heads and not found["media"]:
        base.axis("image_projection/head_0/inputs/kernel", 0)  # tells that the base lacks it
    return found | {"start": ADAPTED if found["lora"] else PLAIN}


def _adapters_of(base: Base) -> dict[str, Any] | None:
    at = ADAPTERS
    of = [n for n, ours in peft_lora.TARGETS.items() if f"{at}{ours}/lora_a" in base]
    if not of:
        return None
    inner = next((n for n in of if n != "o_proj"), None)
    if inner is None:  # the output alone: its inputs are heads
        path = f"{at}out/lora_a"
        depth, heads, one, rank = (base.axis(path, n) for n in range(4))
        fields = dict(width=heads * one, depth=depth, heads=heads, key_heads=None, rank=rank)
        return fields | {"scale": None, "of": of}
    path = f"{at}{peft_lora.TARGETS[inner]}"
    depth, width, rank = (base.axis(f"{path}/lora_a", n) for n in range(3))
    one = base.axis(f"{path}/lora_b", 3)
    keys = next((n for n in of if n in ("k_proj", "v_proj")), None)
    key_heads = base.axis(f"{at}{peft_lora.TARGETS[keys]}/lora_b", 2) if keys else None
    fields = dict(width=width, depth=depth, heads=width // one, key_heads=key_heads, rank=rank)
    return fields | {"scale": None, "of": of}


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The parts that a delta has."""
    table: list[Row] = []
    shapes: dict[str, Any] = {}
    for kind, told in options["heads"].items():
        part, names = f"{kind}_projection", HEADS[kind]
        fields = {name: value for name, value in told.items() if name != "layers"}
        network = TransformerProjection(llm_layers=(LAST,) * told["layers"], **fields)
        shapes[part] = sizes.shapes_of(network)
        for number in range(told["layers"]):
            rows = nextgpt_projection.rows(f"{names}{number}.", f"head_{number}/")
            table += mount(part, rows)
    if options["tables"]:
        rows, width = options["tables"]
        tokens = SignalTokens(registry(rows), width)
        shapes["signal_tokens"] = sizes.shapes_of(tokens)
        shapes["llm"] = {name: _shape(rows, width) for name in TABLES}
        table += [Row(options["start"] + old, f"llm/{new}") for new, old in TABLES.items()]
        table += [Row(path, f"signal_tokens/{path}") for path in shapes["signal_tokens"]]
    if options["media"]:
        shapes["media_projection"] = {
            "kernel": _shape(*options["media"]),
            "bias": _shape(options["media"][1]),
        }
        table += [
            Row(f"{MEDIA}weight", "media_projection/kernel", "o i -> i o"),
            Row(f"{MEDIA}bias", "media_projection/bias"),
        ]
    if options["lora"]:
        rows, attention = _lora(options["lora"])
        table += rows
        shapes["llm"] = shapes.get("llm", {}) | {"layers": {"attention": attention}}
    return ConversionPlan(table=tuple(table), shapes=shapes)


def registry(rows: int) -> tuple[tuple[str, int, int], ...]:
    """(modality, id of its first signal token, tokens of a run) in tables of so many rows."""
    found, first = [], rows - sum(COUNTS.values())
    for kind, count in COUNTS.items():
        found.append((kind, first, count))
        first += count
    return tuple(sorted(found))


def prepare(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The delta with the rows of its signal tokens beside the tables that they stand in."""
    derived: dict[str, Derived] = {}
    for name, scale in _scales(options["lora"]).items():
        if name not in checkpoint:
            continue
        header, told = checkpoint.header(name), options["lora"]
        derived[name] = Derived((name,), header.shape, header.dtype, lambda x: x)
        value = np.full(told["depth"], told["scale"], header.dtype)
        derived[scale] = Derived((name,), value.shape, header.dtype, lambda _, value=value: value)
    if not options["tables"]:
        return View(checkpoint, derived) if derived else checkpoint
    for ours, theirs in TABLES.items():
        name = options["start"] + theirs
        if name not in checkpoint:
            continue  # the table misses it by its name
        header = checkpoint.header(name)
        derived[name] = Derived((name,), header.shape, header.dtype, lambda x: x)
        for kind, first, count in registry(options["tables"][0]):
            at, shape = slice(first, first + count), (count, *header.shape[1:])
            derived[f"{kind}_{ours}"] = Derived(
                (name,), shape, header.dtype, lambda x, at=at: x[at]
            )
    return View(checkpoint, derived)


def restore(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Exported tensors: the rows of signal tokens go back into both tables, and nothing tells the
    adapters' scale."""
    derived: dict[str, Derived] = {}
    for name, scale in _scales(options["lora"]).items():
        header = tensors.header(name)
        derived[name] = Derived((name, scale), header.shape, header.dtype, lambda x, _: x)
    if not options["tables"]:
        return View(tensors, derived) if derived else tensors
    places = registry(options["tables"][0])
    for ours, theirs in TABLES.items():
        name = options["start"] + theirs
        header = tensors.header(name)
        inputs = (name, *(f"{kind}_{ours}" for kind, _, _ in places))
        derived[name] = Derived(inputs, header.shape, header.dtype, _with_rows(places))
    return View(tensors, derived)


def _scales(told: Mapping[str, Any] | None) -> dict[str, str]:
    """{a tensor of each adapter: how its scale is called}."""
    start = f"{ADAPTED}model.layers.0.self_attn."
    named = told["of"] if told else ()
    return {f"{start}{n}.lora_A.default.weight": f"{start}{n}.lora_scale" for n in named}


def _with_rows(places: tuple[tuple[str, int, int], ...]) -> Callable[..., np.ndarray]:
    def make(table: np.ndarray, *rows: np.ndarray) -> np.ndarray:
        whole = np.array(table)
        for (_, first, count), own in zip(places, rows):
            whole[first : first + count] = own.astype(whole.dtype)
        return whole

    return make


def _lora(told: Mapping[str, Any]) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """Rows and shapes of the adapters of an LLM's attention."""
    model = causal.Causal(
        vocab=1,  # neither words nor feed-forwards have adapters
        hidden=1,
        width=told["width"],
        depth=told["depth"],
        heads=told["heads"],
        key_heads=told["key_heads"] or None,
    )
    rank, depth, width, one = told["rank"], told["depth"], told["width"], model.width // model.heads
    attention: dict[str, Any] = {}
    for name in told["of"]:
        heads = model.heads if name in ("q_proj", "o_proj") else model.key_heads or model.heads
        a, b = ((width,), (heads, one)) if name != "o_proj" else ((heads, one), (width,))
        attention[peft_lora.TARGETS[name]] = {
            "lora_a": _shape(depth, *a, rank),
            "lora_b": _shape(depth, rank, *b),
            "lora_scale": _shape(depth),
        }
    rows = peft_lora.rows(model, told["of"], ADAPTED, target="llm/")
    places = {name: f"{ADAPTERS}{peft_lora.TARGETS[name]}/lora_scale" for name in told["of"]}
    scales = zip(_scales(told).values(), places.values())
    return (*rows, *(Row(name, path) for name, path in scales)), attention


def _shape(*axes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, np.float32)
