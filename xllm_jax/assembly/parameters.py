"""Parameters of a stage: drawn, converted bases, parts of earlier runs; where each of them lies."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import jax
from absl import logging
from flax import linen as nn

from xllm_jax.assembly import adapters, frame_rate, outputs, packed_weights
from xllm_jax.assembly.networks import init_params
from xllm_jax.assembly.system import System
from xllm_jax.core import base_description, checkpoint, damage, kernel_fingerprint, rules
from xllm_jax.core.base_description import Told
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Flat, Params, Shapes
from xllm_jax.models import lora

T = TypeVar("T")


def parameters(system: System, only: Collection[str] | None = None) -> Params:
    """Every part's parameters, drawn or loaded as `init` says, sharded and in their dtype.

    A part, or any subtree of it such as 'speech_interface/cif', can come from elsewhere; what no
    row of `init` covers is drawn, from a key that depends on the part's name alone.

    Args:
      system: `stage.init` names the source of each subtree.
      only: paths of the leaves that are wanted; None for all that the networks read.

    Raises:
      UserError: `init` names a subtree that no part has, or a source does not fit.
    """
    like = system.parameters
    if only is not None:
        like = {path: x for path, x in like.items() if path in only}
    unread = {path: x for path, x in system.whole.shapes.items() if path not in like}
    params: Flat = {}
    for prefix, source in ordered(system.stage.init):
        wanted, others = below(prefix, like), below(prefix, unread)
        # What a row for a part of this subtree brings need not fit here, such as a longer table.
        inner = [name for name in system.stage.init if name.startswith(f"{prefix}/")]
        brought = {path for name in inner if system.stage.init[name] for path in below(name, like)}
        others |= {path: x for path, x in wanted.items() if path in brought}
        wanted = {path: x for path, x in wanted.items() if path not in brought}
        if not wanted and not others:
            raise UserError("no part has this subtree", field=f"init.{prefix}", hint="See parts")
        if source and wanted:
            check_fields(system.model.networks, source, prefix)
            frame_rate.check(system, origin(source, prefix)[0], prefix)
            there = held(source, prefix)
            part = prefix.partition("/")[0]
            weights = system.stage.parts[part].weights
            packed_weights.check_source(part, weights, wanted, there)
            params |= load(source, prefix, *with_adapters(source, prefix, wanted, others, there))
    settings, seed = system.stage.lora, system.stage.seed
    if settings.init:
        params |= load_adapters(system.stage, like)
    drawn: set[str] = set()
    for name, net in system.model.networks.items():
        missing = {p: x for p, x in like.items() if p.startswith(name + "/") and p not in params}
        if missing:
            stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            key = jax.random.fold_in(jax.random.key(seed), stream)
            low = {path: x for path, x in missing.items() if lora.is_adapter(path)}
            params |= adapters.draw(settings, seed, low) if low else {}
            plain = {path: x for path, x in missing.items() if path not in low}
            params |= draw(net, name, key, plain) if plain else {}
            drawn |= missing.keys()
    made = adapters.magnitudes(rules.unflatten(params), drawn)
    return outputs.start_signals(system.model, made, drawn)


def held(source: str, prefix: str) -> dict[str, Told]:
    """{path: (shape, dtype)} of what a source holds of a subtree, named as the stage does."""
    found: dict[str, Told] = {}
    inner = _inner(source, prefix)
    for place in filter(None, _places(source, inner)):
        there = below(inner, base_description.base_about(place)["shapes"])
        found |= {prefix + path[len(inner) :]: told for path, told in there.items()}
    return found


def with_adapters(
    source: str,
    prefix: str,
    like: Shapes,
    others: Collection[str],
    there: Mapping[str, Told],
) -> tuple[Shapes, list[str]]:
    """What of a subtree is loaded, and what else its source may hold.

    Adapters that the source lacks are not loaded, and a share of dropout is the stage's own.

    Args:
      source: where from.
      prefix: of the subtree.
      like: all leaves that are wanted.
      others: leaves of the subtree that the model has and that are not wanted.
      there: {path: (shape, dtype)} of what the source holds.

    Raises:
      UserError: the source has adapters, and the stage none, or not all of them, or others.
    """
    low = {path for path in there if lora.is_adapter(path)}
    wanted = {path: x for path, x in like.items() if path in low or not lora.is_adapter(path)}
    if low and len(wanted) == sum(not lora.is_adapter(path) for path in like):
        hint = "Name them in lora.targets, or write a base without: xllm adapter --action=merge"
        raise UserError(f"{source} has adapters", field=f"init.{prefix}", hint=hint)
    for path in sorted(filter(_given, low - like.keys())):
        what = f"{source} has, and lora.targets does not name, {path}"
        hint = "Say in lora.targets and lora.dora what the adapters are"
        raise UserError(what, field=f"init.{prefix}", hint=hint)
    for path in sorted(wanted.keys() & low):
        _check_adapter(path, tuple(there[path][0]), wanted[path].shape, f"init.{prefix}")
    own = [path for path in low if path.endswith(f"/{lora.DROPOUT}")]
    return {path: x for path, x in wanted.items() if path not in own}, [*others, *own]


def load_adapters(stage: Stage, like: Shapes) -> Flat:
    """Adapters from where `lora.init` says.

    Args:
      stage: the settings.
      like: of all parameters that are wanted.

    Raises:
      UserError: none is there, or other ones than the stage's.
    """
    low = {path: x for path, x in like.items() if lora.is_adapter(path)}
    found: Flat = {}
    for part in sorted({path.partition("/")[0] for path in low}):
        base, own = _places(stage.lora.init, part)
        place = own or base
        about = base_description.base_about(place)
        there = {path for path in below(part, about["shapes"]) if _given(path)}
        wanted = {path: x for path, x in below(part, low).items() if _given(path)}
        for path in sorted(there ^ wanted.keys()):
            where = "lacks" if path in wanted else "has, and lora.targets does not name,"
            hint = "Say in lora.targets, lora.dora and lora.rank what the adapters are"
            raise UserError(f"{place} {where} {path}", field="lora.init", hint=hint)
        for path, x in wanted.items():
            _check_adapter(path, tuple(about["shapes"][path][0]), x.shape, "lora.init")
        if stage.init.get(part):
            known = about.get(kernel_fingerprint.FIELD, {})
            check_base(stage.init[part], part, place, known, "lora.init")
        found |= checkpoint.load_leaves(place, part, wanted, exact=False)
    return found


def _check_adapter(path: str, have: tuple[int, ...], wanted: tuple[int, ...], field: str) -> None:
    """Compares the shape of a leaf of an adapter with the stage's."""
    if have == wanted:
        return
    if path.endswith(f"/{lora.A}") and have[:-1] == wanted[:-1]:
        what = f"is {wanted[-1]}, and the adapters that {field} names have {have[-1]}"
        raise UserError(what, field="lora.rank", hint=f"Say --config.lora.rank={have[-1]}")
    what = f"{path} has shape {have}, the stage {wanted}"
    raise UserError(what, field=field, hint="They are of another rank or of another base")


