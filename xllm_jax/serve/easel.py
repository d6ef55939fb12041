"""Pictures of answers, drawn in a thread of their own while requests are decoded.

The UNet is called once at a time and the device is left to others in between, so that a token waits
for one call at most. Sizes are few and known before: each is compiled in the warm-up.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future

import numpy as np
from absl import logging
from jax.sharding import Mesh
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.inference import render
from xllm_jax.inference.decoder_base import DecoderBase
from xllm_jax.inference.render import Renderer
from xllm_jax.inference.replies import Picture
from xllm_jax.serve.request import Defect, Overloaded, QueueFull, TimedOut

Size = tuple[int, int]  # (height, width) in pixels
AUTO = (None, "", "auto")  # sizes that leave it to the decoder


@dataclasses.dataclass(frozen=True)
class Style:
    """How pictures are drawn.

    Attributes:
      steps, guidance: as of `Renderer`.
      batch: pictures of one size that are drawn at once; those that are missing cost as much.
      queue: pictures that may wait; more are refused.
      seconds: that one may wait.
    """

    steps: int = 50
    guidance: float = 7.5
    batch: int = 1
    queue: int = 64
    seconds: float = 300.0


@dataclasses.dataclass(eq=False)
class _Order:
    picture: Picture
    seed: int
    size: Size
    drawn: Future[bytes]
    since: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def kind(self) -> tuple[str, Size]:
        """What may be drawn together."""
        return self.picture.modality, self.size


class Easel:
    """Draws pictures with the decoders that a run names.

    Args:
      bases: {modality of answers: its decoder}.
      style: how.
      own: (height, width) where nobody asks for a size; None for what a decoder was trained on.
      sizes: further ones that may be asked for.
      device_mesh: over which decoders are split; None is one device.

    Raises:
      UserError: a size that a decoder cannot draw.
    """

    def __init__(
        self,
        bases: Mapping[str, DecoderBase],
        style: Style = Style(),
        own: Size | None = None,
        sizes: Iterable[Size] = (),
        device_mesh: Mesh | None = None,
    ):
        self.style, self._bases, self._mesh = style, dict(bases), device_mesh
        self.sizes = {
            name: tuple(dict.fromkeys([own or base.size, *sizes])) for name, base in bases.items()
        }
        for name, base in bases.items():
            for size in self.sizes[name]:
                render.check_size(size, base.autoencoder.factor)
        self._renderers: dict[str, Renderer] = {}
        self._orders: collections.deque[_Order] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._counts = dict.fromkeys(("pictures_total", "picture_seconds_total"), 0.0)
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)

    def warm_up(self) -> None:
        """Reads the parameters, compiles for every size, and begins to draw.

        Raises:
          UserError: a decoder's parameters are missing or damaged.
        """
        for name, base in self._bases.items():
            self._renderers[name] = base.renderer(self.style.batch, self._mesh)
            shape = (base.text.positions, base.text.width)
            for size in self.sizes[name]:
                nothing = Picture(name, np.zeros(shape, np.float32))
                collections.deque(self._drawing(name, [nothing], [0], size, steps=1), maxlen=0)
        self._thread.start()

    def size(self, said: str | None, modality: str) -> Size:
        """(height, width) of OpenAI's 'WIDTHxHEIGHT'; of None, '' and 'auto' the decoder's own.

        Raises:
          UserError: a size that is not drawn; names those that are.
        """
        known = {f"{width}x{height}": (height, width) for height, width in self.sizes[modality]}
        if said in AUTO:
            return next(iter(known.values()))
        if said not in known:
            raise UserError(f"is none of {', '.join(known)}", field="size")
        return known[said]

    def draw(self, picture: Picture, seed: int, size: Size) -> Future[bytes]:
        """Orders a PNG file; a future that is cancelled is not drawn, or not to its end.

        Args:
          picture: of an answer, of a modality in `sizes`.
          seed: of its noise, below 2^32.
          size: one of `sizes`.

        Raises:
          QueueFull: as many wait as may.
          Overloaded: it is closed.
        """
        order = _Order(picture, seed, size, Future())
        with self._changed:
            if self._closed:
                raise Overloaded("is stopping", field="easel", hint="Try again later")
            waiting = sum(not one.drawn.cancelled() for one in self._orders)
            if waiting >= self.style.queue:
                what = f"{waiting} pictures wait already"
                raise QueueFull(what, field="easel", hint="Try again later")
            self._orders.append(order)
            self._changed.notify_all()
        return order.drawn

    def close(self) -> None:
        """Ends the thread behind the call that it makes, and refuses what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def metrics(self) -> dict[str, float]:
        """Numbers now, see `Engine.metrics`."""
        return self._counts | {"pictures_waiting": float(len(self._orders))}

    def _run(self) -> None:
        while group := self._next():
            began = time.monotonic()
            try:
                self._draw(group)
            except Exception as error:
                logging.exception("a picture could not be drawn")
                _fail(group, Defect(f"drawing failed ({type(error).__name__})", field="easel"))
            self._counts["picture_seconds_total"] += time.monotonic() - began
        _fail(self._orders, Overloaded("has stopped", field="easel", hint="Try again later"))

    def _next(self) -> list[_Order]:
        """The next pictures of one size, oldest first; none when it is closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._orders or self._closed)
                if self._closed:
                    return []
                self._refuse_late()
                found = [one for one in self._orders if not one.drawn.cancelled()]
                group = [one for one in found if one.kind == found[0].kind][: self.style.batch]
                self._orders = collections.deque(one for one in found if one not in group)
                if group:
                    return group

    def _refuse_late(self) -> None:
        now, most = time.monotonic(), self.style.seconds
        late = [one for one in self._orders if now - one.since > most]
        what = f"waited {most:g} s to be drawn"
        _fail(late, TimedOut(what, field="picture", hint="Try again later"))

    def _draw(self, group: list[_Order]) -> None:
        (name, size), pictures = group[0].kind, [one.picture for one in group]
        drawn = None
        for pixels in self._drawing(name, pictures, [one.seed for one in group], size):
            drawn = pixels
            if self._closed or all(one.drawn.cancelled() for one in group):
                break
        if drawn is None:
            error = Overloaded("is stopping", field="easel", hint="Try again later")
            return _fail(group, error)
        for one, picture in zip(group, drawn):
            self._counts["pictures_total"] += 1
            if one.drawn.set_running_or_notify_cancel():
                one.drawn.set_result(_png(picture))
        return None

    def _drawing(
        self, name: str, pictures: list[Picture], seeds: list[int], size: Size, steps: int = 0
    ) -> Iterator[np.ndarray | None]:
        return self._renderers[name].gradually(
            np.stack([one.embeddings for one in pictures]),
            seeds,
            size=size,
            steps=steps or self.style.steps,
            guidance=self.style.guidance,
        )


def _fail(orders: Iterable[_Order], error: Exception) -> None:
    for one in orders:
        if not one.drawn.done() and one.drawn.set_running_or_notify_cancel():
            one.drawn.set_exception(error)


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
