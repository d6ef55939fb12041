"""System: a stage's networks on a device mesh, with the shapes of their parameters.

It is built once and handed on; nothing here allocates a parameter.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xllm_jax.assembly import adapters, networks, packed_weights
from xllm_jax.core import lookup, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params, Shapes
from xllm_jax.models import lora, quantized
from xllm_jax.models.xllm import XLLM


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """What a stage's parameters are and where they lie, before there are any.

    Attributes:
      stage: the settings.
      model: its networks.
      device_mesh: where the parameters go.
    """

    stage: Stage
    model: XLLM
    device_mesh: Mesh

    @classmethod
    def build(cls, stage: Stage, device_mesh: Mesh | None = None) -> System:
        """Assembles the networks of a stage.

        Args:
          stage: the settings.
          device_mesh: None makes the stage's mesh of all devices.

        Raises:
          UserError: parts, modalities, mesh, adapters or files of features do not fit together.
        """
        if device_mesh is None:
            device_mesh = mesh.make(stage.mesh, slices=stage.slices)
        made = cls(stage, networks.model(stage), device_mesh)
        if stage.lora.targets or any(part.weights for part in stage.parts.values()):
            _ = made.tree  # what does not fit is told before any data is read
        return made

    @functools.cached_property
    def uncached(self) -> System:
        """The same networks, fed with what media files hold."""
        return self._with_cached(self.model.given)

    @functools.cached_property
    def whole(self) -> System:
        """The same networks with all their parameters, whether anything reads them or not."""
        return self._with_cached({})

    def _with_cached(self, cached: Mapping[str, int]) -> System:
        if self.model.cached == cached:
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, cached=cached))

    @functools.cached_property
    def tree(self) -> Params:
        """Shapes of the parameters that the networks read, `{part: tree}`, in float32.

        Raises:
          UserError: adapters are asked for where there is no kernel.
        """
        found = networks.shapes(self.model)
        parts, made = self.stage.parts, self.model.networks
        files = {n: lookup.attribute(networks.MODELS, part.network)[0] for n, part in parts.items()}
        found = adapters.extended(self.stage.lora, made, found)
        return packed_weights.packed(parts, made, files, found)

    @functools.cached_property
    def shapes(self) -> Shapes:
        """As `tree`, flat."""
        return rules.flatten(self.tree)

    @functools.cached_property
    def trainable(self) -> frozenset[str]:
        """Paths of the parameters that train.

        Raises:
          UserError: a pattern of `stage.trainable` matches nothing.
        """
        return frozenset(rules.flatten(adapters.split(self.stage, self.tree)[0]))

    @functools.cached_property
    def offloaded(self) -> frozenset[str]:
        """Paths of the parameters that stay in the hosts' memory.

        Raises:
          UserError: a pattern of `stage.offload` matches nothing, or what trains.
        """
        if not self.stage.offload:
            return frozenset()
        far = rules.flatten(rules.split(self.stage.offload, self.tree, what="offload")[0]).keys()
        both = far & self.trainable
        if both:
            raise UserError(
                f"{min(both)!r} trains",
                field="offload",
                hint="Only frozen parameters can stay away",
            )
        return frozenset(far)

    @functools.cached_property
    def specs(self) -> Params:
        """PartitionSpec of every parameter, from the SHARDING rows of each part's file."""
        return {
            name: adapters.specs(
                lookup.attribute(networks.MODELS, part.network)[0].SHARDING,
                self.tree[name],
                f"{part.network} SHARDING",
            )
            for name, part in self.stage.parts.items()
            if name in self.tree
        }

    @functools.cached_property
    def parameters(self) -> Shapes:
        """Shape, dtype and sharding of every parameter: float32 what trains and all of an adapter,
        integers and their scales as they are, else `frozen`.

        Raises:
          UserError: patterns of `stage.trainable` or `stage.offload` do not fit.
        """
        frozen = jnp.dtype(self.stage.frozen)
        own = {
            path: x.dtype
            for path, x in self.shapes.items()
            if lora.is_adapter(path) or quantized.is_packed(path)
        }
        dtypes = own | dict.fromkeys(self.trainable, jnp.dtype(jnp.float32))
        placed = mesh.parameter_shardings(self.device_mesh, self.specs, self.tree)
        shardings = rules.flatten(placed)
        for path in self.offloaded:
            shardings[path] = shardings[path].with_memory_kind(mesh.HOST)
        return {
            path: jax.ShapeDtypeStruct(x.shape, dtypes.get(path, frozen), sharding=shardings[path])
            for path, x in self.shapes.items()
        }

    def resident(self, params: Params) -> Params:
        """Copies what stays in the hosts' memory to the chips, inside jit.

        Left out is what the networks fetch themselves, layer by layer (STREAMED of each part's
        file).
        """
        if not self.stage.offload:
            return params
        streamed = {
            name: getattr(lookup.attribute(networks.MODELS, part.network)[0], "STREAMED", ())
            for name, part in self.stage.parts.items()
        }

        def place(path: str, leaf: jax.Array) -> jax.Array:
            part, _, inner = path.partition("/")
            if quantized.is_packed(inner):
                inner = f"{inner.rpartition('/')[0]}/{quantized.KERNEL}"
            fetched = any(re.fullmatch(pattern, inner) for pattern in streamed[part])
            return leaf if fetched else mesh.on_device(leaf)

        return rules.unflatten({path: place(path, x) for path, x in rules.flatten(params).items()})