def check_base(source: str, part: str, place: Path, known: Mapping[str, str], field: str) -> None:
    """Compares a base with the one that adapters say they belong to.

    Args:
      source: where the base comes from, as a row of `init`.
      part: of the base.
      place: folder of the adapters, for the error.
      known: {kernel: fingerprint}, as the adapters have it.
      field: of the stage that named the adapters, for the error.

    Raises:
      UserError: a kernel has other values; names it.
    """
    if not known:
        return
    folder, inner = origin(source, part)
    leaves = {
        part + path[len(inner) :]: store
        for path, store in below(inner, checkpoint.open_leaves(folder)).items()
    }
    about = base_description.base_about(folder)
    places = {path.removesuffix(kernel_fingerprint.KERNEL) for path in known}
    ours = kernel_fingerprint.of_leaves(leaves, about, places)
    for path in sorted(known.keys() & ours.keys()):
        if known[path] != ours[path]:
            what = f"{place} is of another base: {path} has other values in {folder}"
            raise UserError(what, field=field, hint="Give the base that it was trained on")


def _given(path: str) -> bool:
    """Whether it is of an adapter and not the stage's own, as a share of dropout is."""
    return lora.is_adapter(path) and not path.endswith(f"/{lora.DROPOUT}")


def check_fields(networks: Mapping[str, nn.Module], source: str, prefix: str) -> None:
    """Compares a part's network with what a converted base was made for.

    Args:
      networks: {part: network}.
      source: where the subtree comes from.
      prefix: of the subtree.

    Raises:
      UserError: a field that no shape shows has another value; names it.
    """
    place, inner = origin(source, prefix)
    part = prefix.partition("/")[0]
    for name, value in base_description.base_fields(place, inner).items():
        have = getattr(networks[part], name, value)
        have = dict(have) if isinstance(have, Mapping) else have  # Linen freezes what it is given
        if have != value:
            flag = f"--config.parts.{part}.fields.{name}={value}"
            what = f"is {have}, and {place} was made for {value}"
            raise UserError(what, field=f"parts.{part}.fields.{name}", hint=f"Say {flag}")


