"""A pipeline's folder of diffusers: a model_index.json, and each network in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_jax.convert import bounds
from xllm_jax.convert.files import Checkpoint, open_checkpoint
from xllm_jax.core.errors import UserError

INDEX = "model_index.json"
FOLDERS = ("unet", "vae", "text_encoder")
"""Folders whose weights are read; no other name of an index leads to a file."""


def open_pipeline(path: Path) -> Checkpoint:
    """All networks of the folder that its index names, each tensor as 'unet.NAME' and so on.

    Raises:
      UserError: an index that is none, a folder that it names and that is not there, or damage.
    """
    parts, named = {}, entries(path)
    for folder in (one for one in FOLDERS if named.get(one)):
        if not (path / folder).is_dir():
            what = f"is missing, and {INDEX} names it"
            raise UserError(what, field=str(path / folder), hint="Download it again")
        parts[f"{folder}."] = open_checkpoint(path / folder)
    if not parts:
        what = f"names none of {', '.join(FOLDERS)}"
        raise UserError(what, field=str(path / INDEX), hint="Give a pipeline that draws")
    return Checkpoint.joined(path, parts)


def entries(path: Path) -> dict[str, str | None]:
    """{component: its class} of an index; None for a component that the pipeline lacks.

    Raises:
      UserError: it is no index.
    """
    index: Any = bounds.read_json(path / INDEX)
    if not isinstance(index, Mapping):
        raise UserError(
            "is no index of a pipeline", field=str(path / INDEX), hint="Download it again"
        )
    found: dict[str, str | None] = {}
    for name, value in index.items():
        pair = isinstance(value, list) and len(value) == 2
        if pair and all(one is None or isinstance(one, str) for one in value):
            found[name] = value[1]
    return found


def folders_of(checkpoint: Checkpoint) -> list[str]:
    """Which of FOLDERS a checkpoint holds; none for one that is no pipeline's folder."""
    starts = {name.partition(".")[0] for name in checkpoint}
    return [folder for folder in FOLDERS if folder in starts]
