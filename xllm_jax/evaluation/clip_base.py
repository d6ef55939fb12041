"""CLIP as scores use it: a converted base with its tokenizer, on every device of this host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from xllm_jax.convert import conversion_record, sizes
from xllm_jax.convert.sources import clip as tables
from xllm_jax.core import checkpoint, checksum, mesh, rules
from xllm_jax.core.atomic import sha256 as file_checksum
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.data.media import image
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer
from xllm_jax.models.clip import Clip


class ClipBase:
    """CLIP with its parameters on every device of this host.

    Args:
      base: folder that launch/convert.py --source=clip has written.
      tokenizer: folder of its tokenizer; '' takes the base, which has it where the folder that was
        converted had it.

    Attributes:
      side: of its images, in pixels.
      identity: hash of everything that a score depends on besides the pair.

    Raises:
      UserError: no such base, or a tokenizer of another CLIP.
    """

    def __init__(self, base: str, tokenizer: str = ""):
        made = conversion_record.read(base) if checkpoint.base_exists(base) else None
        if made is None or made.source != tables.PART:
            hint = "Make one: xllm convert --source=clip --input=clip-vit-base-patch16"
            raise UserError("is no base of CLIP", field=base, hint=hint)
        folder = tokenizer or base
        self._model, self._tokenizer = Clip(**made.options["sizes"]), ClipTokenizer(folder)
        self._check_tokenizer(folder)
        self.side: int = self._model.vision_fields["image_size"]
        files = [Path(folder) / name for name in tables.TOKENIZER]
        known = {file.name: file_checksum(file) for file in files if file.is_file()}
        self.identity = checksum.of_json([made.files, made.options, known])
        self._mesh = mesh.make({"data": -1}, jax.local_devices())
        self._params = self._load(base)
        self._compiled = jax.jit(self._apply, static_argnames=("method",))

    def images(self, pictures: np.ndarray, batch: int = 32) -> np.ndarray:
        """Features of pictures, for FID and the CLIP score.

        Args:
          pictures: `[N, height, width, 3]` uint8; CLIP sees the middle square of each.
          batch: computed at a time.

        Returns:
          `[N, shared]` float32, of any length.
        """
        squares = [image.center(Image.fromarray(one), self.side) for one in pictures]
        values = [image.normalize(one) for one in squares]
        return self._batched("images", np.stack(values), batch)

    def texts(self, captions: Sequence[str], batch: int = 32) -> np.ndarray:
        """Features of captions, `[N, shared]` float32, of any length; `batch` at a time."""
        return self._batched("texts", self._ids(captions), batch)

    def _batched(self, method: str, values: np.ndarray, batch: int) -> np.ndarray:
        batch, made = mesh.rounded_up(batch), []
        for start in range(0, len(values), batch):
            rows = np.arange(start, start + batch) % len(values)
            made.append(np.asarray(self._compute(method, values[rows]), np.float32))
        return np.concatenate(made)[: len(values)]

    def _ids(self, captions: Sequence[str]) -> np.ndarray:
        return self._tokenizer.encode(captions, self._model.text_fields["positions"])

    def _compute(self, method: str, *inputs: np.ndarray) -> jax.Array:
        """Starts a method of `models.clip.Clip`; the devices divide the number of rows."""
        rows = NamedSharding(self._mesh, mesh.batch_spec())
        with jax.set_mesh(self._mesh), jax.default_matmul_precision("float32"):
            placed = [jax.device_put(x, rows) for x in inputs]
            return self._compiled(self._params, *placed, method=method)

    def _apply(self, params: Params, *inputs: jax.Array, method: str) -> jax.Array:
        return self._model.apply({"params": params}, *inputs, method=method)

    def _load(self, base: str) -> dict:
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        like = {
            path: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=everywhere)
            for path, x in rules.flatten({tables.PART: sizes.shapes_of(self._model)}).items()
        }
        found = checkpoint.load_leaves(base, tables.PART, like)
        return rules.unflatten(found)[tables.PART]

    def _check_tokenizer(self, folder: str) -> None:
        text, has = self._model.text_fields, self._tokenizer
        end = has.largest if text.get("end") is None else text["end"]
        if has.largest >= text["vocabulary"] or has.end != end:
            what = (
                f"its ids reach {has.largest} and {has.end} ends a text, CLIP has "
                f"{text['vocabulary']} and {end} ends one"
            )
            hint = "Give the tokenizer that the model was published with"
            raise UserError(what, field=folder, hint=hint)
