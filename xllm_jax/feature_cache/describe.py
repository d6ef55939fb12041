"""What a cache of a stage holds, and every setting that its values depend on, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Stage
from xllm_jax.data import mixture
from xllm_jax.data.batching import batch_format
from xllm_jax.data.media import modalities, preprocessing
from xllm_jax.models.xllm import XLLM


def no_features(data: Data) -> str:
    """What is wrong where batches hold no media, of which features could be cached."""
    return f"batches of the format {data.batch_format!r} take no cached features"


def depths(stage: Stage, xllm: XLLM, asked: Sequence[str] = ()) -> dict[str, int]:
    """{modality: steps to be cached}.

    Args:
      stage: of the training.
      xllm: its networks.
      asked: modalities; empty for all that have something frozen.

    Raises:
      UserError: nothing to cache, a modality without frozen steps, or one whose media differ from
        epoch to epoch.
    """
    if not batch_format.find(stage.data).caches:
        raise UserError(no_features(stage.data), field=batch_format.FIELD)
    known = {name: xllm.frozen[name] for name, *_ in xllm.modalities if name in stage.data.items}
    known |= {name: xllm.frozen[name] for name in xllm.encoders}
    known |= dict.fromkeys(known.keys() & xllm.given.keys(), 0)  # small files already
    for name in asked:
        if not known.get(name):
            what = f"the stage has nothing frozen for {name!r}" if name in known else "is not there"
            what = f"the files of {name!r} hold features" if name in xllm.given else what
            choices = [name for name, count in known.items() if count]
            raise UserError(what, field=f"modalities.{name}", hint=f"Choices: {choices}")
    chosen = {n: count for n, count in known.items() if count and (not asked or n in asked)}
    if not chosen:
        raise UserError("nothing that reads media is frozen", field="trainable")
    for name in chosen:
        steady(name, stage.data, list(chosen))
    return chosen


def steady(modality: str, data: Data, chosen: Sequence[str] = ()) -> None:
    """Raises UserError where the media of a modality are augmented at random."""
    for field in modalities.find(modality, data).random(data):
        others = [name for name in chosen if name != modality]
        leave = f", or cache the others: --modality={','.join(others)}" if others else ""
        raise UserError(
            f"augments every {modality} anew in each epoch, and a cache holds one outcome",
            field=field,
            hint=f"Turn it off ({_off(field, data)}){leave}, or train without a cache",
        )


def _off(field: str, data: Data) -> str:
    """How an option is turned off."""
    value: Any = dataclasses.asdict(data)
    for name in field.split(".")[1:]:
        value = value[name]
    value = {bool: "False", tuple: "()", list: "()"}.get(type(value))
    return f"--config.{field}={value}" if value else "in the stage's file"


def fields(stage: Stage, xllm: XLLM, modality: str, count: int) -> dict[str, Any]:
    """{name of a setting: value} of all that decides the outcome of a modality's first steps."""
    medium = modalities.find(modality, stage.data)
    found: dict[str, Any] = {"compute": stage.compute, "frozen": stage.frozen}
    if modality in stage.modalities:
        found |= _flat(f"modalities.{modality}", dataclasses.asdict(stage.modalities[modality]))
    for part in dict.fromkeys(step.part for step in xllm.chain(modality)[:count]):
        found |= _flat(f"parts.{part}", dataclasses.asdict(stage.parts[part]))
    for name, value in medium.values(stage.data).items():
        found |= _flat(f"data.{name}", value)
    if modality in stage.data.modalities:
        found[f"data.modalities.{modality}"] = stage.data.modalities[modality]
    if medium.spoken:
        found[f"data.embeddings.{modality}"] = stage.data.embeddings[modality]
    found |= preprocessing.of_modality(medium, stage.data)
    return json.loads(json.dumps(found))


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key in value:
        found |= _flat(f"{name}.{key}", value[key])
    return found


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str]:
    """(the first setting that differs, how in words); ('', '') where none does."""
    for name in sorted(then.keys() | now.keys()):
        if name not in then or name not in now or then[name] != now[name]:
            old, new = (repr(d[name]) if name in d else "not set" for d in (then, now))
            return name, f"was {old} when the cache was written and is {new} now"
    return "", ""


def sources(data: Data, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """{name: reader, path, split, options and records} of the sources that take part."""
    about = {}
    for name in mixture.mixture(data):
        about[name] = dataclasses.asdict(data.sources[name]) | {"records": sizes[name]}
        del about[name]["allow_paths"]
        if about[name]["share"] == 1:  # as older caches have it
            del about[name]["share"]
    return json.loads(json.dumps(about))
