"""Accelerators and what they can do, from their data sheets."""

from __future__ import annotations

import dataclasses

# Compiler options by platform: products read gathered parameters whole. By itself the TPU compiler
# cuts such a product into one a chip, to send while it computes (docs/preflight.md).
WHOLE_PRODUCTS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      flops: peak bfloat16 FLOP/s.
      memory: bytes of its main memory.
      bandwidth: bytes/s of its main memory.
      link: bytes/s that one link sends one way (of a GPU: all its links together).
      axes: dimensions of the torus it is built into; 0 = a switch connects all.
      cores: how many cores a rented slice's name counts per chip.
      network: bytes/s that the data center's network carries for one chip, between slices; 0 = the
        data sheet does not say.
      clock: cycles/s that the TPU compiler counts in; 0 = its counts are not used.
    """

    flops: float
    memory: int
    bandwidth: float
    link: float
    axes: int = 0
    cores: int = 1
    network: float = 0.0
    clock: float = 0.0


GIB = 2**30


CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1.2e12, 4.5e10, axes=3, cores=2, clock=1.05e9),
    "v5e": Chip(197e12, 16 * GIB, 8.1e11, 4.5e10, axes=2, network=3.125e9, clock=1.5e9),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 9e10, axes=3, cores=2, network=6.25e9, clock=1.75e9),
    "v6e": Chip(918e12, 32 * GIB, 1.64e12, 9e10, axes=2, network=1.25e10, clock=1.75e9),
    "a100": Chip(312e12, 80 * 10**9, 2.0e12, 3e11),
    "h100": Chip(989e12, 80 * 10**9, 3.35e12, 4.5e11),
    "h200": Chip(989e12, 141 * 10**9, 4.8e12, 4.5e11),
}


# How devices call themselves. What is not here (a card on another bus, say) has another peak.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


UNKNOWN = Chip(0.0, 0, 0.0, 0.0)  # this machine, whose figures nobody has stated


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a device (`jax.Device.device_kind`) is; None where its peak is not known."""
    return CHIPS.get(KINDS.get(device_kind, ""))
