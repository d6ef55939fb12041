"""A decoder's base becomes a `Renderer`: networks, noise schedule and empty text by its records.

Looking at a base reads its records alone, so that what is wrong with it is told before anything
large is read; parameters are read when the first picture is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from xllm_jax.assembly import networks
from xllm_jax.core import base_description, checkpoint, damage, limits, mesh, rules, words
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params, Shapes
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer
from xllm_jax.inference.render import Renderer
from xllm_jax.models.clip_text import ClipText
from xllm_jax.models.outputs import autoencoder, scheduler_config, unet
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.outputs.schedulers import Scheduler
from xllm_jax.models.outputs.unet import UNet

Network = UNet | Autoencoder | ClipText
N = TypeVar("N", bound=Network)

UNREAD = ("vae/encoder/", "vae/moments/")  # pictures are made, not read
MAKE = "Make it by xllm convert --source=stable_diffusion from a whole folder of the pipeline"
SCHEDULER, TOKENIZER, SIDE = "scheduler/scheduler_config.json", "tokenizer", "unet/config.json"


@dataclasses.dataclass(frozen=True)
class DecoderBase:
    """What a base records of itself.

    Attributes:
      folder: of the base.
      unet, autoencoder, text: its networks.
      scheduler: its way from noise to latents, or the one that was chosen instead.
      size: (height, width) in pixels of the pictures that it was trained on.
      frozen: dtype in which its parameters are kept.
    """

    folder: Path
    unet: UNet
    autoencoder: Autoencoder
    text: ClipText
    scheduler: Scheduler
    size: tuple[int, int]
    frozen: DTypeLike

    def check_projection(self, width: int, queries: int, field: str) -> None:
        """Looks whether this decoder reads what a projection gives.

        Args:
          width, queries: of the projection's output.
          field: that names the decoder, for the error.

        Raises:
          UserError: another width or length.
        """
        have, wanted = (queries, width), (self.text.positions, self.text.width)
        if have != wanted:
            what = f"{self.folder} reads {wanted[0]} x {wanted[1]} numbers a picture"
            what = f"{what}, and the projection gives {have[0]} x {have[1]}"
            raise UserError(what, field=field, hint="Take the decoder that it was trained for")

    def renderer(self, batch: int = 1, device_mesh: Mesh | None = None) -> Renderer:
        """Reads the parameters.

        Args:
          batch: pictures that are drawn at once.
          device_mesh: over which the UNet and the autoencoder are split; None is one device.

        Raises:
          UserError: a component is missing, damaged or of other shapes; names it.
        """
        stores = checkpoint.open_leaves(self.folder)
        drawing = {"unet": self.unet, "vae": self.autoencoder}
        params = {
            part: self._params(part, network, stores, device_mesh)
            for part, network in drawing.items()
        }
        empty = self._said([""], stores)[0]
        rest = (self.scheduler, empty, batch, device_mesh)
        return Renderer(self.unet, self.autoencoder, params, *rest)

    def conditions(self, texts: Sequence[str]) -> np.ndarray:
        """What the text encoder says of texts, `[texts, tokens, width]` float32.

        Raises:
          UserError: as of `renderer`.
        """
        return self._said(texts, checkpoint.open_leaves(self.folder))

    def _said(self, texts: Sequence[str], stores: Mapping[str, Any]) -> np.ndarray:
        ids = ClipTokenizer(self.folder / TOKENIZER).encode(texts, self.text.positions)
        if ids.max() >= self.text.vocabulary:
            what = f"gives the id {ids.max()}, and the text encoder has {self.text.vocabulary} rows"
            raise UserError(what, field=str(self.folder / TOKENIZER), hint=MAKE)
        params = self._params("text_encoder", self.text, stores)
        apply = jax.jit(
            lambda params, ids: self.text.apply({"params": params}, ids, method="states")
        )
        return np.asarray(apply(params, jnp.asarray(ids)), np.float32)

    def _params(
        self,
        part: str,
        network: UNet | Autoencoder | ClipText,
        stores: Mapping[str, Any],
        device_mesh: Mesh | None = None,
    ) -> Params:
        """Reads a part leaf by leaf, so that a damaged one ends it at once."""
        found: dict[str, jax.Array] = {}
        shapes = {p: x for p, x in shapes_of(part, network).items() if not p.startswith(UNREAD)}
        places = shardings(part, shapes, device_mesh) if device_mesh else {}
        for path, like in shapes.items():
            have = tuple(stores[path].shape) if path in stores else None
            if have != like.shape:
                what = f"{path} has shape {have}, the network {like.shape}"
                raise UserError(what, field=str(self.folder), hint=MAKE)
            with damage.reading(self.folder):
                held = np.asarray(stores[path].read().result()).astype(jnp.dtype(self.frozen))
                found[path] = jax.device_put(held, places.get(path))
        return rules.unflatten(found)[part]


def shardings(part: str, shapes: Shapes, device_mesh: Mesh) -> dict[str, NamedSharding]:
    """{path: where a parameter of a decoder lies}, by SHARDING of its network's file.

    Args:
      part: 'unet' or 'vae', the first word of the paths.
      shapes: of the parameters.
      device_mesh: with the axes of a stage's mesh.
    """
    table = {"unet": unet, "vae": autoencoder}[part].SHARDING
    tree = rules.unflatten(dict(shapes))
    specs = {part: rules.assign(table, tree[part], what=f"{part} SHARDING", total=False)}
    return rules.flatten(mesh.parameter_shardings(device_mesh, specs, tree))


def look(
    folder: str | Path,
    scheduler: str = "",
    compute: DTypeLike = jnp.float32,
    frozen: DTypeLike = jnp.float32,
) -> DecoderBase:
    """Reads what a base records of itself, and nothing else.

    Args:
      folder: of the base.
      scheduler: a key of `scheduler_config.KINDS`; '' takes the base's.
      compute: dtype of the activations.
      frozen: dtype of the parameters.

    Raises:
      UserError: no base of a decoder, a part or a file missing or damaged, a scheduler that does
        not exist, or parts that do not fit each other; names the file.
    """
    folder = Path(folder)
    held = base_description.base_about(folder)["shapes"]
    told = base_description.base_networks(folder)
    made: dict[str, Any] = {}
    for part, kind in (("unet", UNet), ("vae", Autoencoder), ("text_encoder", ClipText)):
        if part not in told or not any(path.startswith(f"{part}/") for path in held):
            raise UserError(f"lacks the part {part!r} of a decoder", field=str(folder), hint=MAKE)
        made[part] = _network(folder, part, kind, told[part], compute)
    for name in (SCHEDULER, TOKENIZER):
        if not (folder / name).exists():
            raise UserError(f"lacks {name}, which a decoder needs", field=str(folder), hint=MAKE)
    place = folder / SCHEDULER
    noise = scheduler_config.parse(damage.read_object(place), scheduler, str(place))
    net, vae, text = made["unet"], made["vae"], made["text_encoder"]
    pairs = (
        ("text_width", net.text_width, "text encoder's width", text.width),
        ("latent_channels", net.latent_channels, "autoencoder's", vae.latent_channels),
    )
    for name, have, other, wanted in pairs:
        if have != wanted:
            what = f"the UNet's {name} is {have}, and the {other} {wanted}"
            raise UserError(what, field=str(folder), hint=MAKE)
    return DecoderBase(folder, net, vae, text, noise, _size(folder, vae.factor), frozen)


def of_stage(stage: Stage, modality: str, scheduler: str = "") -> DecoderBase | None:
    """The decoder of one modality of a run's answers, looked at; None where its folder is missing.

    Args:
      stage: of the run, see `load_run.stage_of`.
      modality: of `stage.outputs`.
      scheduler: as of `look`.

    Raises:
      UserError: as of `look`, or it does not read what the run's projection gives.
    """
    out = stage.outputs[modality]
    if not out.decoder or not Path(out.decoder).exists():
        return None
    base = look(out.decoder, scheduler, stage.compute, stage.frozen)
    projection = networks.network(stage.parts[out.projection], stage, out.projection)
    field = f"outputs.{modality}.decoder"
    base.check_projection(projection.output_width, projection.queries, field)
    return base


def missing(stage: Stage, modality: str) -> str:
    """Where the decoder of a modality is not, in words."""
    folder = stage.outputs[modality].decoder
    field = f"outputs.{modality}.decoder"
    return f"no folder {folder}" if folder else f"{field} of the run names no folder"


def _network(
    folder: Path, part: str, kind: type[N], fields: Mapping[str, Any], compute: DTypeLike
) -> N:
    """A part as its record says; raises UserError where the record makes no sense."""
    with damage.reading(folder / base_description.CONVERSION):
        limits.check_network(fields, f"{folder / base_description.CONVERSION}: {part}")
        given: dict[str, Any] = {
            k: tuple(x) if isinstance(x, list) else x for k, x in fields.items()
        }
        network = kind(**given, dtype=jnp.dtype(compute))
        shapes_of(part, network)
    return network


def shapes_of(part: str, network: Network) -> Shapes:
    """{path: shape} of a decoder's network, the part's name in front."""
    return rules.flatten({part: networks.shapes_of(network)})


def _size(folder: Path, factor: int) -> tuple[int, int]:
    """Sides of the pictures that the base's UNet was trained on: 64 latents where it tells none."""
    file = folder / SIDE
    told = damage.read_object(file).get("sample_size") if file.exists() else None
    with damage.reading(file):
        sides = told if isinstance(told, list) else [told or 64] * 2
        height, width = (side * factor for side in sides)
        if not all(type(side) is int and side > 0 for side in (height, width)):
            raise ValueError(f"sample_size is {words.shown(told)}")
    return height, width
