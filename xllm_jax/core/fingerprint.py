"""What has to be the same on every host before arrays meet: configuration, code, parameters.

`configuration`, `code` and `tree` give {item: text}, for `hosts.agree`; `commit` and `machine` are
words for a report.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path

import jax

from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def configuration(stage: Stage) -> dict[str, str]:
    """Every field of a dataclass with its value, nested ones as 'optimizer.peak'."""

    def walk(value: object, path: str) -> dict[str, str]:
        if isinstance(value, Mapping) and value:
            dot = path + "." if path else ""
            rows = [walk(inner, f"{dot}{name}") for name, inner in value.items()]
            return {name: text for row in rows for name, text in row.items()}
        return {path: repr(value)}

    return walk(dataclasses.asdict(stage), "")


def code(package: Path | None = None) -> dict[str, str]:
    """Hash of every source file of a package, and the versions of what it stands on.

    Args:
      package: its folder; None is the whole of xllm_jax, wherever the caller lies in it.
    """
    package = package or Path(str(resources.files("xllm_jax")))
    # In a checkout some folders are links, which rglob does not enter.
    folders = [Path(folder) for folder, _, _ in os.walk(package, followlinks=True)]
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    found = {str(file.relative_to(package.parent)): digest(file.read_bytes()) for file in files}
    versions = {name: metadata.version(name) for name in PACKAGES}
    return found | versions | {"python": platform.python_version()}


def commit() -> str:
    """The commit of the checkout that the package lies in, '+' behind it where files differ."""
    folder = str(resources.files("xllm_jax"))
    asked = (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--", "."))
    try:
        head, changed = (
            subprocess.run(
                ("git", "-C", folder, *words), capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return f"not in a checkout, version {metadata.version('xllm_jax')}"
    return f"{head}{'+' if changed else ''}"


def machine() -> str:
    """The machine in words: system, cores, memory, and what JAX computes on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = jax.devices()
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB; "
        f"{len(devices)} x {devices[0].device_kind}"
    )


def tree(arrays: Params) -> dict[str, str]:
    """Shape, dtype and sharding of every leaf of a tree of arrays or `ShapeDtypeStruct`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}{list(leaf.shape)} {getattr(leaf.sharding, 'spec', '')}"
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]
    }


def digest(content: bytes) -> str:
    """Short hash of bytes (hex, 12 digits)."""
    return hashlib.sha256(content).hexdigest()[:12]
