"""What drawing takes on a chip: FLOPs and seconds of a picture, bytes of the decoder.

By arithmetic: the programs of `inference/render.py` are traced, not compiled. A picture is drawn on
one chip, or on as many as the mesh splits it over; as many pictures as there are chips keep all of
them busy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from xllm_jax.assembly import networks
from xllm_jax.core import flops, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params
from xllm_jax.inference import decoder_base
from xllm_jax.inference.render import Renderer, check_size
from xllm_jax.models.outputs import autoencoder, schedulers, unet
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.outputs.schedulers import Pndm, Scheduler
from xllm_jax.models.outputs.unet import UNet
from xllm_jax.preflight import memory, targets
from xllm_jax.preflight.targets import Target

PUBLISHED = {768: "stable_diffusion_1_5", 1024: "stable_diffusion_2_1"}
"""{width of a projection's output: size of the decoder that reads it}."""
SIDES = {"stable_diffusion_1_5": (512, 512), "stable_diffusion_2_1": (768, 768)}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Networks that draw, before their parameters are there.

    Attributes:
      name: of the base's folder, or of the published size.
      unet, autoencoder, scheduler: as of `Renderer`.
      size: (height, width) in pixels that it was trained on.
      tokens, width: of a condition.
    """

    name: str
    unet: UNet
    autoencoder: Autoencoder
    scheduler: Scheduler
    size: tuple[int, int]
    tokens: int
    width: int


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The account of one picture.

    Attributes:
      decoder: what draws.
      target: where.
      size, steps, calls, guidance: of the picture; calls of the network are of the scheduler.
      call, decode: FLOPs of one call (with guidance: of both) and of the autoencoder's decoder.
      parameters: bytes of both networks on a chip, split over the stage's mesh; `whole`: all.
      live: bytes of arrays that are alive at once in a call or in the decoder, for one picture;
        nothing is fused, so a compiled program needs less.
    """

    decoder: Decoder
    target: Target
    size: tuple[int, int]
    steps: int
    calls: int
    guidance: float
    call: float
    decode: float
    parameters: int
    whole: int
    live: int

    @property
    def flops(self) -> float:
        """Of a picture."""
        return self.call * self.calls + self.decode

    @property
    def seconds(self) -> float:
        """Of a picture on one chip at best: arithmetic, or reading the parameters once a call."""
        chip = self.target.chip
        if not chip.flops:
            return 0.0
        return max(self.flops / chip.flops, self.whole * (self.calls + 1) / chip.bandwidth)

    @property
    def fits(self) -> bool:
        """Whether a chip has room for its part of the parameters and one picture."""
        room = self.target.chip.memory
        return not room or self.parameters + self.live <= room


def of_stage(stage: Stage, modality: str) -> Decoder:
    """The decoder that a stage names, or the published one where there is no such base yet.

    Raises:
      UserError: the stage has no such output, or no decoder is known that reads its projection.
    """
    if modality not in stage.outputs:
        known = ", ".join(stage.outputs) or "none"
        what = f"answers of this stage are not in the modality {modality!r}"
        raise UserError(what, field="outputs", hint=f"Known: {known}")
    out = stage.outputs[modality]
    projection = networks.network(stage.parts[out.projection], stage, out.projection)
    tokens, width = projection.queries, projection.output_width
    if out.decoder and Path(out.decoder).exists():
        base = decoder_base.look(out.decoder, compute=stage.compute, frozen=stage.frozen)
        base.check_projection(width, tokens, f"outputs.{modality}.decoder")
        made = (base.unet, base.autoencoder, base.scheduler, base.size)
        return Decoder(out.decoder, *made, tokens, width)
    size = PUBLISHED.get(width)
    if size is None:
        hint = f"Known are widths of {', '.join(map(str, PUBLISHED))}"
        what = f"no published decoder reads {width} numbers, and there is no {out.decoder!r}"
        raise UserError(what, field=f"outputs.{modality}.decoder", hint=hint)
    dtype = jnp.dtype(stage.compute)
    return Decoder(
        size,
        UNet(**unet.SIZES[size], dtype=dtype),
        Autoencoder(**autoencoder.SIZES[size], dtype=dtype),
        Pndm(**schedulers.SIZES[size]),
        SIDES[size],
        tokens,
        width,
    )


def forecast(
    stage: Stage,
    target: Target,
    modality: str = "image",
    steps: int = 50,
    guidance: float = 7.5,
    size: Sequence[int] = (),
) -> Drawing:
    """Accounts for one picture.

    Args:
      stage: whose answers hold pictures.
      target: chips.
      modality: of the output.
      steps, guidance: as of `Renderer`.
      size: (height, width) in pixels; () is what the decoder was trained on.

    Raises:
      UserError: see `of_stage`, a size that the autoencoder cannot take, steps that the scheduler
        does not have, or a mesh that does not fit.
    """
    decoder = of_stage(stage, modality)
    sides = cast(tuple[int, int], tuple(size)) or decoder.size
    check_size(sides, decoder.autoencoder.factor)
    table = decoder.scheduler.table(steps)
    device_mesh = cast(Mesh, targets.make_mesh(stage.mesh, stage.slices, target, compiles=False))
    frozen = jnp.dtype(stage.frozen)
    trees, places = {}, {}
    for part, network in (("unet", decoder.unet), ("vae", decoder.autoencoder)):
        shapes = decoder_base.shapes_of(part, network)
        shapes = {p: x for p, x in shapes.items() if not p.startswith(decoder_base.UNREAD)}
        typed = {p: jax.ShapeDtypeStruct(x.shape, frozen) for p, x in shapes.items()}
        trees[part] = rules.unflatten(typed)[part]
        places |= {
            path: jax.ShapeDtypeStruct(typed[path].shape, frozen, sharding=at)
            for path, at in decoder_base.shardings(part, shapes, device_mesh).items()
        }
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(trees))
    call, decode, live = _programs(decoder, trees, table, sides, guidance)
    counted = (len(table.calls.time), guidance, call, decode)
    return Drawing(decoder, target, sides, steps, *counted, memory.held(places), whole, live)


