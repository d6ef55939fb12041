"""The shards of a prepared set are those that its manifest describes, byte for byte.

Reading all of a large set takes minutes, so what was found whole is remembered on the host, outside
of the set, until a shard's size, time or place on the disk is another one.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, bounded, host_cache
from xllm_jax.core.errors import UserError
from xllm_jax.data.rows import files

MANIFEST = "manifest.json"
THREADS = 4
MEND = "Prepare the set again with the same command, which writes damaged shards anew"


def check(folder: Path, split: str) -> None:
    """Compares the shards of a split with the manifest, the first time on this host.

    Args:
      folder: of the set; one without a manifest is not looked at.
      split: of it.

    Raises:
      UserError: a shard is missing or differs.
    """
    shards = _shards(folder / MANIFEST, split)
    known = [[one["file"], one["sha256"], *_state(folder / one["file"])] for one in shards]
    found = json.dumps(known)
    name = hashlib.sha256(os.fsencode(folder.resolve() / split)).hexdigest()
    note = host_cache.folder("verified") / f"{name}.json"
    if not shards or _remembered(note) == found:
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for problem in pool.map(lambda shard: differs(folder, shard), shards):
            if problem:
                raise UserError(problem[1], field=problem[0], hint=MEND)
    with contextlib.suppress(OSError, UserError):  # else the set is read again the next time
        atomic.write_json(note, found)


def differs(folder: Path, shard: Mapping[str, Any]) -> tuple[str, str] | None:
    """(file, how it differs) of a shard that is not what its note says, else None."""
    file = folder / shard["file"]
    try:
        if file.exists() and not file.is_file():  # a pipe could be waited for without end
            return str(file), "is no file"
        if file.stat().st_size != shard["bytes"]:
            return str(file), f"has not the {shard['bytes']} bytes that {MANIFEST} says"
        if atomic.sha256(file) != shard["sha256"]:
            return str(file), f"has another checksum than {MANIFEST} says"
    except (OSError, ValueError) as error:
        return ascii(str(file))[1:-1], f"cannot be read ({getattr(error, 'strerror', error)})"
    return None


def _shards(manifest: Path, split: str) -> list[dict[str, Any]]:
    """The notes of a split's shards; none where there is no manifest, or it has no such split."""
    if not manifest.is_file():
        return []
    try:
        with files.opened(manifest):
            splits = bounded.read_json(manifest)["splits"]
        shards = splits[split]["shards"] if split in splits else []
        _check_complete(manifest.parent, split, splits)
        odd = [s for s in shards if os.path.basename(str(s["file"])) != s["file"]]
        known = [{key: shard[key] for key in ("file", "bytes", "sha256")} for shard in shards]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"is no description of a set ({type(error).__name__})"
        raise UserError(what, field=str(manifest), hint=MEND) from None
    if odd:
        raise UserError("names files outside of its folder", field=str(manifest))
    return known


def _check_complete(folder: Path, split: str, splits: Mapping[str, Any]) -> None:
    """Raises ValueError where a shard of a split lies there that no split describes."""
    known = {shard["file"] for one in splits.values() for shard in one["shards"]}
    for file in sorted(folder.glob(f"*-{glob.escape(split)}.array_record-*")):
        if file.name not in known:
            raise ValueError(f"{file.name} is not described")


def _state(file: Path) -> tuple[int, ...]:
    """What changes when a file is written."""
    try:
        state = file.stat()
    except (OSError, ValueError):  # not there, or a name that no file system knows
        return ()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def _remembered(note: Path) -> str | None:
    try:
        return bounded.read_json(note)
    except (OSError, ValueError, RecursionError, UserError):
        return None
