"""Modality: all that the library knows of one modality's files.

Each of `image.py`, `video.py`, `speech.py` and `cif_features.py` ends with such a record, and
`modalities.py` finds them by name. That name is also the modality's marker `<name>` in prompts, its
column in prepared sets and tables, its key in instruction files, the flag `--name` of
launch/generate.py and the command `/name` of launch/chat.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from xllm_jax.core.stage import Data

FRAMES = "data.frames"  # the bound with length buckets

# How a page shows a file: a picture, several, a spectrogram with its sound, a line for every
# channel, or in words how many vectors it holds.
View = Literal["picture", "frames", "sound", "plot", "vectors"]


def _one(_: Data) -> int:
    return 1


def _nothing(_: Data) -> tuple[str, ...]:
    return ()


def _no_settings(_: Data) -> Mapping[str, str]:
    return {}


@dataclasses.dataclass(frozen=True)
class Modality:
    """One modality, up to the batch; `core.stage.Route` says which networks read it.

    Attributes:
      load: (path, data, generator) -> `[items, *shape]` float32, as the encoder reads it. The
        generator is None outside of training, where nothing is augmented.
      read: reads a whole file by the cheapest way through its decoder, to see whether it can be
        read at all; for the view 'plot' it returns `[steps, channels]`.
      shape: of one item under the settings of the data.
      fields: names of the fields of Data that the values depend on, or of options as 'image.size'.
      settings: {full name: value} of options that the values depend on where the stage does not
        name them.
      libraries: that make the values, by their names in `preprocessing.VERSIONS` or of packages.
      items: media items that one file becomes.
      random: options, by their full names, that change the values from one epoch to the next.
      bound: the setting that bounds an item's steps, `shape[0]`, where files differ in length: they
        are padded, and their lengths counted. 'data.frames' has length buckets.
      count: steps of a file by its header alone; needed with length buckets and for slots of
        'steps'.
      slot: embeddings of a file in the prompt: all that the interface makes ('fixed'), one a token
        of the transcript ('transcript') or one a step ('steps'). Where nobody wrote down what is
        said, the interface itself decides about the last two.
      tasks: task of an example of such a file, without and with a question beside it.
      view: how a page shows a file.
      contents: what the vectors of a file are called; its modality's name where this is ''.
      padding: what to do where most places for items are empty.
      picture: whether prepared sets store a file as the image that TFDS knows.
    """

    load: Callable[[str, Data, np.random.Generator | None], np.ndarray]
    read: Callable[[str], object]
    shape: Callable[[Data], tuple[int, ...]]
    fields: tuple[str, ...]
    settings: Callable[[Data], Mapping[str, str]] = _no_settings
    libraries: tuple[str, ...] = ()
    items: Callable[[Data], int] = _one
    random: Callable[[Data], tuple[str, ...]] = _nothing
    bound: str = ""
    count: Callable[[str], int] | None = None
    slot: Literal["fixed", "transcript", "steps"] = "fixed"
    tasks: tuple[str, str] = ("dialogue", "dialogue")
    view: View = "vectors"
    contents: str = ""
    padding: str = ""
    picture: bool = False

    @property
    def spoken(self) -> bool:
        """Whether its slot is as long as what is said."""
        return self.slot != "fixed"

    def values(self, data: Data) -> dict[str, Any]:
        """{name: value} of `fields`, as far as they are set."""
        found: dict[str, Any] = {}
        for name in self.fields:
            field, _, option = name.partition(".")
            value = getattr(data, field)
            if option:
                one = {key: value[key] for key in value if key == option}
                found[field] = found.get(field, {}) | one
            else:
                found[field] = value
        return found

    def bytes(self, data: Data) -> int:
        """Bytes of one item."""
        return 4 * math.prod(self.shape(data))
