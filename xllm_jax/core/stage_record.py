"""Stages as plain data, of this version and of older ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.core.lora_settings import Lora
from xllm_jax.core.stage import (
    Best,
    Data,
    Divergence,
    Optimizer,
    Output,
    Part,
    Route,
    Signals,
    Source,
    Stage,
    Validation,
)

# How fields and values were called before; checkpoints of that time are still read.
_OLDER_FIELDS = {"held_out": "validation"}
_OLDER_METRICS = {"held_out/": "validation/"}
_OLDER_OBJECTIVES = {"contrast": ("blip2_pretraining", {}), "glm": ("answer", {"perplexity": True})}
_OLDER_FORMATS = {
    "text": "blank_infilling",
    "pairs": "image_text_pairs",
    "sentences": "text_pairs",
    "attributes": "scene_attributes",
}
_OLDER_NETWORKS = {"contrast.ContrastModel": "blip2_pretraining.ContrastModel"}


def metric_names(name: str) -> tuple[str, ...]:
    """Names under which checkpoints may hold a metric: today's, and the one of older runs."""
    older = [
        old + name.removeprefix(new) for old, new in _OLDER_METRICS.items() if name.startswith(new)
    ]
    return (name, *older)


def _todays(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a stage in today's names."""
    made = {_OLDER_FIELDS.get(name, name): value for name, value in record.items()}
    name, options = _OLDER_OBJECTIVES.get(made["objective"], (made["objective"], {}))
    made |= {"objective": name, "options": options | made["options"]}
    made["parts"] = {
        name: part | {"network": _OLDER_NETWORKS.get(part["network"], part["network"])}
        for name, part in made["parts"].items()
    }
    if "form" in made["data"]:
        data = dict(made["data"])
        form = data.pop("form")
        made["data"] = data | {"batch_format": _OLDER_FORMATS.get(form, form)}
    best = dict(made.get("best", {}))  # older runs have none
    for old, new in _OLDER_METRICS.items():
        if best.get("metric", "").startswith(old):
            best["metric"] = new + best["metric"].removeprefix(old)
    return made | {"best": best}


def parse_stage(record: Mapping[str, Any]) -> Stage:
    """A Stage from the plain data of `dataclasses.asdict`, of this version or an older one."""
    record = _todays(record)
    data = dict(record["data"])
    data["sources"] = {name: _source(source) for name, source in data["sources"].items()}
    data["frames"] = tuple(data["frames"])
    data["signals"] = {name: Signals(**row) for name, row in data.get("signals", {}).items()}
    optimizer = dict(record["optimizer"])
    optimizer["no_decay"] = tuple(optimizer["no_decay"])
    changed = {
        "parts": {name: Part(**part) for name, part in record["parts"].items()},
        "modalities": {name: Route(**row) for name, row in record["modalities"].items()},
        "outputs": {name: Output(**row) for name, row in record.get("outputs", {}).items()},
        "optimizer": Optimizer(**optimizer),
        "data": Data(**data),
        "best": Best(**record["best"]),
        "validation": _validation(record.get("validation", {})),
        "trainable": tuple(record["trainable"]),
        "lora": Lora(**record.get("lora", {})),
        "divergence": Divergence(**record.get("divergence", {})),
        "profile": tuple(record.get("profile", ())),
    }
    return Stage(**{**record, **changed})


def _source(record: Mapping[str, Any]) -> Source:
    return Source(**{**record, "allow_paths": tuple(record.get("allow_paths", ()))})


def _validation(record: Mapping[str, Any]) -> Validation:
    sources = {name: _source(source) for name, source in record.get("sources", {}).items()}
    metrics = tuple(record.get("metrics", ()))
    return Validation(**{**record, "sources": sources, "metrics": metrics})
