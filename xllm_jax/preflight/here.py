"""The devices that are here as a target: what a stage that starts on them has to fit.

A TPU or a GPU of a data sheet is the slice that it is part of. Of any other device the memory is
what it says itself, and its speed is nominal: enough to rank ways of doing the same update, and no
figure to tell anyone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from xllm_jax.core import mesh
from xllm_jax.core.chips import CHIPS, KINDS, Chip
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Device
from xllm_jax.preflight.targets import Target

# FLOP/s, bytes/s of memory, bytes/s of a link: a data center's card on a PCIe bus; a CPU's share.
CARD = Chip(1e14, 0, 1e12, 3e10)
CPU = Chip(1e11, 0, 1e10, 5e9)
CPU_SHARE = 0.5  # of a machine's memory: decoded files and other programs take the rest
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def target(
    slices: Mapping[str, int],
    devices: Sequence[Device] | None = None,
    memory: Callable[[Device], int] | None = None,
) -> Target:
    """The devices of all hosts as a target of one slice, see `targets.repeated`.

    Args:
      slices: of the stage.
      devices: `jax.devices()` by default.
      memory: bytes that a device of this host may take; as it says itself by default.

    Raises:
      UserError: the devices do not make that many equal slices, or are of several kinds.
    """
    devices = jax.devices() if devices is None else devices
    first = next((d for d in devices if d.process_index == jax.process_index()), devices[0])
    if len({device.device_kind for device in devices}) > 1:
        what = "the devices are of several kinds"
        raise UserError(what, field="data.rows=auto", hint="Give a number of rows")
    count = math.prod(mesh.over_slices(slices))
    if len(devices) % count:
        what = f"{len(devices)} devices do not make {count} equal slices"
        raise UserError(what, field="slices", hint="Choose a divisor of the number of devices")
    kind, room = KINDS.get(first.device_kind, ""), (memory or limit)(first)
    if not kind:
        shared = sum(device.process_index == first.process_index for device in devices)
        return _unknown(first, len(devices), room // (shared if first.platform == "cpu" else 1))
    chip = CHIPS[kind]
    if not chip.axes:
        chip = dataclasses.replace(chip, memory=min(chip.memory, room or chip.memory))
        return Target(f"{kind}:{len(devices) // count}", kind, (len(devices) // count,), chip)
    shape = _topology(devices, chip.axes, len(devices) // count)
    return Target(f"{kind}:{'x'.join(map(str, shape))}", kind, shape, chip)


def _unknown(device: Device, count: int, memory: int) -> Target:
    """Devices without a data sheet; `local` is all of them, whatever the slices."""
    chip = dataclasses.replace(CPU if device.platform == "cpu" else CARD, memory=memory)
    return Target(f"{count} x {device.device_kind}", "local", (count,), chip)


def _topology(devices: Sequence[Any], axes: int, count: int) -> tuple[int, ...]:
    """Chips of one slice along each axis, in the order in which XLA names slices.

    Args:
      devices: of all slices, with their places in a torus.
      axes: of such a torus.
      count: chips of one slice.
    """
    slice_ = min(getattr(device, "slice_index", 0) for device in devices)
    places = [d.coords for d in devices if getattr(d, "slice_index", 0) == slice_]
    spans = [max(along) - min(along) + 1 for along in zip(*places, strict=True)]
    shape = sorted(spans[:axes], reverse=count <= 4)
    if math.prod(spans) != count or len(shape) != axes:  # some chips of a slice: no such compiler
        return (count, *[1] * (axes - 1))
    return tuple(shape)


def limit(device: Device) -> int:
    """Bytes that a device of this host may take; 0 where nobody knows."""
    if device.platform == "cpu":
        return int(CPU_SHARE * machine_memory())
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def machine_memory(limits: Sequence[str] = LIMITS) -> int:
    """Bytes of main memory that this process may use: the machine's, or its container's.

    Args:
      limits: files in which Linux says what a container may use.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in limits:
        with contextlib.suppress(OSError, ValueError):  # 'max' where there is no limit
            found.append(int(Path(file).read_text("utf-8")))
    return min(found)
