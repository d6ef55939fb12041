"""Pictures of an answer as files: what `xllm generate` and `xllm chat` do with --draw."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.inference.replies import Picture, Reply

HELP = "Folder for the pictures of an answer; without a decoder, for their embeddings as .npz."
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
    """Writes what a diffusion model draws from: `prompt_embeds` `[1, q, width]` float32."""
    file = file.with_name(f"{file.name}.npz")
    with atomic.whole(file) as partial, partial.open("wb") as opened:
        np.savez(opened, prompt_embeds=picture.embeddings[None].astype(np.float32))
    return file


@dataclasses.dataclass(frozen=True)
class Easel:
    """Where pictures go.

    Attributes:
      folder: of the files, `MODALITY_NUMBER`; none that is there is written over.
      family: finishes the words.
      write: how a picture becomes a file.
    """

    folder: Path
    family: LLMFamily
    write: Write = embeddings

    def text(self, reply: Reply) -> str:
        """Writes a reply's pictures; returns its words, with the files' names in their places."""
        made = [
            piece
            if isinstance(piece, str)
            else f"[{self.write(piece, self._next(piece.modality))}]"
            for piece in reply.pieces
        ]
        return self.family.finish("".join(made))

    def _next(self, modality: str) -> Path:
        number = 0
        while list(self.folder.glob(f"{modality}_{number}.*")):
            number += 1
        return self.folder / f"{modality}_{number}"


def words(text: str) -> str:
    """The text of `Easel.text` without the names of files."""
    return PLACE.sub("", text).strip()


def easel(stage: Stage, family: LLMFamily, folder: str) -> Easel:
    """Where --draw says.

    Args:
      stage: of the run.
      family: of its LLM.
      folder: the flag.

    Raises:
      UserError: the run has no outputs.
    """
    check(stage)
    return Easel(Path(folder), family)
