"""Pictures from conditions: a UNet along a scheduler's table, and an autoencoder's decoder.

One program is compiled for a size, a number of calls and a batch; prompts, seeds, schedulers of as
many calls and the guidance are its arguments. Every request has a key of its own and stands in a
batch of the same size whatever is asked for beside it, so that a seed gives the same picture.

On a mesh parameters lie as SHARDING of the networks' files says, and pictures are split over 'data'
and 'fsdp' where their number divides; noise is drawn before, so that it is that of one device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from xllm_jax.core import chips, mesh
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.data.media import image
from xllm_jax.models.outputs import sampling
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.outputs.schedulers import Calls, Scheduler, Table
from xllm_jax.models.outputs.unet import UNet

Array = jax.Array


class Renderer:
    """A latent diffusion model that draws.

    Args:
      unet, autoencoder: the networks.
      params: {'unet': parameters, 'vae': parameters}; of the decoder alone is enough.
      scheduler: way from noise to latents.
      without: `[tokens, width]`, what the text encoder says of an empty text.
      batch: pictures that are drawn at once.
      device_mesh: where the parameters lie; None is the first device alone.
    """

    def __init__(
        self,
        unet: UNet,
        autoencoder: Autoencoder,
        params: Mapping[str, Params],
        scheduler: Scheduler,
        without: np.ndarray,
        batch: int = 4,
        device_mesh: Mesh | None = None,
    ):
        self.device_mesh = device_mesh
        self.unet, self.autoencoder, self.scheduler = unet, autoencoder, scheduler
        self.params, self.without, self.batch = params, jnp.asarray(without), batch
        options = device_mesh and chips.WHOLE_PRODUCTS.get(mesh.platform(device_mesh))
        jit = functools.partial(jax.jit, compiler_options=options or None)
        self._draw = jit(self._latents, static_argnames=("guided",))
        self._call = jit(self._called, static_argnames=("guided",))
        self._decode = jit(self._pictures)

    def __call__(
        self,
        conditions: np.ndarray,
        seeds: Sequence[int],
        *,
        size: tuple[int, int],
        steps: int = 50,
        guidance: float = 7.5,
    ) -> np.ndarray:
        """Draws pictures.

        Args:
          conditions: `[requests, tokens, width]`.
          seeds: one for each; the same seed gives the same picture, whatever is drawn beside it.
          size: (height, width) in pixels.
          steps: of the scheduler.
          guidance: how far to go beyond the condition; up to 1 there is no second call.

        Returns:
          `[requests, height, width, 3]` uint8.

        Raises:
          UserError: sides that the autoencoder cannot take, conditions of another width or length,
            not as many seeds, or steps that the scheduler does not have.
        """
        self._check(conditions, seeds, size)
        table = self.scheduler.table(steps)
        drawn = []
        for first in range(0, len(seeds), self.batch):
            rows = np.arange(first, first + self.batch) % len(seeds)
            noise = self.noise([seeds[int(row)] for row in rows], size)
            latents, _ = self.latents(noise, conditions[rows], table, guidance)
            drawn.append(np.asarray(self.decoded(latents)))
        pictures = np.concatenate(drawn)[: len(seeds)] if drawn else np.zeros((0, *size, 3))
        return image.from_signed(pictures)

    def gradually(
        self,
        conditions: np.ndarray,
        seeds: Sequence[int],
        *,
        size: tuple[int, int],
        steps: int = 50,
        guidance: float = 7.5,
    ) -> Iterator[np.ndarray | None]:
        """Draws up to `batch` pictures call by call, so that a device can do other work between.

        One program is compiled for a size, whatever the number of steps; its pictures are those of
        `__call__` but for rounding.

        Args, errors: as of `__call__`.

        Yields:
          None behind every call of the UNet, when it is done; last the pictures as `__call__`.
        """
        self._check(conditions, seeds, size)
        if not 0 < len(seeds) <= self.batch:
            raise ValueError(f"{len(seeds)} pictures in a batch of {self.batch}")
        table = self.scheduler.table(steps)
        rows = np.arange(self.batch) % len(seeds)
        noise = self.noise([seeds[int(row)] for row in rows], size)
        placed = self._placed(jnp.asarray(conditions[rows]))
        way = sampling.begin(table, self._placed(noise))
        given = (placed, self.without, jnp.float32(guidance))
        for number in range(len(table.calls.time)):
            row = jax.tree.map(lambda x, n=number: x[n], table.calls)
            with self._mesh():
                way = self._call(
                    self.params["unet"], way, row, table.limit, *given, guided=guidance > 1
                )
            jax.block_until_ready(way)
            yield None
        pictures = np.asarray(self.decoded(way.latents))
        yield image.from_signed(pictures[: len(seeds)])

    def noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Array:
        """What the pictures of some seeds begin with, `[requests, height, width, channels]`."""
        shape = (*(side // self.autoencoder.factor for side in size), self.unet.latent_channels)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        return jax.vmap(functools.partial(jax.random.normal, shape=shape))(keys)

    def latents(
        self,
        noise: Array,
        conditions: np.ndarray,
        table: Table,
        guidance: float,
        without: np.ndarray | None = None,
        trace: bool = False,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Latents by the scheduler's table, see `sampling.draw`.

        Args:
          noise: `[batch, height, width, channels]` float32.
          conditions: `[batch, tokens, width]`.
          table: of a scheduler.
          guidance: as of `__call__`.
          without: `[tokens, width]` or `[batch, tokens, width]`; None takes the empty text's.
          trace: every call's results, too.
        """
        empty = self.without if without is None else jnp.asarray(without)
        rows = (self._placed(noise), self._placed(jnp.asarray(conditions)))
        arguments = (self.params["unet"], table, *rows, empty)
        with self._mesh():
            if trace:
                return self._latents(*arguments, guidance, guided=guidance > 1, trace=True)
            return self._draw(*arguments, jnp.float32(guidance), guided=guidance > 1)

    def decoded(self, latents: Array) -> Array:
        """Pictures of latents, within -1..1 or near, `[batch, height, width, 3]` float32."""
        with self._mesh():
            return self._decode(self.params["vae"], latents)

    def programs(self) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
        """The compiled functions: (parameters of the UNet, table, noise, conditions, empty text,
        guidance, guided=) to latents, and (parameters of the autoencoder, latents) to pictures."""
        return self._draw, self._decode

    def _mesh(self) -> contextlib.AbstractContextManager[object]:
        return jax.set_mesh(self.device_mesh) if self.device_mesh else contextlib.nullcontext()

    def _placed(self, rows: Array) -> Array:
        """Rows split over the mesh as a batch is, where they divide."""
        if self.device_mesh is None:
            return rows
        spec = mesh.fitting(self.device_mesh, mesh.batch_spec(), rows.shape)
        return jax.device_put(rows, NamedSharding(self.device_mesh, spec))

    def _latents(
        self,
        params: Params,
        table: Table,
        noise: Array,
        conditions: Array,
        without: Array,
        guidance: Array | float,
        guided: bool,
        trace: bool = False,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        denoise = self._denoise(params, conditions, without, guidance, guided)
        return sampling.draw(table, denoise, noise, trace)

    def _called(
        self,
        params: Params,
        way: sampling.Way,
        row: Calls,
        limit: Array,
        conditions: Array,
        without: Array,
        guidance: Array,
        guided: bool,
    ) -> sampling.Way:
        denoise = self._denoise(params, conditions, without, guidance, guided)
        return sampling.call(way, row, limit, denoise)[0]

    def _denoise(
        self,
        params: Params,
        conditions: Array,
        without: Array,
        guidance: Array | float,
        guided: bool,
    ) -> sampling.Denoise:
        def network(x: Array, time: Array, text: Array) -> Array:
            return cast(Array, self.unet.apply({"params": params}, x, time, text))

        if guided:
            return sampling.guided(network, conditions, without, guidance)
        return functools.partial(_alone, network, conditions)

    def _pictures(self, params: Params, latents: Array) -> Array:
        scaled = latents / self.autoencoder.scaling
        found = self.autoencoder.apply({"params": params}, scaled, method="decode")
        return cast(Array, found)

    def _check(self, conditions: np.ndarray, seeds: Sequence[int], size: tuple[int, int]) -> None:
        check_size(size, self.autoencoder.factor)
        if conditions.ndim != 3 or conditions.shape[1:] != self.without.shape:
            what = f"have the shape {conditions.shape}, the decoder {self.without.shape} a request"
            hint = "Take the decoder that the projection was trained for"
            raise UserError(what, field="conditions", hint=hint)
        if len(conditions) != len(seeds):
            what = f"{len(seeds)} for {len(conditions)} requests"
            raise UserError(what, field="--seed", hint="Give one seed for each request")
        for seed in seeds:
            check_seed(seed)


def check_size(size: tuple[int, int], factor: int) -> None:
    """Raises UserError for (height, width) in pixels that an autoencoder cannot take.

    Args:
      size: of the pictures.
      factor: pixels for each latent.
    """
    if any(side < factor or side % factor for side in size):
        what = f"{size[0]} x {size[1]} is no multiple of the autoencoder's factor {factor}"
        near = " ".join(str(max(factor, round(side / factor) * factor)) for side in size)
        raise UserError(what, field="--size", hint=f"Nearest: {near}")


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that no picture has."""
    if not 0 <= seed < 2**32:
        what = f"{seed} is no whole number below 2^32"
        raise UserError(what, field="--seed", hint="Choose another")


def _alone(network: sampling.Network, conditions: Array, x: Array, time: Array) -> Array:
    return network(x, time, conditions)


def fitted(picture: np.ndarray, factor: int) -> np.ndarray:
    """A picture with sides that are multiples of `factor`, made smaller where they are none.

    Args:
      picture: `[height, width, 3]` uint8.
      factor: pixels for each latent.
    """
    height, width = (side // factor * factor for side in picture.shape[:2])
    if (height, width) == picture.shape[:2]:
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
