"""Stable Diffusion 1.x and 2.x, a pipeline's folder of diffusers or one of its parts, and back.

The base has the parts 'unet', 'vae' and 'text_encoder'; the scheduler's and the tokenizer's files
lie in it as in the published folder, for whoever draws.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xllm_jax.convert import ConversionPlan, Drop, bounds, mount, pipeline_folder, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.sources import clip_text
from xllm_jax.convert.sources import stable_diffusion_text as text
from xllm_jax.convert.sources import stable_diffusion_unet as unet
from xllm_jax.convert.sources import stable_diffusion_vae as vae
from xllm_jax.core.errors import UserError
from xllm_jax.models.clip_text import ClipText
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.outputs.unet import UNet

Network = UNet | Autoencoder | ClipText

PARTS = {"unet": unet, "vae": vae, "text_encoder": text}
"""{folder of the pipeline, and part of ours: what knows it}."""
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}
CONFIGS = tuple(f"{part}/config.json" for part in PARTS)
SCHEDULER = "scheduler/scheduler_config.json"
BESIDE = (
    *CONFIGS,
    SCHEDULER,
    *(
        f"tokenizer/{name}"
        for name in (
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        )
    ),
)
"""Files that travel with the base."""
LEFT = ("scheduler", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
"""Components of an index that are no network which draws."""
DEFAULT_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
"""Of Stable Diffusion 1.5, where a base brings none."""
DROP = tuple(Drop(rf"text_encoder\.{rule.pattern}", rule.reason) for rule in clip_text.DROP)


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of a pipeline's folder, or of one of its parts."""
    return bool(pipeline_folder.folders_of(checkpoint)) or _alone(checkpoint) is not None


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """What each part is, {part: its options}, `alone` for a folder of one part, and the `index`.

    Args:
      checkpoint: the opened files; None exports a base of ours.
      size: a row of SIZES of the UNet and the autoencoder, where no config.json tells it.

    Raises:
      UserError: a part that is none of Stable Diffusion's, or that no network here computes.
    """
    if checkpoint is None:
        raise UserError("is told by the base's parameters", field="--size", hint="Leave --size out")
    alone = _alone(checkpoint)
    if alone:
        return {alone: PARTS[alone].described(checkpoint, size), "alone": True, "index": {}}
    index = pipeline_folder.entries(checkpoint.path)
    _check_index(checkpoint.path, index)
    found: dict[str, Any] = {}
    for folder in pipeline_folder.folders_of(checkpoint):
        part = checkpoint.below(f"{folder}.", checkpoint.path / folder)
        found[folder] = PARTS[folder].described(part, size)
    return found | {"alone": False, "index": index}


def options_of(base: Base) -> dict[str, Any]:
    """The same from a base's parameters, under the names of today's files."""
    found: dict[str, Any] = {
        part: module.measured(base, part) for part, module in PARTS.items() if module.MARK in base
    }
    if not found:
        base.axis(unet.MARK, 0)  # tells that the base lacks it
    return found | {"alone": False, "index": {}}


def networks(options: Mapping[str, Any]) -> dict[str, Network]:
    """{part: network} of such options, in float32."""
    return {part: module.network(options[part]) for part, module in _present(options)}


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The parts that a folder has, with all that lies beside them."""
    table, shapes, fields = [], {}, {}
    for part, module in _present(options):
        network = module.network(options[part])
        rows = module.rows(network, options[part])
        rows = [dataclasses.replace(row, source=f"{part}.{row.source}") for row in rows]
        table += mount(part, rows)
        shapes[part] = sizes.shapes_of(network)
        fields[part] = module.unseen(network)
    present = [part for part, _ in _present(options)]
    return ConversionPlan(
        table=tuple(table),
        shapes=shapes,
        drop=DROP,
        fields=fields,
        extra_files=BESIDE,
        moved_files={"config.json": f"{present[0]}/config.json"} if options["alone"] else {},
        weight_files={f"{part}.": WEIGHTS[part] for part in present},
        written_files=_written(options),
    )


def prepare(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Checkpoint:
    """The tensors under the names that they have in a pipeline's folder."""
    if not options["alone"]:
        return checkpoint
    part = next(part for part, _ in _present(options))
    return checkpoint.under({name: f"{part}.{name}" for name in checkpoint}, checkpoint.renamed)


def _present(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(part, module) for part, module in PARTS.items() if part in options]


def _alone(checkpoint: Checkpoint) -> str | None:
    """Which part a checkpoint is that is no pipeline's folder."""
    return next((part for part, module in PARTS.items() if module.recognize(checkpoint)), None)


def _check_index(path: Path, index: Mapping[str, str | None]) -> None:
    """Raises UserError for components that no network here computes; names them."""
    for name, kind in index.items():
        field = f"{path / pipeline_folder.INDEX}: {name}"
        if kind is None or name in LEFT:
            continue
        if name not in PARTS:
            what = f"is {kind[:80]!r}, which Stable Diffusion 1.x and 2.x do not have"
            raise UserError(what, field=field, hint="Give one of their folders")
        if kind != PARTS[name].KIND:
            what = f"is {kind[:80]!r}, and this source reads {PARTS[name].KIND}"
            raise UserError(what, field=field, hint="Give a folder of Stable Diffusion 1.x or 2.x")


def _written(options: Mapping[str, Any]) -> dict[str, Callable[[Path], str]]:
    """Files of a published folder that an export makes where the base brings none."""
    made: dict[str, Callable[[Path], str]] = {
        f"{part}/config.json": lambda _, part=part, module=module: _json(
            module.config_of(module.network(options[part]), options[part])
        )
        for part, module in _present(options)
    }
    if len(made) < len(PARTS):
        return made
    made[SCHEDULER] = lambda _: _json(DEFAULT_SCHEDULER)
    return made | {pipeline_folder.INDEX: lambda folder: _json(_index(options, folder))}


def _index(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The model_index.json of an exported folder, which has no safety checker."""
    told, scheduler = options["index"], bounds.read_json(folder / SCHEDULER)
    kind = scheduler.get("_class_name") if isinstance(scheduler, Mapping) else None
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", kind or told.get("scheduler")],
        "text_encoder": ["transformers", text.KIND],
    }
    if (folder / "tokenizer").is_dir():
        index["tokenizer"] = ["transformers", told.get("tokenizer") or "CLIPTokenizer"]
    return index | {part: ["diffusers", PARTS[part].KIND] for part in ("unet", "vae")}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
