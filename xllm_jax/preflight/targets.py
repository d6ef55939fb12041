"""Chips and slices: what they can do (data sheets), and devices to compile for without having them.

A slice is written 'KIND:TOPOLOGY' as XLA names it ('v5e:4x4', 'v5p:2x2x1'), or by the name under
which it is rented ('v5e-16', 'v5p-8', 'v4-32'); GPUs are 'h200:8'; 'local' is this machine. How
many slices there are stands in the stage (`Stage.slices`), as for training.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from xllm_jax.core import mesh
from xllm_jax.core.chips import CHIPS, UNKNOWN, Chip
from xllm_jax.core.errors import UserError
from xllm_jax.core.text_lines import split_lines
from xllm_jax.core.types import Device


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a stage shall run.

    Attributes:
      name: as XLA writes it.
      kind: row of CHIPS, or 'local'.
      shape: chips of one slice along each axis.
      chip: its figures.
      slices: how many of them; this machine is always one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    chip: Chip
    slices: int = 1

    @property
    def chips(self) -> int:
        """How many there are, over all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def title(self) -> str:
        """The name, with the number of slices."""
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    @property
    def compiles(self) -> bool:
        """Whether the step can be compiled for it here; for GPUs there is arithmetic only."""
        return self.kind == "local" or self.chip.axes > 0

    @property
    def sends(self) -> float:
        """Bytes/s that one chip sends over all links it has in this slice; 0 for one chip."""
        if math.prod(self.shape) == 1:
            return 0.0
        if not self.chip.axes:
            return self.chip.link
        return self.chip.link * sum(min(size - 1, 2) for size in self.shape)


def parse(text: str) -> Target:
    """Reads the name of a slice.

    Raises:
      UserError: an unknown kind, or a topology without sense.
    """
    if text == "local":
        count = len(jax.devices())
        return Target("local", "local", (count,), UNKNOWN)
    found = re.fullmatch(r"(\w+?)(?::([\dx]+)|-(\d+))", text)
    if not found or found.group(1) not in CHIPS:
        raise UserError(
            f"unknown slice {text!r}",
            field="--topology",
            hint=f"Write local, v5e:4x4, v5p-8 or h200:8; kinds: {', '.join(CHIPS)}",
        )
    kind, sizes, rented = found.groups()
    chip = CHIPS[kind]
    shape = _rented(kind, int(rented)) if rented else tuple(map(int, sizes.split("x")))
    if 0 in shape or (chip.axes and len(shape) != chip.axes):
        raise UserError(
            f"{text!r} has not {chip.axes} axes",
            field="--topology",
            hint=f"As in {kind}:{'x'.join('2' * max(chip.axes, 1))}",
        )
    return Target(f"{kind}:{'x'.join(map(str, shape))}", kind, shape, chip)


def repeated(target: Target, slices: Mapping[str, int]) -> Target:
    """As many slices as `Stage.slices` asks for: a target's name is that of one.

    Raises:
      UserError: see `core.mesh.over_slices`.
    """
    count = math.prod(mesh.over_slices(slices))
    return target if target.kind == "local" else dataclasses.replace(target, slices=count)


def _rented(kind: str, count: int) -> tuple[int, ...]:
    """Topology of a slice's name; v4 and v5p count cores there, two a chip."""
    chip = CHIPS[kind]
    chips = count // chip.cores
    if not chip.axes:
        return (chips,)
    if chips < 1 or chips & (chips - 1):
        raise UserError(f"{kind}-{count} is no slice", field="--topology", hint="Use powers of two")
    shape = [1] * chip.axes
    axis = 0
    while math.prod(shape) < chips:  # 2x2x1 first, then the last axes grow
        shape[axis] *= 2
        axis = min(range(chip.axes), key=lambda a: (shape[a], a))
    return tuple(sorted(shape)) if math.prod(shape) > 4 else tuple(shape)


def devices(target: Target) -> list[Device]:
    """Devices to compile for.

    Raises:
      UserError: the TPU compiler is not installed or does not know the topology.
    """
    if target.kind == "local":
        return jax.devices()
    options: dict[str, Any] = {"chip_config_name": "megacore"} if target.kind == "v4" else {}
    if target.chips == target.slices:  # a host of four chips is what the compiler expects
        options["chips_per_host_bounds"] = (1, 1, 1)
    if target.slices > 1:
        options["num_slices"] = target.slices
    try:
        described = topologies.get_topology_desc(target.name, "tpu", **options)
    except Exception as error:
        raise UserError(
            f"cannot compile for {target.name}: {split_lines(str(error))[0]}",
            field="--topology",
            hint="pip install -e '.[preflight]' brings the TPU compiler",
        ) from error
    return list(described.devices)


def slices_of(device_mesh: Mesh, slices: Mapping[str, int]) -> list[int]:
    """The slice of each device of a mesh of this machine, in the mesh's order.

    Args:
      device_mesh: of all devices.
      slices: see `core.mesh.make`; equal runs of the devices are a slice each.
    """
    count = math.prod(mesh.over_slices(slices))
    places = {device: place for place, device in enumerate(jax.devices())}
    return [places[device] * count // len(places) for device in device_mesh.devices.flat]


def make_mesh(
    axes: Mapping[str, int],
    slices: Mapping[str, int],
    target: Target,
    compiles: bool = True,
) -> Mesh | AbstractMesh:
    """The stage's mesh on a target; without devices where nothing is compiled.

    Args:
      axes, slices: see `core.mesh.make`.
      target: the slices, as `repeated` gives them.
      compiles: whether to compile for it, if that is possible here.

    Raises:
      UserError: the sizes do not multiply to the number of chips.
    """
    if target.compiles and compiles:
        return mesh.make(axes, devices(target), slices)
    outer = mesh.over_slices(slices)
    inner = mesh.sizes(axes, target.chips // math.prod(outer))
    sizes = tuple(within * over for within, over in zip(inner, outer))
    return AbstractMesh(sizes, mesh.AXES, axis_types=(AxisType.Auto,) * len(sizes))
