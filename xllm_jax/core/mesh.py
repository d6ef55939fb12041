"""Mesh, shardings from path rules, and host arrays to global arrays.

The user's "sharded with pjit" is `jax.jit` with `NamedSharding` today. Axes are Auto (explicit ones
break ordinary Linen code): 'data' splits the batch, 'fsdp' splits batch and parameters, 'tensor'
splits heads and hidden widths. Several slices (or nodes) lie along 'data', or 'fsdp' where asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Device, Params

Tree = TypeVar("Tree")  # of arrays

Entry = str | tuple[str, ...] | None  # of a PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that split a batch
HOST = "pinned_host"  # the memory of a chip's host, from which the chip can copy


def make(
    axes: Mapping[str, int],
    devices: list[Device] | None = None,
    slices: Mapping[str, int] | None = None,
) -> Mesh:
    """Builds the mesh of a stage.

    Args:
      axes: {axis: size} inside one slice; one size may be -1 and takes the devices that are left;
        axes that are not named have size 1.
      devices: all devices when None.
      slices: {axis: over how many slices it reaches}, its size grows by that factor. Inside a slice
        the interconnect is fast, between slices there is the data center's network: neighbors
        along an axis lie in one slice as long as they can. Where the devices do not say which slice
        they belong to (CPUs, GPUs of one kind), equal runs of them are the slices.

    Raises:
      UserError: an unknown axis, a size that is neither positive nor -1, sizes that do not multiply
        to the number of devices, or slices that are not those of the devices.
    """
    devices = jax.devices() if devices is None else devices
    outer = _outer(slices or {}, devices)
    inner = sizes(axes, len(devices) // math.prod(outer))
    kinds = (AxisType.Auto,) * len(AXES)
    if math.prod(outer) == 1:
        return jax.make_mesh(inner, AXES, axis_types=kinds, devices=devices)
    return Mesh(_arranged(inner, outer, devices), AXES, axis_types=kinds)


def _arranged(inner: tuple[int, ...], outer: tuple[int, ...], devices: list[Device]) -> np.ndarray:
    """Devices as `[outer * inner along each axis]`, one slice to each place of `outer`."""
    if len(_slices_of(devices)) > 1:
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    grid = np.array(devices, dtype=object).reshape(*outer, *inner)
    pairs = [axis for pair in zip(range(len(outer)), range(len(outer), grid.ndim)) for axis in pair]
    return grid.transpose(pairs).reshape([o * i for o, i in zip(outer, inner)])


def _slices_of(devices: list[Device]) -> set[int]:
    return {getattr(device, "slice_index", 0) for device in devices}


def _outer(slices: Mapping[str, int], devices: list[Device]) -> tuple[int, ...]:
    """`over_slices`, checked against the devices; errors as in `make`."""
    outer = over_slices(slices)
    asked, found = math.prod(outer), len(_slices_of(devices))
    if found > 1 and asked != found:
        raise UserError(
            f"the devices lie in {found} slices, and the axes reach over {asked}",
            field="slices",
            hint=f"Set --config.slices.data={found}",
        )
    if len(devices) % asked:
        raise UserError(
            f"{len(devices)} devices do not make {asked} equal slices",
            field="slices",
            hint="Choose a divisor of the number of devices",
        )
    return outer


def over_slices(slices: Mapping[str, int]) -> tuple[int, ...]:
    """Over how many slices each of AXES reaches; arguments and errors as in `make`."""
    wrong = [axis for axis, count in slices.items() if axis not in ROWS or count < 1]
    if wrong:
        raise UserError(
            f"{wrong[0]!r} over {slices[wrong[0]]} slices",
            field="slices",
            hint=f"Give a positive count for {' or '.join(ROWS)}: no other axis may cross slices",
        )
    return tuple(slices.get(axis, 1) for axis in AXES)


def sizes(axes: Mapping[str, int], count: int) -> tuple[int, ...]:
    """Sizes of AXES on `count` devices; arguments and errors as in `make`."""
    unknown = set(axes) - set(AXES)
    if unknown:
        raise UserError(f"unknown axis {sorted(unknown)[0]!r}", field="mesh", hint=f"Use {AXES}")
    wrong = [axis for axis, size in axes.items() if size < 1 and size != -1]
    if wrong:
        raise UserError(
            f"{wrong[0]!r} has the size {axes[wrong[0]]}",
            field="mesh",
            hint="Give a positive size, or -1 for the devices that are left",
        )
    asked = [axes.get(axis, 1) for axis in AXES]
    known = math.prod(size for size in asked if size != -1)
    made = tuple(max(count // known, 1) if size == -1 else size for size in asked)
    if math.prod(made) != count:
        raise UserError(
            f"{dict(zip(AXES, made))} needs {math.prod(made)} devices, there are {count}",
            field="mesh",
            hint="Give one axis the size -1",
        )
    return made


def batch_spec() -> PartitionSpec:
    """Sharding of every batch array: the leading axis over 'data' and 'fsdp'."""
    return PartitionSpec(ROWS)


def rounded_up(rows: int) -> int:
    """At least `rows`, and as many for every device of this host."""
    return -(-rows // jax.local_device_count()) * jax.local_device_count()


def parameter_shardings(mesh: Mesh, specs: Params, tree: Params) -> Params:
    """Turns a tree of PartitionSpecs into NamedShardings that fit the leaves' shapes.

    An axis of a leaf that the mesh axis does not divide stays whole: a tiny model runs on any mesh,
    and at the real sizes every row divides.

    Args:
      mesh: where the parameters go.
      specs: PartitionSpec of every leaf.
      tree: the leaves, or their shapes.
    """
    flat = rules.flatten(tree)
    return rules.unflatten(
        {
            path: NamedSharding(mesh, fitting(mesh, spec, flat[path].shape))
            for path, spec in rules.flatten(specs).items()
        }
    )


def fitting(
    mesh: Mesh | AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]
) -> PartitionSpec:
    """Drops from `spec` the entries that do not divide the axis they stand for.

    Args:
      mesh: whose axes `spec` names.
      spec: of one array.
      shape: of that array.
    """
    entries = []
    for length, entry in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec))):
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        size = math.prod(mesh.shape[name] for name in names)
        entries.append(entry if length % size == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *entries: Entry) -> jax.Array:
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
    whole activations over the devices instead of gathering one layer's parameters.
    """
    entries: list[Entry] = [None] * x.ndim
    entries[0] = ROWS
    if tensor_axis is not None:
        entries[tensor_axis] = "tensor"
    return constrain(x, *entries)


