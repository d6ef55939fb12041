"""The projector of LLaVA 1.5 (arXiv 2310.03744) to `models/mlp_interface.py` and back.

`mm_projector.bin` and whole checkpoints name the two linear maps `mm_projector.0` and `.2`, folders
of transformers' `LlavaForConditionalGeneration` `multi_modal_projector.linear_1` and `.linear_2`.
Both run a GELU between them. Sizes are told by the shapes; what the projector reads of the vision
tower (the class token or not) is in config.json alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import ConversionPlan, Drop, Row, mount, published_config, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.sources.bert import linear, told
from xllm_jax.core import words
from xllm_jax.core.errors import UserError
from xllm_jax.models.mlp_interface import SIZES, MLPInterface

PART = "image_interface"
PUBLISHED = ("model.mm_projector.0", "model.mm_projector.2")
LAYOUTS = (
    PUBLISHED,
    ("mm_projector.0", "mm_projector.2"),
    # As a training with LoRA leaves it in non_lora_trainables.bin.
    tuple(f"base_model.model.{name}" for name in PUBLISHED),
    ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
)
"""Names of the two maps."""
LINEAR = tuple(f"{start}mm_projector.weight" for start in ("", "model.", "base_model.model.model."))
"""Of the first LLaVA, whose projector is one map."""
KINDS = ("llava", "llava_llama")
PROJECTOR = "mlp2x_gelu"
DEFAULTS = dict(projector_hidden_act="gelu", multimodal_projector_bias=True)
"""Of transformers' LlavaConfig."""
STRATEGIES = {"default": 1, "full": 0}  # of transformers
SELECTED = {"patch": 1, "cls_patch": 0}  # of LLaVA's own CLIP tower
"""{what a configuration says: features at the beginning that are left out}."""
DROP = (
    Drop(r"(model\.)?vision_tower\..*", "the vision tower; --source=clip_vision reads CLIP's own"),
    Drop(r"(model\.)?language_model\..*|lm_head\.weight", "the LLM"),
    Drop(r"model\.(layers\..*|embed_tokens\.weight|norm\.weight)", "the LLM"),
)


def rows(first: str = PUBLISHED[0], second: str = PUBLISHED[1]) -> tuple[Row, ...]:
    """The table.

    Args:
      first, second: names of the two maps, a row of LAYOUTS.
    """
    return (*linear(first, "hidden"), *linear(second, "adapter"))


def _layouts(checkpoint: Checkpoint) -> list[tuple[str, ...]]:
    return [names for names in LAYOUTS if f"{names[0]}.weight" in checkpoint]


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds a projector of LLaVA."""
    return bool(_layouts(checkpoint)) or any(name in checkpoint for name in LINEAR)


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """How the file names its tensors, and the projector's fields.

    Args:
      checkpoint: the file; None exports a projector of our own under the published names.
      size: a row of `models/mlp_interface.py`'s SIZES, for comparison.

    Raises:
      UserError: an unknown size, not exactly one projector of two maps, or a config.json that
        contradicts it or describes what the network does not compute.
    """
    if checkpoint is None:
        return {"names": list(PUBLISHED), "sizes": sizes.row(SIZES, size)}
    found = _layouts(checkpoint)
    if not found:
        what = "is a projector of one linear map, as the first LLaVA has it, and ours has two"
        hint = "Give LLaVA 1.5's, such as llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5"
        raise UserError(what, field=str(checkpoint.path), hint=hint)
    if len(found) > 1:
        what = f"expected one projector of LLaVA, found {len(found)}"
        raise UserError(what, field=str(checkpoint.path), hint="Give one model's files")
    fields = _sizes(checkpoint, *found[0])
    sizes.check_named(SIZES, size, fields)
    return {"names": list(found[0]), "sizes": fields}


def options_of(base: Base) -> dict[str, Any]:
    """The published names, and the projector's sizes from a base's parameters."""
    hidden, adapter = (f"{PART}/{name}/kernel" for name in ("hidden", "adapter"))
    found = dict(zip(("encoder_width", "hidden"), (base.axis(hidden, n) for n in (0, 1))))
    return {"names": list(PUBLISHED), "sizes": found | {"llm_width": base.axis(adapter, 1)}}


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The projector as part 'image_interface'."""
    fields = options["sizes"]
    seen = {name: fields[name] for name in ("skip",) if name in fields}
    return ConversionPlan(
        table=mount(PART, rows(*options["names"])),
        shapes={PART: sizes.shapes_of(MLPInterface(**fields))},
        drop=DROP,
        fields={PART: told(fields) | seen},
    )


def _sizes(checkpoint: Checkpoint, first: str, second: str) -> dict[str, Any]:
    """Fields of `MLPInterface`: by the shapes, the rest by config.json."""
    hidden, read = (sizes.axis(checkpoint, f"{first}.weight", n) for n in (0, 1))
    made = sizes.axis(checkpoint, f"{second}.weight", 0)
    fields = dict(encoder_width=read, hidden=hidden, llm_width=made)
    config = published_config.read(checkpoint, DEFAULTS, KINDS)
    if config is None:
        return fields
    config.only(multimodal_projector_bias=True, mm_projector_type=PROJECTOR)
    config.agree(mm_hidden_size=read, hidden_size=made)
    activation = config.activation("projector_hidden_act")
    for section, width in (("vision_config", read), ("text_config", made)):
        _agree(config, section, width)
    special = published_config.other_than(MLPInterface, activation=activation)
    return fields | special | _skipped(config)


def _agree(config: published_config.PublishedConfig, section: str, width: int) -> None:
    """Compares the width of a network beside the projector, where config.json tells it."""
    inner = config.values.get(section)
    if isinstance(inner, Mapping) and inner.get("hidden_size", width) != width:
        what = f"is {words.shown(inner['hidden_size'])}, and the projector has {width}"
        place = f"{config.place}{section}.hidden_size"
        raise UserError(what, field=place, hint="Give the config.json of this checkpoint")


def _skipped(config: published_config.PublishedConfig) -> dict[str, int]:
    """`MLPInterface.skip`, where config.json tells it."""
    tower = config.values.get("mm_vision_tower")
    known = (
        ("vision_feature_select_strategy", STRATEGIES, True),
        ("mm_vision_select_feature", SELECTED, isinstance(tower, str) and "clip" in tower),
    )
    for name, choices, applies in known:
        said = config.values.get(name)
        if said is None or not applies:
            continue
        if not isinstance(said, str) or said not in choices:
            raise config.refuse(name, f"known are {', '.join(choices)}")
        return {"skip": choices[said]}
    return {}
