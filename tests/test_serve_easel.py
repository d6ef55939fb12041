"""The thread that draws: bounded, in groups of a size, and nothing for whoever has left."""

from __future__ import annotations

import io
import threading
import types

import numpy as np
import pytest
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.inference.replies import Picture
from xllm_jax.serve.easel import Easel, Style
from xllm_jax.serve.request import Defect, Overloaded, QueueFull, TimedOut

PICTURE = Picture("image", np.zeros((2, 3), np.float32))
WAIT = 20


class Base:
    """A decoder whose calls are let through one by one; pictures are as gray as their seed."""

    size = (8, 16)
    autoencoder = types.SimpleNamespace(factor=4)
    text = types.SimpleNamespace(positions=2, width=3)

    def __init__(self):
        self.gate, self.groups, self.calls = threading.Semaphore(10**6), [], 0

    def renderer(self, batch, device_mesh):
        return self

    def gradually(self, conditions, seeds, *, size, steps, guidance):
        self.groups.append((list(seeds), size))
        for _ in range(steps):
            assert self.gate.acquire(timeout=WAIT)
            self.calls += 1
            if 13 in seeds:
                raise RuntimeError("13")
            yield None
        yield np.stack([np.full((*size, 3), seed, np.uint8) for seed in seeds])

    def hold(self) -> None:
        while self.gate.acquire(blocking=False):
            pass


@pytest.fixture
def base():
    made = Base()
    made.gate = threading.Semaphore(50)
    return made


@pytest.fixture
def easel(base):
    made = Easel({"image": base}, Style(steps=2, batch=3, queue=4), None, [(4, 4)])
    made.warm_up()
    base.groups.clear()
    yield made
    base.gate.release(1000)
    made.close()


def gray(content: bytes) -> tuple[tuple[int, int], int]:
    with Image.open(io.BytesIO(content)) as opened:
        return opened.size, opened.getpixel((0, 0))[0]


def begun(base, easel):
    """A picture that is being drawn, and waits for its next call."""
    base.hold()
    first = easel.draw(PICTURE, 1, (8, 16))
    while not base.groups:
        threading.Event().wait(0.005)
    return first


def test_pictures_of_a_size_are_drawn_together(base, easel):
    first = begun(base, easel)
    rest = [easel.draw(PICTURE, seed, size) for seed, size in ((2, (8, 16)), (3, (4, 4)))]
    rest += [easel.draw(PICTURE, seed, (8, 16)) for seed in (4, 5)]
    base.gate.release(100)
    assert [gray(one.result(WAIT)) for one in (first, *rest)] == [
        ((16, 8), 1),
        ((16, 8), 2),
        ((4, 4), 3),
        ((16, 8), 4),
        ((16, 8), 5),
    ]
    assert base.groups == [([1], (8, 16)), ([2, 4, 5], (8, 16)), ([3], (4, 4))]
    assert easel.metrics()["pictures_total"] == 5


def test_more_than_may_wait_are_refused(base, easel):
    begun(base, easel)
    waiting = [easel.draw(PICTURE, seed, (4, 4)) for seed in range(4)]
    with pytest.raises(QueueFull) as caught:
        easel.draw(PICTURE, 9, (4, 4))
    assert caught.value.status == 429
    assert waiting[0].cancel()
    easel.draw(PICTURE, 9, (4, 4))  # in its place


def test_nothing_is_drawn_for_whoever_has_left(base, easel):
    first, next_one = begun(base, easel), easel.draw(PICTURE, 2, (4, 4))
    other = easel.draw(PICTURE, 3, (4, 4))
    before = base.calls
    assert first.cancel() and next_one.cancel()
    base.gate.release(1)  # the call that is under way
    base.gate.release(100)
    assert gray(other.result(WAIT)) == ((4, 4), 3)
    assert base.groups[1:] == [([3], (4, 4))] and base.calls == before + 1 + 2


def test_a_defect_costs_its_group_alone(base, easel):
    broken = easel.draw(PICTURE, 13, (8, 16))
    with pytest.raises(Defect, match="RuntimeError"):
        broken.result(WAIT)
    assert gray(easel.draw(PICTURE, 6, (8, 16)).result(WAIT))[1] == 6


def test_whoever_waits_too_long_is_told(base):
    made = Easel({"image": base}, Style(steps=1, seconds=0.0))
    made.warm_up()
    with pytest.raises(TimedOut):
        made.draw(PICTURE, 1, (8, 16)).result(WAIT)
    made.close()


def test_closing_refuses_what_waits(base, easel):
    first, waiting = begun(base, easel), easel.draw(PICTURE, 2, (4, 4))
    closing = threading.Thread(target=easel.close)
    closing.start()
    while not easel._closed:
        threading.Event().wait(0.005)
    base.gate.release(100)
    closing.join(WAIT)
    for one in (first, waiting):
        with pytest.raises(Overloaded):
            one.result(WAIT)
    with pytest.raises(Overloaded):
        easel.draw(PICTURE, 3, (4, 4))


def test_sizes_are_those_of_the_start(base, easel):
    assert easel.size(None, "image") == easel.size("auto", "image") == (8, 16)
    assert easel.size("16x8", "image") == (8, 16) and easel.size("4x4", "image") == (4, 4)
    with pytest.raises(UserError, match=r"none of 16x8, 4x4"):
        easel.size("8x16", "image")
    with pytest.raises(UserError, match="multiple"):
        Easel({"image": base}, sizes=[(5, 4)])
