"""A Stage becomes networks and parameters: fresh ones, converted bases, parts of earlier runs."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh

from xllm_jax.core import checkpoint, find, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Part, Stage
from xllm_jax.models import layers
from xllm_jax.models.xllm import XLLM

MODELS = "xllm_jax.models"


def network(part: Part, stage: Stage, name: str) -> nn.Module:
    """Builds one part's network from its SIZES row, the part's own fields and the stage's dtype.

    Raises:
      UserError: unknown network, size, field or choice of `remat`.
    """
    file, kind = find.attribute(MODELS, part.network, f"parts.{name}.network")
    if part.size not in file.SIZES:
        raise UserError(
            f"unknown size {part.size!r}",
            field=f"parts.{name}.size",
            mend=f"Choices: {', '.join(file.SIZES)}",
        )
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = set(part.fields) - known
    if unknown:
        raise UserError(
            f"{part.network} has no field {sorted(unknown)[0]!r}",
            field=f"parts.{name}.fields",
            mend=f"Choices: {', '.join(sorted(known - {'parent', 'name'}))}",
        )
    if stage.remat not in layers.REMAT:
        choices = ", ".join(layers.REMAT)
        raise UserError(
            f"unknown choice {stage.remat!r}", field="remat", mend=f"Choices: {choices}"
        )
    common = {"dtype": jnp.dtype(stage.compute), "remat": stage.remat, "unroll": stage.unroll}
    common = {key: value for key, value in common.items() if key in known}
    return kind(**{**file.SIZES[part.size], **common, **part.fields})


def model(stage: Stage) -> XLLM:
    """Composes the networks of a stage; holds no parameters.

    Raises:
      UserError: a modality names a part that the stage does not have.
    """
    networks = {name: network(part, stage, name) for name, part in stage.parts.items()}
    rows = tuple((name, m.encoder, m.interface) for name, m in stage.modalities.items())
    for name, *parts in rows:
        for part in parts:
            if part not in networks:
                raise UserError(
                    f"names the part {part!r}, which parts lacks",
                    field=f"modalities.{name}",
                    mend=f"Choices: {', '.join(networks)}",
                )
    return XLLM(networks=networks, modalities=rows)


def fresh(network: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Freshly drawn float32 parameters of one network."""
    return network.init({"params": key}, *network.example())["params"]


def shapes(xllm: XLLM) -> dict[str, Any]:
    """Shapes of every parameter, `{part: tree}`, without allocating anything."""
    key = jax.random.key(0)
    return {n: jax.eval_shape(lambda m=m: fresh(m, key)) for n, m in xllm.networks.items()}


def specs(stage: Stage, tree: Mapping[str, Any]) -> dict[str, Any]:
    """PartitionSpec of every parameter, from the SHARDING rows of each part's file."""
    return {
        name: rules.assign(
            find.attribute(MODELS, part.network)[0].SHARDING,
            tree[name],
            what=f"{part.network} SHARDING",
            total=False,
        )
        for name, part in stage.parts.items()
    }


def abstract_parameters(
    stage: Stage, xllm: XLLM, device_mesh: Mesh, dtypes: Mapping[str, Any] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every parameter, flat; arguments as in `parameters`."""
    tree = shapes(xllm)
    shardings = rules.flatten(mesh.parameter_shardings(device_mesh, specs(stage, tree), tree))
    kinds = rules.flatten(dtypes) if dtypes else {}
    return {
        path: jax.ShapeDtypeStruct(x.shape, kinds.get(path, x.dtype), sharding=shardings[path])
        for path, x in rules.flatten(tree).items()
    }


def parameters(
    stage: Stage, xllm: XLLM, device_mesh: Mesh, dtypes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every part's parameters, drawn or loaded as `stage.init` says, sharded and in their dtype.

    A part, or any subtree of it such as 'speech_interface/cif', can come from elsewhere; what no
    row of `init` covers is drawn, from a key that depends on the part's name alone.

    Args:
      stage: names the source of each subtree.
      xllm: the networks.
      device_mesh: where the parameters go.
      dtypes: tree of dtypes per leaf; float32 everywhere when None.

    Raises:
      UserError: `init` names a subtree that no part has, or a source does not fit.
    """
    like = abstract_parameters(stage, xllm, device_mesh, dtypes)
    params: dict[str, Any] = {}
    for prefix, source in sorted(stage.init.items(), key=lambda row: row[0].count("/")):
        wanted = {p: x for p, x in like.items() if p == prefix or p.startswith(prefix + "/")}
        if not wanted:
            raise UserError("no part has this subtree", field=f"init.{prefix}", mend="See parts")
        if source:
            params |= load(source, prefix, wanted)
    for name, net in xllm.networks.items():
        missing = {p: x for p, x in like.items() if p.startswith(name + "/") and p not in params}
        if missing:
            stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            key = jax.random.fold_in(jax.random.key(stage.seed), stream)
            params |= draw(net, name, key, missing)
    return rules.unflatten(params)


def draw(
    net: nn.Module, name: str, key: jax.Array, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Fresh values of the leaves in `like` (flat), made in their dtype where they will lie."""

    def init(key: jax.Array) -> dict[str, Any]:
        drawn = rules.flatten({name: fresh(net, key)})
        return {path: drawn[path].astype(want.dtype) for path, want in like.items()}

    return jax.jit(init, out_shardings={p: x.sharding for p, x in like.items()})(key)


def load(
    source: str, prefix: str, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Loads the leaves of one subtree (flat) from 'DIR' or 'DIR:other_subtree'.

    A '*' at the end of the source takes only the leaves that both sides have, and says how many
    were left; without it, every leaf must be there and none may be over.

    Raises:
      UserError: nothing there, or it does not fit.
    """
    directory, _, other = source.removesuffix("*").partition(":")
    inner = other or prefix
    renamed = {inner + path[len(prefix) :]: x for path, x in like.items()}
    place = locate(directory, inner)
    origin = checkpoint.base_origin(place)
    if origin:
        print(f"{prefix}: {place}, {origin}", file=sys.stderr, flush=True)
    if source.endswith("*"):
        held = checkpoint.base_about(place)["shapes"]
        shared = {path: x for path, x in renamed.items() if path in held}
        logging.info("%s: %d of %d leaves from %s", prefix, len(shared), len(renamed), place)
        renamed = shared or renamed
    found = checkpoint.load_leaves(place, inner, renamed, exact=not source.endswith("*"))
    return {prefix + path[len(inner) :]: leaf for path, leaf in found.items()}


def locate(directory: str | Path, part: str) -> Path:
    """The folder that really holds a part: a base, a run's result, or what the run started from."""
    directory = Path(directory)
    final = directory / "final"
    if not final.exists():
        return directory
    about = checkpoint.base_about(final)
    if any(path.startswith(part + "/") for path in about["shapes"]):
        return final
    source = about["stage"]["init"].get(part, "").removesuffix("*")
    inner, _, other = source.partition(":")
    return locate(inner, other or part) if source else final


def stage_of(directory: str | Path) -> dict[str, Any]:
    """The stage that a finished run was trained with, as plain data."""
    return checkpoint.base_about(Path(directory) / "final")["stage"]