def ordered(init: Mapping[str, str]) -> list[tuple[str, str]]:
    """Rows of `init`, whole parts before subtrees of theirs, which then prevail."""
    return sorted(init.items(), key=lambda row: row[0].count("/"))


def below(prefix: str, flat: Mapping[str, T]) -> dict[str, T]:
    """The leaves of one subtree."""
    return {p: x for p, x in flat.items() if p == prefix or p.startswith(prefix + "/")}


def draw(net: nn.Module, name: str, key: jax.Array, like: Shapes) -> Flat:
    """Draws the leaves in `like`, in their dtype and where they will lie.

    Args:
      net: the network that initializes them.
      name: of its part, the first word of the paths.
      key: that it draws from.
      like: of the leaves that are wanted.
    """

    axes = packed_weights.axes_of(net, name, like)

    def init(key: jax.Array) -> Flat:
        plain = rules.flatten({name: init_params(net, key)})
        return packed_weights.drawn(axes, like, plain)

    return jax.jit(init, out_shardings={p: x.sharding for p, x in like.items()})(key)


def load(
    source: str,
    prefix: str,
    like: Shapes,
    others: Collection[str] = (),
) -> Flat:
    """Loads the leaves of one subtree (flat) from 'DIR' or 'DIR:other_subtree'.

    A '*' at the end of the source takes only the leaves that both sides have, and says how many
    were left; without it, every leaf must be there and none may be over.

    Args:
      source: where from.
      prefix: of the subtree.
      like: the leaves that are wanted.
      others: leaves of the subtree that the model has and that are not wanted.

    Raises:
      UserError: nothing there, or it does not fit.
    """
    inner = _inner(source, prefix)
    place, own = _places(source, inner)
    renamed = {inner + path[len(prefix) :]: x for path, x in like.items()}
    unread = [inner + path[len(prefix) :] for path in others]
    low: Flat = {}
    if own:
        about = base_description.base_about(own)
        part = prefix.partition("/")[0]
        known = about.get(kernel_fingerprint.FIELD, {})
        check_base(str(place), part, own, known, f"init.{prefix}")
        wanted = {path: x for path, x in renamed.items() if path in about["shapes"]}
        low = checkpoint.load_leaves(own, inner, wanted, exact=False) if wanted else {}
        # A base may have adapters of its own, in whose place these are.
        unread += [path for path in base_description.base_about(place)["shapes"] if path in low]
        renamed = {path: x for path, x in renamed.items() if path not in low}
    written = base_description.base_origin(place)
    if written:
        print(f"{prefix}: {place}, {written}", file=sys.stderr, flush=True)
    if source.endswith("*"):
        held = base_description.base_about(place)["shapes"]
        shared = {path: x for path, x in renamed.items() if path in held}
        logging.info("%s: %d of %d leaves from %s", prefix, len(shared), len(renamed), place)
        renamed = shared or renamed
    exact = not source.endswith("*")
    found = low | checkpoint.load_leaves(place, inner, renamed, exact, unread)
    return {prefix + path[len(inner) :]: leaf for path, leaf in found.items()}