def _programs(
    decoder: Decoder,
    trees: Mapping[str, Params],
    table: schedulers.Table,
    size: tuple[int, int],
    guidance: float,
) -> tuple[float, float, int]:
    """(FLOPs of one call, FLOPs of the decoder, bytes alive at once) of one picture."""
    empty = np.zeros((decoder.tokens, decoder.width), np.float32)
    networks_ = (decoder.unet, decoder.autoencoder)
    draw, decode = Renderer(*networks_, trees, decoder.scheduler, empty, 1).programs()
    sides = (side // decoder.autoencoder.factor for side in size)
    latents = jax.ShapeDtypeStruct((1, *sides, decoder.unet.latent_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, *empty.shape), jnp.float32)
    one = jax.tree.map(lambda x: x[:1], table.calls)  # a loop of one call
    arguments = (trees["unet"], table._replace(calls=one), latents, text, empty, np.float32(1))
    found = flops.measured(lambda *given: draw(*given, guided=guidance > 1), *arguments)
    decoded = flops.measured(decode, trees["vae"], latents)
    programs = (
        draw.trace(*arguments, guided=guidance > 1).jaxpr.jaxpr,
        decode.trace(trees["vae"], latents).jaxpr.jaxpr,
    )
    return found, decoded, max(map(alive, programs))


def alive(jaxpr: core.Jaxpr) -> int:
    """Bytes of the results that are alive at once while a program runs in its own order.

    Arguments are left out; of a loop one turn counts.
    """
    last: dict[flops.Atom, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        last |= dict.fromkeys((v for v in equation.invars if not _literal(v)), number)
    last |= dict.fromkeys((v for v in jaxpr.outvars if not _literal(v)), len(jaxpr.eqns))
    held, most = {}, 0
    for number, equation in enumerate(jaxpr.eqns):
        inside = max((alive(part) for part in flops.inner(equation)), default=0)
        made = {v: _bytes(v) for v in equation.outvars}
        most = max(most, sum(held.values()) + max(inside, sum(made.values())))
        held |= {v: size for v, size in made.items() if last.get(v, -1) > number}
        held = {v: size for v, size in held.items() if last[v] > number}
    return most


def _literal(variable: flops.Atom) -> bool:
    return isinstance(variable, core.Literal)


def _bytes(variable: flops.Atom) -> int:
    kind = flops.typed(variable)
    return math.prod(kind.shape) * getattr(kind.dtype, "itemsize", 4)


def text(found: Drawing) -> list[str]:
    """Lines of the page."""
    decoder, chips = found.decoder, found.target.chips
    height, width = found.size
    used = found.parameters + found.live
    room = found.target.chip.memory
    of = f" of {_gib(room)}: {'fits' if found.fits else 'DOES NOT FIT'}" if room else ""
    lines = [
        f"drawing       {decoder.name}: {height} x {width} pixels, "
        f"{type(decoder.scheduler).__name__}, {found.steps} steps ({found.calls} calls), "
        f"guidance {found.guidance:g}",
        f"TFLOP         {found.flops / 1e12:.1f} a picture: {found.call / 1e12:.2f} a call, "
        f"{found.decode / 1e12:.2f} to decode",
        f"GiB per chip  {_gib(used)}{of} (arithmetic, not compiled)",
        f"              parameters {_gib(found.parameters)} (whole {_gib(found.whole)}), "
        f"alive at once {_gib(found.live)}, nothing fused",
    ]
    if found.seconds:
        lines.append(
            f"at best       {found.seconds:.2f} s a picture on one chip, "
            f"{chips / found.seconds:.1f} pictures/s on {chips}"
        )
    return lines


def record(found: Drawing) -> dict[str, Any]:
    """The same as plain data."""
    names = ("size", "steps", "calls", "guidance", "call", "decode", "parameters", "whole", "live")
    made = {name: getattr(found, name) for name in names}
    more = {"flops": found.flops, "seconds": found.seconds, "fits": found.fits}
    return made | more | {"decoder": found.decoder.name, "chips": found.target.chips}


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
