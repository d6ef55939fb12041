"""Parameters of a stage: drawn, converted bases, parts of earlier runs; where each of them lies."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh

from xllm_jax.assembly.networks import MODELS, fresh, shapes, whole
from xllm_jax.core import checkpoint, lookup, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.models.xllm import XLLM


def specs(stage: Stage, tree: Mapping[str, Any]) -> dict[str, Any]:
    """PartitionSpec of every parameter, from the SHARDING rows of each part's file."""
    return {
        name: rules.assign(
            lookup.attribute(MODELS, part.network)[0].SHARDING,
            tree[name],
            what=f"{part.network} SHARDING",
            total=False,
        )
        for name, part in stage.parts.items()
        if name in tree
    }


def offloaded(stage: Stage, tree: Mapping[str, Any]) -> set[str]:
    """Paths of the parameters that stay in the hosts' memory.

    Raises:
      UserError: a pattern of `stage.offload` matches nothing, or what trains.
    """
    if not stage.offload:
        return set()
    far = rules.flatten(rules.split(stage.offload, tree, what="offload")[0]).keys()
    both = far & rules.flatten(rules.split(stage.trainable, tree)[0]).keys()
    if both:
        raise UserError(
            f"{min(both)!r} trains", field="offload", hint="Only frozen parameters can stay away"
        )
    return set(far)


def resident(stage: Stage, params: Mapping[str, Any]) -> dict[str, Any]:
    """Copies what stays in the hosts' memory to the chips, inside jit.

    Left out is what the networks fetch themselves, layer by layer (STREAMED of each part's file).
    """
    streamed = {
        name: getattr(lookup.attribute(MODELS, part.network)[0], "STREAMED", ())
        for name, part in stage.parts.items()
    }

    def place(path: str, leaf: jax.Array) -> jax.Array:
        part, _, inner = path.partition("/")
        fetched = any(re.fullmatch(pattern, inner) for pattern in streamed[part])
        return leaf if fetched else mesh.on_device(leaf)

    return rules.unflatten({path: place(path, x) for path, x in rules.flatten(params).items()})


def abstract_parameters(
    stage: Stage, xllm: XLLM, device_mesh: Mesh, dtypes: Mapping[str, Any] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every parameter, flat; arguments as in `parameters`."""
    tree = shapes(xllm)
    shardings = rules.flatten(mesh.parameter_shardings(device_mesh, specs(stage, tree), tree))
    far = offloaded(stage, tree)
    shardings |= {path: shardings[path].with_memory_kind(mesh.HOST) for path in far}
    kinds = rules.flatten(dtypes) if dtypes else {}
    return {
        path: jax.ShapeDtypeStruct(x.shape, kinds.get(path, x.dtype), sharding=shardings[path])
        for path, x in rules.flatten(tree).items()
    }


def parameters(
    stage: Stage,
    xllm: XLLM,
    device_mesh: Mesh,
    dtypes: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Every part's parameters, drawn or loaded as `stage.init` says, sharded and in their dtype.

    A part, or any subtree of it such as 'speech_interface/cif', can come from elsewhere; what no
    row of `init` covers is drawn, from a key that depends on the part's name alone.

    Args:
      stage: names the source of each subtree.
      xllm: the networks.
      device_mesh: where the parameters go.
      dtypes: tree of dtypes per leaf; float32 everywhere when None.
      only: paths of the leaves that are wanted; None for all that the networks read.

    Raises:
      UserError: `init` names a subtree that no part has, or a source does not fit.
    """
    like = abstract_parameters(stage, xllm, device_mesh, dtypes)
    if only is not None:
        like = {path: x for path, x in like.items() if path in only}
    everything = rules.flatten(shapes(whole(xllm)))
    unread = {path: x for path, x in everything.items() if path not in like}
    params: dict[str, Any] = {}
    for prefix, source in ordered(stage.init):
        wanted, others = below(prefix, like), below(prefix, unread)
        if not wanted and not others:
            raise UserError("no part has this subtree", field=f"init.{prefix}", hint="See parts")
        if source and wanted:
            params |= load(source, prefix, wanted, others)
    for name, net in xllm.networks.items():
        missing = {p: x for p, x in like.items() if p.startswith(name + "/") and p not in params}
        if missing:
            stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            key = jax.random.fold_in(jax.random.key(stage.seed), stream)
            params |= draw(net, name, key, missing)
    return rules.unflatten(params)


def ordered(init: Mapping[str, str]) -> list[tuple[str, str]]:
    """Rows of `init`, whole parts before subtrees of theirs, which then prevail."""
    return sorted(init.items(), key=lambda row: row[0].count("/"))


def below(prefix: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of one subtree."""
    return {p: x for p, x in flat.items() if p == prefix or p.startswith(prefix + "/")}


def draw(
    net: nn.Module, name: str, key: jax.Array, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Fresh values of the leaves in `like` (flat), made in their dtype where they will lie."""

    def init(key: jax.Array) -> dict[str, Any]:
        drawn = rules.flatten({name: fresh(net, key)})
        return {path: drawn[path].astype(want.dtype) for path, want in like.items()}

    return jax.jit(init, out_shardings={p: x.sharding for p, x in like.items()})(key)


def load(
    source: str,
    prefix: str,
    like: Mapping[str, jax.ShapeDtypeStruct],
    others: Collection[str] = (),
) -> dict[str, jax.Array]:
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
    place, inner = origin(source, prefix)
    renamed = {inner + path[len(prefix) :]: x for path, x in like.items()}
    unread = [inner + path[len(prefix) :] for path in others]
    told = checkpoint.base_origin(place)
    if told:
        print(f"{prefix}: {place}, {told}", file=sys.stderr, flush=True)
    if source.endswith("*"):
        held = checkpoint.base_about(place)["shapes"]
        shared = {path: x for path, x in renamed.items() if path in held}
        logging.info("%s: %d of %d leaves from %s", prefix, len(shared), len(renamed), place)
        renamed = shared or renamed
    exact = not source.endswith("*")
    found = checkpoint.load_leaves(place, inner, renamed, exact, unread)
    return {prefix + path[len(inner) :]: leaf for path, leaf in found.items()}


def origin(source: str, prefix: str) -> tuple[Path, str]:
    """(folder that really holds what a row of `init` names, the subtree there)."""
    directory, _, other = source.removesuffix("*").partition(":")
    inner = other or prefix
    return locate(directory, inner), inner


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
        held = checkpoint.base_about(place)["shapes"]
        named = {path: inner + path[len(prefix) :] for path in wanted}
        taken = {path: (place, n) for path, n in named.items() if n in held or source[-1] != "*"}
        found |= taken
    return found


def locate(directory: str | Path, part: str) -> Path:
    """The folder that really holds a part: a base, a run's result, or what the run started from."""
    directory = Path(directory)
    final = directory / "final"
    if not checkpoint.base_exists(final):
        return directory
    about = checkpoint.base_about(final)
    if any(path.startswith(part + "/") for path in about["shapes"]):
        return final
    source = about["stage"]["init"].get(part, "").removesuffix("*")
    inner, _, other = source.partition(":")
    return locate(inner, other or part) if source else final
