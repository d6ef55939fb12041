"""What a base says of itself: about.json, and conversion.json where it was converted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, damage
from xllm_jax.core.errors import UserError

CONVERSION = "conversion.json"

Told = tuple[Sequence[int], str]
"""(shape, dtype) of a leaf, as about.json has them."""


def base_about(directory: str | Path) -> dict[str, Any]:
    """Reads `about.json` of a base.

    Raises:
      UserError: the folder is missing, is not a base, or its file is damaged.
    """
    file = atomic.whole_folder(directory) / "about.json"
    if not file.exists():
        raise UserError(
            "no base or finished run here",
            field=str(directory),
            hint="Run the stage that writes it, or xllm convert",
        )
    about = damage.read_object(file)
    with damage.reading(file):
        about["shapes"] = dict(about["shapes"])
        for path, (shape, dtype) in about["shapes"].items():
            if not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"{path} has the shape {shape} of {dtype}")
    return about


def base_origin(directory: str | Path) -> str:
    """One line on where a converted base comes from, by its conversion.json; '' without one."""
    file = atomic.whole_folder(directory) / CONVERSION
    if not file.exists():
        return ""
    done = damage.read_object(file)
    with damage.reading(file):
        names = [f"{row['name']} (sha256 {row['sha256'][:12]})" for row in done["files"][:1]]
        more = f" and {len(done['files']) - 1} more" if len(done["files"]) > 1 else ""
        lost = f"{len(done['dropped'])} tensors dropped, {len(done['fresh'])} leaves fresh"
        said = f"{', '.join(names)}{more}; {lost}; version {done['version']}"
        return f"converted from {done['source']}: {said}"


def base_fields(directory: str | Path, path: str) -> dict[str, Any]:
    """Fields of a network that a converted base was made for, where no shape shows them.

    Args:
      directory: of the base; one that was not converted says nothing.
      path: of a subtree in it, such as 'llm' or 'bert/layers'.
    """
    file = atomic.whole_folder(directory) / CONVERSION
    if not file.exists():
        return {}
    with damage.reading(file):
        return damage.read_object(file).get("fields", {}).get(path.partition("/")[0], {})


def base_networks(directory: str | Path) -> dict[str, dict[str, Any]]:
    """{part: all fields of its network} that a converted base records of parts with sizes of their
    own; one that was not converted records none.

    Raises:
      UserError: the record is damaged.
    """
    file = atomic.whole_folder(directory) / CONVERSION
    if not file.exists():
        return {}
    done = damage.read_object(file)
    with damage.reading(file):
        unseen = done.get("fields", {})
        return {
            part: {**unseen.get(part, {}), **told["fields"]}
            for part, told in done["options"].items()
            if isinstance(told, dict) and "fields" in told
        }