def on_device(x: jax.Array) -> jax.Array:
    """Copies an array that is kept in the host's memory to the chip; others are handed through."""
    far = jax.typeof(x).memory_space == jax.memory.Space.Host
    return jax.device_put(x, jax.memory.Space.Device) if far else x


def gathered(x: jax.Array) -> jax.Array:
    """Constrains parameters to be whole on every device, unless the mesh splits widths."""
    return constrain(on_device(x), *[None] * x.ndim) if not tensor_parallel() else x


def tensor_parallel() -> bool:
    """Whether the mesh that is set splits heads and hidden widths."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1


def kind() -> str:
    """'tpu', 'gpu' or 'cpu': what the devices of the mesh that is set are; '' where none is set."""
    return getattr(jax.sharding.get_abstract_mesh().abstract_device, "platform", "")


def platform(mesh: Mesh | AbstractMesh) -> str:
    """'tpu', 'gpu' or 'cpu': what the devices of a mesh are; '' where it has none."""
    return "" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform


def host_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this host fills, and into how many parts the batch is cut.

    Hosts whose devices hold the same rows, since a parameter axis spans them, fill the same part.

    Raises:
      UserError: the hosts' rows overlap without being the same.
    """
    first = [mesh.axis_names.index(axis) for axis in ROWS]
    by_rows = np.moveaxis(mesh.devices, first, range(len(first)))
    by_rows = by_rows.reshape(math.prod(mesh.shape[axis] for axis in ROWS), -1)
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(by_rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != len(by_rows):
        raise UserError(
            "the hosts' shares of a batch overlap",
            field="mesh",
            hint="Let 'tensor' fit into one host, or span whole hosts",
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def to_global(mesh: Mesh, batch: Tree) -> Tree:
    """Turns this host's arrays into global arrays, split along their leading axis.

    Args:
      batch: pytree of NumPy arrays `[rows of this host, ...]`.
    """
    sharding = NamedSharding(mesh, batch_spec())
    replicated = NamedSharding(mesh, PartitionSpec())
    count, shares = math.prod(mesh.shape[axis] for axis in ROWS), host_share(mesh)[1]

    def place(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        if x.ndim == 0:
            return jax.device_put(x, replicated)
        rows = x.shape[0] * shares
        if rows % count:
            raise UserError(
                f"{rows} rows do not split over {count} devices",
                field="data.rows",
                hint="Choose a multiple of the data and fsdp axes' product",
            )
        return jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))

    return jax.tree.map(place, batch)
