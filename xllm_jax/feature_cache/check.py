"""Training with a cache: is it of this very stage, and what of the stage is not loaded?

Parameters that only cached steps read are neither loaded nor brought to a device: their bases are
read block by block on the host and compared by checksum. Checksums stand for them in the
identity of the frozen base, too, which is the same with a cache and without: a run may begin in one
way and continue in the other.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import base_description, checkpoint, checksum, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params
from xllm_jax.data import cached_features, mixture
from xllm_jax.data.batching import batch_format
from xllm_jax.data.media import modalities, preprocessing
from xllm_jax.data.media.preprocessing import is_library
from xllm_jax.feature_cache import describe
from xllm_jax.models.xllm import XLLM

OLDER = (
    "The cache {} does not say which libraries and rules made its {} features. Turned or "
    "mirrored files may lie in it as they were coded; to be sure, write it again"
)


def verified(system: System) -> dict[str, str]:
    """Checks that the cache of a stage holds what the stage would compute.

    Args:
      system: of a stage with `data.cache`; without one, nothing is to be checked. On its mesh
        drawn parameters are drawn, part by part.

    Returns:
      {parameter: checksum} of what the cache was computed with.

    Raises:
      UserError: no finished cache, a damaged one, or one of other settings, parameters or sources;
        names them, and the command that writes it again.
    """
    stage = system.stage
    if not stage.data.cache:
        return {}
    about = cached_features.manifest(stage.data.cache)
    hint = cached_features.again(stage.data.cache, about["config"])
    for check in (_steps, _settings, _sources, _shards):
        field, what = check(stage, system.model, about)
        if what:
            raise UserError(what, field=field, hint=hint)
    known = about["base"]
    older = any(map(checksum.is_older, known.values()))
    found = checksums(system, known, older)
    changed = [path for path in sorted(known) if found.get(path) != known[path]]
    if changed:
        part = changed[0].split("/")[0]
        what = f"another {part} than the cache was computed with ({changed[0]} differs)"
        raise UserError(what, field=f"init.{part}", hint=hint)
    if not older:
        return found
    checksum.warn(f"data.cache: {stage.data.cache}")
    return checksums(system, known)


def _steps(stage: Stage, xllm: XLLM, about: Mapping[str, Any]) -> tuple[str, str]:
    if not batch_format.find(stage.data).caches:
        return batch_format.FIELD, describe.no_features(stage.data)
    for name, kind in about["modalities"].items():
        if name not in xllm.frozen or name not in (*stage.data.items, *xllm.encoders):
            return "data.cache", f"it holds {name!r}, which the stage does not have"
        if name in xllm.given:
            return f"data.{name}_features", f"the cache was made of files that are {name} itself"
        if xllm.frozen[name] < kind["steps"]:
            step = xllm.chain(name)[xllm.frozen[name]]
            return "trainable", f"{step} trains, and the cache holds its outcome for every {name}"
    return "", ""


def _settings(stage: Stage, xllm: XLLM, about: Mapping[str, Any]) -> tuple[str, str]:
    for name, kind in about["modalities"].items():
        then, now = kind["fields"], describe.fields(stage, xllm, name, kind["steps"])
        media = preprocessing.of_modality(modalities.find(name, stage.data), stage.data)
        libraries = {key: then[key] for key in media.keys() & then.keys() if is_library(key)}
        if not libraries and any(map(is_library, media)):
            print(OLDER.format(stage.data.cache, name), file=sys.stderr, flush=True)
        apart = libraries or media
        field, how = describe.difference(
            *({key: value for key, value in one.items() if key not in apart} for one in (then, now))
        )
        if field:
            return field, how
        hint = f"{preprocessing.HINT}. {cached_features.again(stage.data.cache, about['config'])}"
        when = "when the cache was written"
        preprocessing.compare(libraries, media, when, stage.data.libraries, hint)
    return "", ""


def _sources(stage: Stage, xllm: XLLM, about: Mapping[str, Any]) -> tuple[str, str]:
    data = stage.data
    sizes = {name: len(mixture.of_stage(name, data)) for name in mixture.mixture(data)}
    for name, now in describe.sources(data, sizes).items():
        if name not in about["sources"]:
            return f"data.sources.{name}", "is not in the cache"
        field, how = describe.difference(about["sources"][name], now)
        if field:
            return f"data.sources.{name}", f"its {field} {how}"
    return "", ""


def _shards(stage: Stage, xllm: XLLM, about: Mapping[str, Any]) -> tuple[str, str]:
    for name, kind in about["modalities"].items():
        for number, size in enumerate(kind["bytes"]):
            shard = cached_features.shard_name(name, number, kind["shards"])
            file = Path(stage.data.cache) / shard
            if not file.is_file() or file.stat().st_size != size:
                return str(file), f"is missing or has not the {size:,} bytes that were written"
    return "", ""


def checksums(system: System, paths: Collection[str], older: bool = False) -> dict[str, str]:
    """{parameter: checksum} of those of `paths` that the stage has, none of them kept.

    Args:
      system: of the stage.
      paths: of parameters.
      older: see `checksum.identity`.

    Raises:
      UserError: a base is missing.
    """
    shapes, stage, like = system.uncached.shapes, system.stage, system.uncached.parameters
    paths = sorted(shapes.keys() & set(paths))
    origins = parameters.origins(stage.init, paths)
    folders = {folder for folder, _ in origins.values()}
    opened = {folder: checkpoint.open_leaves(folder) for folder in folders}
    found: dict[str, str] = {}
    for path, (folder, name) in origins.items():
        stores = opened[folder]
        if name in stores and tuple(stores[name].shape) == tuple(shapes[path].shape):
            found[path] = checksum.of_store(stores[name], like[path].dtype, older)
    drawn = [path for path in paths if path not in origins]
    return found | checksum.of_tree(loaded(system, drawn), older)


def loaded(system: System, paths: Collection[str]) -> Params:
    """Some frozen parameters, whether the networks read them or their outcome is cached."""
    return parameters.parameters(system.whole, set(paths)) if paths else {}


def base(frozen: Params, cached: Mapping[str, str], older: bool = False) -> dict[str, str]:
    """{part: identity} of a frozen base of which some parameters are known by checksum alone.

    Args:
      frozen: {part: tree} of those that are loaded.
      cached: {parameter: checksum} of the others.
      older: see `checksum.identity`.
    """
    parts: dict[str, dict[str, str]] = {}
    for path, text in (dict(cached) | checksum.of_tree(frozen, older)).items():
        part, _, rest = path.partition("/")
        parts.setdefault(part, {})[rest] = text
    return {part: checksum.combined(parts[part]) for part in sorted(parts)}


def older_base(system: System, frozen: Params, cached: Collection[str]) -> dict[str, str]:
    """As `base`, in the checksums of older runs.

    Args:
      system: of the stage.
      frozen: see `base`.
      cached: parameters that are not loaded.
    """
    unread = checksums(system, cached, older=True) if cached else {}
    return base(frozen, unread, older=True)


def completed(system: System, params: Mapping[str, Any], cached: Mapping[str, str]) -> Params:
    """Parts that trained, with the frozen parameters of theirs that were not loaded.

    Args:
      system: of the training.
      params: {part: tree} as far as it is loaded.
      cached: what `verified` found.

    Raises:
      UserError: they are not any more what they were at the start.
    """
    flat = rules.flatten(params)
    missing = [p for p in cached if p not in flat and p.split("/")[0] in params]
    added = rules.flatten(loaded(system, missing))
    for path, text in checksum.of_tree(rules.unflatten(added)).items():
        if text != cached[path]:
            what = f"{path} is another one than at the start of the run"
            raise UserError(what, field="init", hint="Bring it back; the same command continues")
    flat |= added
    missing = unread_parameters(system, set(flat)) if system.model.given else set()
    return rules.unflatten(flat | rules.flatten(loaded(system, missing)))


def unread_parameters(system: System, known: Collection[str]) -> set[str]:
    """Parameters of some parts that the run did without, since files hold what they make.

    Whoever has such files need not have the networks: only what `init` has, and fits, is named.

    Args:
      system: of the training.
      known: parameters of these parts that are there already.
    """
    parts = {path.split("/")[0] for path in known}
    shapes = system.whole.shapes
    missing = {path for path in shapes.keys() - known if path.split("/")[0] in parts}
    try:
        origins = parameters.origins(system.stage.init, missing)
        held = {
            place: base_description.base_about(place)["shapes"] for place, _ in origins.values()
        }
    except UserError:
        return set()

    def fits(path: str) -> bool:
        place, name = origins[path]
        return name in held[place] and tuple(held[place][name][0]) == shapes[path].shape

    return {path for path in origins if fits(path)}
