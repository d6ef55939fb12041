"""Captions as requests to draw: every wording, with and without words around the picture."""

from __future__ import annotations

import itertools

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.data.text import instructions_to_draw as wordings

SAID = "a cat on a mat"
KEYS = [f"record-{number}" for number in range(200)]


@pytest.mark.parametrize(
    ("name", "echo", "reply"),
    [*itertools.product(wordings.WORDINGS, (False, True), (False, True))],
)
def test_every_wording_asks_for_the_caption_and_answers_with_one_picture(name, echo, reply):
    wording = wordings.find(name, "")
    asked, answered = set(), set()
    for key in KEYS:
        one = wordings.request(key, SAID, "image", wording, echo, reply)
        assert one == wordings.request(key, SAID, "image", wording, echo, reply)
        assert (one.key, one.task, one.outputs) == (key, "draw", (("image", SAID),))
        assert one.instruction.count(SAID) == 1 and "{" not in one.instruction + one.answer
        assert one.answer.count("<image>") == 1 and not one.media and not one.pictures
        asked.add(one.instruction.replace(SAID, wordings.CAPTION))
        answered.add(one.answer.replace("<image>", wordings.RUN))
    assert asked == set(wording.requests)
    if echo:
        assert answered == {f"{SAID} {wordings.RUN}"}
    else:
        assert answered == (set(wording.replies) if reply else {wordings.RUN})


def test_what_is_said_may_be_other_words_than_the_caption():
    """As in the embedded world, where a caption says more than anybody asks for."""
    wording = wordings.find("zh", "")
    one = wordings.request("a", SAID, "audio", wording, echo=True, said="a cat", picture="cat.jpg")
    assert "a cat" in one.instruction and SAID not in one.instruction
    assert one.answer == f"{SAID} <audio>" and one.outputs == (("audio", SAID),)
    assert one.pictures == ("cat.jpg",)


def test_an_unknown_wording_is_one_line():
    with pytest.raises(UserError, match=r"options\.wording: unknown wording 'fr'.*zh, en, caption"):
        wordings.find("fr", "options.wording")
