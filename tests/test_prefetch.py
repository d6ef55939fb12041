"""Prefetching changes neither batches, nor positions, nor when an error is met."""

from __future__ import annotations

import threading

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.training.prefetch import Prefetched


class Counting:
    """Batches 0, 1, 2 …, the last of which cannot be drawn; notes which have been."""

    def __init__(self, last: int = 1000):
        self.drawn, self.last, self.changed = 0, last, threading.Condition()

    def __next__(self):
        if self.drawn == self.last:
            raise UserError("too many bad files")
        with self.changed:
            self.drawn += 1
            self.changed.notify_all()
        return self.drawn - 1, {"number": self.drawn - 1}

    def position(self):
        return {"next_index": self.drawn}

    def wait(self, drawn):
        with self.changed:
            return self.changed.wait_for(lambda: self.drawn >= drawn, 60)


def test_one_batch_is_drawn_ahead_and_the_position_is_that_of_the_last_one_used():
    batches = Counting()
    ahead = Prefetched(batches, lambda batch: -batch)
    assert batches.wait(1) and ahead.position() == {"next_index": 0}
    for number in range(4):
        assert next(ahead) == (-number, {"number": number, "arrays": number})
        assert batches.wait(number + 2), "the next batch is not drawn while this one is used"
        assert batches.drawn == number + 2, "more than one batch ahead"
        assert ahead.position() == {"next_index": number + 1}
    ahead.close()
    assert ahead.position() == {"next_index": 4}


def test_an_error_waits_for_its_turn():
    ahead = Prefetched(Counting(2), lambda batch: batch)
    assert [next(ahead)[0] for _ in range(2)] == [0, 1]
    assert ahead.position() == {"next_index": 2}
    with pytest.raises(UserError, match="too many bad files"):
        next(ahead)
    ahead.close()


def test_batches_are_placed_while_the_one_before_is_used():
    placed, used = threading.Event(), threading.Event()

    def place(batch):
        if batch == 1:
            assert not used.is_set()
            placed.set()
        return batch

    ahead = Prefetched(Counting(), place)
    next(ahead)
    assert placed.wait(60)
    used.set()
    ahead.close()