def origin(source: str, prefix: str) -> tuple[Path, str]:
    """(folder that really holds what a row of `init` names, the subtree there)."""
    inner = _inner(source, prefix)
    return _places(source, inner)[0], inner


def _inner(source: str, prefix: str) -> str:
    """The subtree that a row of `init` for `prefix` takes from its source."""
    return source.removesuffix("*").partition(":")[2] or prefix


def _places(source: str, inner: str) -> tuple[Path, Path | None]:
    """`places` of the folder that a row of `init` names."""
    return places(source.removesuffix("*").partition(":")[0], inner)


def origins(init: Mapping[str, str], paths: Collection[str]) -> dict[str, tuple[Path, str]]:
    """{parameter: (folder, path there)} of those of `paths` that are not drawn.

    Raises:
      UserError: a folder is missing.
    """
    found: dict[str, tuple[Path, str]] = {}
    for prefix, source in ordered(init):
        wanted = below(prefix, dict.fromkeys(paths))
        if not source or not wanted:
            continue
        place, inner = origin(source, prefix)
        held = base_description.base_about(place)["shapes"]
        own = _places(source, inner)[1]
        low = base_description.base_about(own)["shapes"] if own else {}
        named = {path: inner + path[len(prefix) :] for path in wanted}
        taken = {
            path: (own if own and n in low else place, n)
            for path, n in named.items()
            if n in low or n in held or (source[-1] != "*" and not lora.is_adapter(path))
        }
        found |= taken
    return found


def places(directory: str | Path, part: str) -> tuple[Path, Path | None]:
    """Where a part really lies: in a base, in a run's result, or in what the run started from.

    Args:
      directory: of a base, of a run, or of a run's result.
      part: or a subtree of it.

    Returns:
      (folder of the part, folder of its adapters where they lie beside a reference to the part).
    """
    directory = Path(directory)
    folder = directory / "final" if checkpoint.base_exists(directory / "final") else directory
    if not checkpoint.base_exists(folder):
        return folder, None
    about = base_description.base_about(folder)
    inside = below(part, about["shapes"])
    referred = bool(inside) and all(map(lora.is_adapter, inside))
    alone = folder == directory and (not referred or "stage" not in about)  # not a run's result
    if (inside and not referred) or alone:
        return folder, None
    top = part.partition("/")[0] if referred else part
    with damage.reading(folder):
        source = about["stage"]["init"].get(top, "").removesuffix("*")
        inner, _, other = source.partition(":")
        if not source:
            return folder, None
        base, low = places(resolved(inner, folder), other or part)
    return base, folder if referred else low


def resolved(path: str, folder: Path) -> str:
    """A path that was named where a run started, which is one of the folders above the run's."""
    above = (parent / path for parent in folder.absolute().parents)
    return str(next((place for place in above if place.exists()), path))


def refers(stage: Stage, part: str, trained: Collection[str]) -> bool:
    """Whether a run's result holds adapters of a part and a reference to the rest of it.

    Args:
      stage: of the run.
      part: that trained.
      trained: paths of all that trained.
    """
    inside = below(part, dict.fromkeys(trained))
    rows = [name for name in stage.init if name.startswith(f"{part}/")]
    source = stage.init.get(part, "")
    plain = bool(source) and source[-1] != "*" and ":" not in source and not rows
    return plain and bool(inside) and all(map(lora.is_adapter, inside))


def fingerprints(stage: Stage, part: str, paths: Collection[str]) -> dict[str, str]:
    """{kernel: hash} of the base of those kernels of a part that have adapters.

    Args:
      stage: its `init` names the base.
      part: of the base.
      paths: of the adapters.
    """
    folder, _ = origin(stage.init[part], part)
    beside = {path.rpartition("/")[0] for path in paths}
    about = base_description.base_about(folder)
    return kernel_fingerprint.of_leaves(checkpoint.open_leaves(folder), about, beside)
