"""Mesh, shardings from path rules, and host arrays to global arrays.

The user's "sharded with pjit" is `jax.jit` with `NamedSharding` today. Axes are Auto (explicit ones
break ordinary Linen code): 'data' splits the batch, 'fsdp' splits batch and parameters, 'tensor'
splits heads and hidden widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xllm_jax.core import rules
from xllm_jax.core.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that split a batch


def make(axes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh of a stage.

    Args:
      axes: {axis: size}; one size may be -1 and takes the devices that are left; axes that are not
        named have size 1.
      devices: all devices when None.

    Raises:
      UserError: an unknown axis, a size that is neither positive nor -1, or sizes that do not
        multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = sizes(axes, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def sizes(axes: Mapping[str, int], count: int) -> tuple[int, ...]:
    """Sizes of AXES on `count` devices; arguments and errors as in `make`."""
    unknown = set(axes) - set(AXES)
    if unknown:
        raise UserError(f"unknown axis {sorted(unknown)[0]!r}", field="mesh", mend=f"Use {AXES}")
    wrong = [axis for axis, size in axes.items() if size < 1 and size != -1]
    if wrong:
        raise UserError(
            f"{wrong[0]!r} has the size {axes[wrong[0]]}",
            field="mesh",
            mend="Give a positive size, or -1 for the devices that are left",
        )
    asked = [axes.get(axis, 1) for axis in AXES]
    known = math.prod(size for size in asked if size != -1)
    made = tuple(max(count // known, 1) if size == -1 else size for size in asked)
    if math.prod(made) != count:
        raise UserError(
            f"{dict(zip(AXES, made))} needs {math.prod(made)} devices, there are {count}",
            field="mesh",
            mend="Give one axis the size -1",
        )
    return made


def batch_spec() -> PartitionSpec:
    """Sharding of every batch array: the leading axis over 'data' and 'fsdp'."""
    return PartitionSpec(ROWS)


def parameter_shardings(mesh: Mesh, specs: Mapping[str, Any], tree: Mapping[str, Any]) -> dict:
    """Turns a tree of PartitionSpecs into NamedShardings that fit the leaves' shapes.

    An axis of a leaf that the mesh axis does not divide stays whole: a tiny model runs on any mesh,
    and at the real sizes every row divides.
    """
    flat = rules.flatten(tree)
    return rules.unflatten(
        {
            path: NamedSharding(mesh, fitting(mesh, spec, flat[path].shape))
            for path, spec in rules.flatten(specs).items()
        }
    )


def fitting(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """Drops from `spec` the entries that do not divide the axis they stand for."""
    entries = []
    for length, entry in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec))):
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        size = math.prod(mesh.shape[name] for name in names)
        entries.append(entry if length % size == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *entries: Any) -> jax.Array:
    """Constrains an activation inside jit; does nothing where no mesh is set.

    Args:
      x: any array.
      entries: mesh axes of each array axis, as in a PartitionSpec; what does not divide its axis
        is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    fits = fitting(mesh, PartitionSpec(*entries), x.shape)
    free = PartitionSpec.UNCONSTRAINED
    kept = [free if asked and not fit else fit for asked, fit in zip(entries, fits)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def constrain_rows(x: jax.Array, tensor_axis: int | None = None) -> jax.Array:
    """Constrains `[rows, ...]`: rows over 'data' and 'fsdp', one more axis over 'tensor'.

    Without it the compiler likes to split widths where the parameters are split, and then sums
    whole activations over the devices in the place of gathering one layer's parameters.
    """
    entries: list[Any] = [None] * x.ndim
    entries[0] = ROWS
    if tensor_axis is not None:
        entries[tensor_axis] = "tensor"
    return constrain(x, *entries)


def tensor_parallel() -> bool:
    """Whether the mesh that is set splits heads and hidden widths."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1


def to_global(mesh: Mesh, batch: Any) -> Any:
    """Turns this host's arrays into global arrays, split along their leading axis.

    Args:
      batch: pytree of NumPy arrays `[rows of this host, ...]`.
    """
    sharding = NamedSharding(mesh, batch_spec())
    replicated = NamedSharding(mesh, PartitionSpec())
    count = mesh.shape["data"] * mesh.shape["fsdp"]

    def place(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        if x.ndim == 0:
            return jax.device_put(x, replicated)
        if (x.shape[0] * jax.process_count()) % count:
            raise UserError(
                f"{x.shape[0] * jax.process_count()} rows do not split over {count} devices",
                field="data.rows",
                mend="Choose a multiple of the data and fsdp axes' product",
            )
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(place, batch)
