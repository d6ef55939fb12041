"""Sizes of our networks, read off the parameters of a base: what an export without record needs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from xllm_jax.assembly import packed_weights
from xllm_jax.core import base_description
from xllm_jax.core.errors import UserError
from xllm_jax.models import lora, quantized


def check_kernel(path: str, leaves: Collection[str], base: Path) -> None:
    """Tells why a base lacks a kernel where the names beside it show that.

    Args:
      path: of the kernel.
      leaves: paths of what the base holds.
      base: its folder.

    Raises:
      UserError: it is packed, or there are adapters alone.
    """
    place = path.rpartition("/")[0]
    beside = [name for name in leaves if name.rpartition("/")[0] == place]
    if any(map(quantized.is_packed, beside)):
        told = base_description.base_about(base)
        kind = packed_weights.kind_of(told["shapes"], path.partition("/")[0]) or "integers"
        made = f", such as the one that it says it was made of ({told['source']})"
        hint = "Export the base of floats" + (made if "source" in told else "")
        raise UserError(f"is packed in {kind}: {path} is no float", field=str(base), hint=hint)
    part = path.partition("/")[0]
    inside = [name for name in leaves if name.startswith(f"{part}/")]
    if inside and all(map(lora.is_adapter, inside)):
        hint = "xllm adapter --action=merge makes a base of both, --action=export a file of PEFT's"
        raise UserError(f"holds adapters without their base: no {path}", field=str(base), hint=hint)


class Base:
    """Shapes of a base's parameters.

    Args:
      shapes: {path: shape}.
      place: the base's folder, for errors.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], place: Path):
        self.shapes, self._place = shapes, place

    def __contains__(self, path: str) -> bool:
        return path in self.shapes

    def axis(self, path: str, number: int) -> int:
        """Length of one axis of a parameter.

        Raises:
          UserError: the base lacks it, or it has fewer axes.
        """
        shape = self.shapes.get(path, ())
        if not -len(shape) <= number < len(shape):
            check_kernel(path, self.shapes, self._place)
            raise UserError(
                "the base lacks this parameter",
                field=f"{self._place}: {path}",
                hint="Check that --source and --size are what the base was made from",
            )
        return shape[number]

    def count(self, pattern: str) -> int:
        """One more than the largest number that `pattern`'s group finds in a path; 0 for none."""
        found = (re.match(pattern, path) for path in self.shapes)
        return max((1 + int(match[1]) for match in found if match), default=0)


def stack(base: Base, at: str) -> dict[str, int]:
    """Width, depth, heads and hidden of stacked layers.

    Args:
      base: the parameters.
      at: what their paths start with, such as 'vision_encoder/layers'.
    """
    query = f"{at}/attention/query/kernel"  # [depth, width, heads, head width]
    names = {"depth": 0, "width": 1, "heads": 2}
    found = {name: base.axis(query, number) for name, number in names.items()}
    return found | {"hidden": base.axis(f"{at}/feed_forward/up/kernel", 2)}


def tower(base: Base, at: str) -> dict[str, int]:
    """Fields of a vision tower (`VisionTransformer`, `ClipVision`) whose paths start with `at`."""
    patch = base.axis(f"{at}/embeddings/patches/kernel", 0)
    side = round((base.axis(f"{at}/embeddings/positions", 0) - 1) ** 0.5)
    return {"image_size": side * patch, "patch": patch, **stack(base, f"{at}/layers")}


def bert(base: Base, at: str) -> dict[str, int]:
    """Fields of `BertEncoder` whose paths start with `at`; a missing table has no rows."""
    tables = {"vocabulary": "words", "positions": "positions", "types": "types"}
    found = {
        field: base.axis(path, 0)
        for field, name in tables.items()
        if (path := f"{at}/embeddings/{name}") in base
    }
    return stack(base, f"{at}/layers") | found


def qformer(base: Base, at: str) -> dict[str, int]:
    """Fields of `QFormer` whose paths start with `at`."""
    group = f"{at}/groups" if f"{at}/groups/layer_0/attention/out/bias" in base else f"{at}/tail"
    query = f"{group}/layer_0/attention/query/kernel"
    found = {name: base.axis(query, number) for name, number in (("width", 1), ("heads", 2))}
    groups = base.axis(query, 0) if group.endswith("/groups") else 0
    rest = base.count(re.escape(at) + r"/tail/layer_(\d+)/")
    # Less than a whole group: any frequency that is longer has the same layers.
    frequency = base.count(re.escape(group) + r"/layer_(\d+)/") if groups else rest + 1
    kind = next((k for k in ("query", "text") if _up(group, k) in base), "query")
    tables = {"vocabulary": "words", "positions": "positions"}
    return found | {
        "depth": groups * frequency + rest,
        "cross_attention_frequency": frequency,
        "hidden": base.axis(_up(group, kind), 2),
        **{f: base.axis(p, 0) for f, n in tables.items() if (p := f"{at}/embeddings/{n}") in base},
    }


def interface(base: Base, at: str) -> dict[str, int]:
    """Fields of `QFormerInterface` or `ContrastModel` whose paths start with `at`."""
    return qformer(base, f"{at}/qformer") | ends(base, at)


def ends(base: Base, at: str) -> dict[str, int]:
    """Fields of an interface that are told by what stands before and behind its transformer."""
    optional = {
        "llm_width": (f"{at}/adapter/kernel", 1),
        "embed": (f"{at}/image_projection/kernel", 1),
        "queries": (f"{at}/queries", 0),
        "encoder_width": (f"{at}/norm/scale", 0),
    }
    speech = {"encoder_width": (f"{at}/c_former/project/kernel", 0)}
    optional |= speech if speech["encoder_width"][0] in base else {}
    return {f: base.axis(*where) for f, where in optional.items() if where[0] in base}


def speech_interface(base: Base, at: str) -> dict[str, int]:
    """Fields of `SpeechInterface` whose paths start with `at`, but for its CIF."""
    found = bert(base, f"{at}/c_former/bert")
    found.pop("types", None)  # as many as every BERT has
    return found | ends(base, at)


def speech_encoder(base: Base, at: str) -> dict[str, Any]:
    """Fields of `SpeechEncoder` whose paths start with `at`."""
    blocks = base.count(re.escape(at) + r"/blocks_(\d+)/")
    first = f"{at}/blocks_0"
    depths = [base.axis(f"{at}/blocks_{n}/attention_norm/scale", 0) for n in range(max(blocks, 1))]
    return {
        "width": base.axis(f"{first}/attention/query/kernel", 1),
        "heads": base.axis(f"{first}/attention/query/kernel", 2),
        "hidden": base.axis(f"{first}/feed_forward_in/up/kernel", 2),
        "kernel": base.axis(f"{first}/convolution/depthwise", 1),
        "channels": base.axis(f"{at}/front_end/conv/bias", 0),
        "depth": sum(depths),
        "pools": [sum(depths[: n + 1]) for n in range(len(depths) - 1)],
    }


def _up(group: str, kind: str) -> str:
    return f"{group}/layer_0/{kind}_feed_forward/up/kernel"
