"""Pictures of an answer as files: what `xllm generate` and `xllm chat` do with --draw."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from xllm_jax.core import atomic, mesh
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.inference import decoder_base, render
from xllm_jax.inference.load_run import stage_of
from xllm_jax.inference.replies import Picture, Reply
from xllm_jax.launch import unused_flags
from xllm_jax.models.outputs import scheduler_config

HELP = "Folder for the pictures of an answer; without a decoder, for their embeddings as .npz."
MOST = 4096  # pixels of a side

# Other commands have flags of these names; each runs alone, but tests import several.
STEPS = flags.DEFINE_integer(
    "steps", 50, "Steps of the scheduler for a picture.", 1, 1000, allow_override=True
)
GUIDANCE = flags.DEFINE_float(
    "guidance",
    7.5,
    "How far a picture goes beyond what the words say, as a factor; up to 1 it does not.",
    0.0,
    1000.0,
    allow_override=True,
)
SIZE = flags.DEFINE_string(
    "size",
    "",
    "Height and width of a picture in pixels, such as 512 or 512x768; by default what the decoder "
    "was trained on.",
    allow_override=True,
)
SCHEDULER = flags.DEFINE_string(
    "scheduler",
    "",
    f"Way from noise to a picture: {', '.join(scheduler_config.KINDS)}; by default the decoder's.",
    allow_override=True,
)
OUTPUTS = flags.DEFINE_string(
    "outputs",
    "",
    "Folder of a run of stage_output_image beside the same LLM, with which the run of --checkpoint "
    "answers with pictures, too.",
    allow_override=True,
)
OPTIONS = ("steps", "guidance", "size", "scheduler")

PLACE = re.compile(r"\[[^\[\]]+\.(?:png|npz)\]")

Write = Callable[[Picture, Path], Path]
"""(picture, file without its suffix) -> the file that was written."""


def check(stage: Stage) -> None:
    """Refuses to draw with a run whose answers are text.

    Raises:
      UserError: the run has no outputs.
    """
    if not stage.outputs:
        hint = "Give a run of stage_output_image as --checkpoint, or leave --draw out"
        raise UserError("answers of this run hold text alone", field="--draw", hint=hint)


def embeddings(picture: Picture, file: Path) -> Path:
    """Writes what a diffusion model draws from, see `prompt_embeds`."""
    return prompt_embeds(picture.embeddings, file)


def prompt_embeds(values: np.ndarray, file: Path) -> Path:
    """Writes `[q, width]` as diffusers' pipelines take it: `prompt_embeds` `[1, q, width]` float32.

    Args:
      values: of one picture.
      file: without its suffix.
    """
    file = file.with_name(f"{file.name}.npz")
    with atomic.whole(file) as partial, partial.open("wb") as opened:
        np.savez(opened, prompt_embeds=values[None].astype(np.float32))
    return file


@dataclasses.dataclass(frozen=True)
class Painter:
    """Draws pictures with a decoder, whose parameters are read when the first is asked for.

    Attributes:
      base: of the decoder.
      seed: of the noise that every picture begins with, whatever is drawn before or beside it.
      size: (height, width) in pixels.
      steps, guidance: as of `Renderer`.
      axes: of the run's mesh, over which the decoder is split.
    """

    base: decoder_base.DecoderBase
    seed: int
    size: tuple[int, int]
    steps: int
    guidance: float
    axes: Mapping[str, int]

    @functools.cached_property
    def renderer(self) -> render.Renderer:
        """The networks with their parameters."""
        alone = jax.device_count() == 1
        return self.base.renderer(device_mesh=None if alone else mesh.make(self.axes))

    def __call__(self, picture: Picture, file: Path) -> Path:
        """Writes a PNG file."""
        options = {"size": self.size, "steps": self.steps, "guidance": self.guidance}
        drawn = self.renderer(picture.embeddings[None], [self.seed], **options)[0]
        file = file.with_name(f"{file.name}.png")
        with atomic.whole(file) as partial, partial.open("wb") as opened:
            Image.fromarray(drawn).save(opened, "PNG")
        return file


@dataclasses.dataclass(frozen=True)
class Easel:
    """Where pictures go.

    Attributes:
      folder: of the files, `MODALITY_NUMBER` or as a sample is called; of the former none that is
        there is written over.
      family: finishes the words.
      write: how a picture becomes a file.
    """

    folder: Path
    family: LLMFamily
    write: Write = embeddings

    def text(self, reply: Reply, name: str = "") -> str:
        """Writes a reply's pictures; returns its words, with the files' names in their places.

        Args:
          reply: of an `Assistant`.
          name: of the first picture's file, and then NAME_1 …, written over; '' takes the next of
            its modality.
        """
        made, count = [], 0
        for piece in reply.pieces:
            if isinstance(piece, str):
                made.append(piece)
                continue
            own = f"{name}_{count}" if count else name
            file = self.folder / own if name else self._next(piece.modality)
            made.append(f"[{self.write(piece, file)}]")
            count += 1
        return self.family.finish("".join(made))

    def _next(self, modality: str) -> Path:
        number = 0
        while list(self.folder.glob(f"{modality}_{number}.*")):
            number += 1
        return self.folder / f"{modality}_{number}"


def words(text: str) -> str:
    """The text of `Easel.text` without the names of files."""
    return PLACE.sub("", text).strip()


def writer(stage: Stage, folder: str, seed: int) -> Write:
    """How pictures become files, looked at before anything large is read.

    Args:
      stage: of the run, see `load_run.stage_of`.
      folder: the flag --draw.
      seed: of the noise.

    Raises:
      UserError: the run has no outputs, the folder is a file, or the decoder or a flag does not
        fit; names it.
    """
    check(stage)
    place = next((at for at in (Path(folder), *Path(folder).parents) if at.exists()), None)
    if place and not place.is_dir():
        raise UserError(f"{place} is no folder", field="--draw", hint="Name a folder")
    render.check_seed(seed)
    made = {name: _write(stage, name, seed) for name in sorted(stage.outputs)}
    return lambda picture, file: made[picture.modality](picture, file)


def chosen(checkpoint: str, folder: str, seed: int, *more: str) -> Write | None:
    """What the flags say of pictures: `writer`, or None where --draw was not given.

    Args:
      checkpoint: folder of the run.
      folder: the flag --draw.
      seed: of the noise.
      more: names of other flags of pictures that the command has.

    Raises:
      UserError: as `writer`, or a flag of pictures was given without --draw.
    """
    if folder:
        return writer(stage_of(checkpoint, OUTPUTS.value), folder, seed)
    check_unused("without --draw", "Add --draw=DIR", *more)
    return None


def check_unused(why: str = "without --draw", hint: str = "Add --draw=DIR", *more: str) -> None:
    """Raises UserError for a flag of pictures that was given where nothing is drawn.

    Args:
      why, hint: as of `unused_flags.refuse`.
      more: names of other flags of pictures that the command has.
    """
    unused_flags.refuse(why, hint, *OPTIONS, *more)


def _write(stage: Stage, modality: str, seed: int) -> Write:
    """How pictures of one modality become files; says in a line where there is no decoder."""
    base = decoder(stage, modality)
    if base is None:
        where = decoder_base.missing(stage, modality)
        line = f"No decoder of {modality} ({where}): embeddings are written as .npz"
        print(line, file=sys.stderr, flush=True)
        return embeddings
    size = pixels(SIZE.value) or base.size
    render.check_size(size, base.autoencoder.factor)
    return Painter(base, seed, size, STEPS.value, GUIDANCE.value, stage.mesh)


def decoder(stage: Stage, modality: str) -> decoder_base.DecoderBase | None:
    """The decoder of one modality with which the flags can draw; None where there is none.

    Raises:
      UserError: the decoder or a flag does not fit, or a flag is given without a decoder.
    """
    base = decoder_base.of_stage(stage, modality, SCHEDULER.value)
    if base is None:
        where = decoder_base.missing(stage, modality)
        hint = "Convert one by xllm convert --source=stable_diffusion (docs/outputs.md)"
        check_unused(f"without a decoder: {where}", hint)
        return None
    if not math.isfinite(GUIDANCE.value):
        raise UserError(f"is {GUIDANCE.value}", field="--guidance", hint="Such as 7.5")
    base.scheduler.table(STEPS.value)
    return base


def pixels(text: str, field: str = "--size") -> tuple[int, int] | None:
    """The sides in '512' or '512x768', in order; None of ''.

    Raises:
      UserError: it is no size.
    """
    if not text:
        return None
    found = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text)
    sides = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not found or max(sides) > MOST:
        hint = f"Two sides in pixels up to {MOST}, such as 512 or 512x768"
        raise UserError(f"{text[:40]!r} is no size of a picture", field=field, hint=hint)
    return sides
