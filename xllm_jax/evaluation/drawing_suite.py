"""How often drawn pictures show what the world was asked to draw.

The judge (`scene_reader.py`) reads every picture; nobody who draws has learned from it. The ceiling
is the decoder given the words of the request themselves, as its own text encoder says them. Two
controls say what luck is worth: the same pictures against other requests, and pictures of nothing.
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xllm_jax.core import atomic, disk
from xllm_jax.data.example import Example
from xllm_jax.data.media import speech
from xllm_jax.data.sources import world_edits, world_requests
from xllm_jax.data.synthetic_world import language, speak
from xllm_jax.data.synthetic_world.requests import Request
from xllm_jax.evaluation import bootstrap, measure, scene_reader, scorers
from xllm_jax.evaluation.scene_reader import Verdict
from xllm_jax.inference.decoder_base import DecoderBase
from xllm_jax.inference.render import Renderer
from xllm_jax.inference.replies import Reply

Draw = Callable[[Sequence[Example]], Sequence[np.ndarray | None]]
"""Requests to pictures `[height, width, 3]` uint8; None where an answer has none."""

COUNT = 160  # requests; enough for intervals of six percent
CEILING = "ceiling"  # control: the decoder's own text encoder says the caption
ENOUGH = 0.9  # share of the ceiling that answers are compared with
HEARD = 0.85  # the same of what is asked for in writing, for what is asked for by voice


def requests(count: int = COUNT, split: str = "test", seed: int = 2000) -> list[Example]:
    """Held-out requests, tagged by kind and by whether their pairs are new.

    Args:
      count, split, seed: as of `sources/world_requests.py`.
    """
    found = []
    for example in world_requests.examples(split=split, count=count, seed=seed):
        request = world_requests.asked_for(example.key)
        tags = (request.kind, *(("unseen_pair",) if request.unseen else ()))
        found.append(dataclasses.replace(example, tags=tags))
    return found


def edits(world: str, count: int = COUNT, split: str = "test") -> list[Example]:
    """Requests to draw pictures of a world again in another color, tagged as `requests` are.

    Args:
      world: its folder.
      count: of requests, at most.
      split: of the pictures.
    """
    found, offered = [], world_edits.examples(world, split)
    for number in range(min(count, len(offered))):
        example = offered[number]
        request = world_edits.asked_for(example.key)
        tags = (request.kind, *(("unseen_pair",) if request.unseen else ()))
        found.append(dataclasses.replace(example, tags=tags))
    return found


def scores(
    pictures: Sequence[np.ndarray | None], examples: Sequence[Example]
) -> dict[str, scorers.Score]:
    """What the judge says: an answer without a picture is wrong in everything that was asked.

    Args:
      pictures: one for each request.
      examples: the requests.

    Returns:
      `looks`: share with count, shape and color of all objects as asked, and nothing else;
      `places`: share of those that name a place or a relation with all of these as asked.
    """
    verdicts = [_judged(one, example) for one, example in zip(pictures, examples)]
    looks = [bool(verdict and verdict.looks) for verdict in verdicts]
    asked = np.array([names_place(example) for example in examples], np.float64)
    right = asked * [bool(verdict and _in_place(verdict)) for verdict in verdicts]
    sums, ends = np.stack([right, asked], axis=1), np.array([[0.0, 1.0], [1.0, 1.0]])
    return {
        "looks": scorers.average(looks),
        "places": scorers.Score(sums, bootstrap.rate, ends, right),
    }


def run(
    title: str,
    examples: Sequence[Example],
    draw: Draw,
    folder: Path,
    controls: Mapping[str, Draw] | None = None,
) -> dict[str, Any]:
    """Has all requests drawn and judged, those of the controls, too.

    Args:
      title: for people.
      examples: see `requests`.
      draw: the answers' pictures.
      folder: for those pictures that the report shows.
      controls: {name: pictures by somebody else}; beside them 'shuffled' judges the same pictures
        by the requests of others.

    Returns:
      JSON like that of `measure.measure`; 'drawn' of a shown sample is its picture's file, and
      CEILING that of this control. With this control there are also the scores of the ceiling's
      samples, 'ceiling_scores'.
    """
    began = time.monotonic()
    made = {"": draw(examples)} | {name: by(examples) for name, by in (controls or {}).items()}
    scored = {name: scores(pictures, examples) for name, pictures in made.items()}
    others = [*examples[1:], *examples[:1]]
    scored["shuffled"] = scores(made[""], others)
    asides = {name: found for name, found in scored.items() if name}
    ceiling = {
        name: {"ceiling_scores": score.samples.round(4).tolist()}
        for name, score in scored.get(CEILING, {}).items()
    }
    return {
        "title": title,
        "samples": len(examples),
        "seconds": round(time.monotonic() - began, 2),
        "metrics": {
            name: measure.metric(score, {n: a[name] for n, a in asides.items()}, examples)
            | ceiling.get(name, {})
            for name, score in scored[""].items()
        },
        "shown": show(made[""], examples, scored[""], folder, made.get(CEILING)),
        "keys": [example.key for example in examples],
    }


def comparisons(measures: Mapping[str, Any], metric: str = "looks") -> dict[str, Any]:
    """What was drawn against ENOUGH of the ceiling, and from speech against HEARD of the written.

    Args:
      measures: maybe with 'drawing', of `run`, and 'drawing_spoken'.
      metric: of both.

    Returns:
      {'drawing_ceiling', 'drawing_spoken'} as the report reads them; positive where it is more.
    """
    if "drawing" not in measures:
        return {}
    found, written = {}, measures["drawing"]
    scores = written["metrics"][metric]
    if "ceiling_scores" in scores:
        found["drawing_ceiling"] = _above(ENOUGH, scores["ceiling_scores"], scores["scores"])
    if "drawing_spoken" in measures:
        spoken = measures["drawing_spoken"]
        of = dict(zip(written["keys"], scores["scores"]))
        same = [of[key] for key in spoken["keys"]]
        if same:
            heard = spoken["metrics"][metric]["scores"]
            found["drawing_spoken"] = _above(HEARD, same, heard)
    return {name: one | {"metric": metric} for name, one in found.items()}


def _above(share: float, first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """How much the second are more than a share of the first, sample by sample."""
    before, after = np.asarray(first), np.asarray(second)
    return measure.plain(bootstrap.mean_difference(share * before, after))


def show(
    pictures: Sequence[np.ndarray | None],
    examples: Sequence[Example],
    scored: Mapping[str, scorers.Score],
    folder: Path,
    ceiling: Sequence[np.ndarray | None] | None = None,
) -> list[dict[str, Any]]:
    """Samples for a report, half of them failures where there are as many; writes their pictures.

    Args:
      pictures, examples: in the same order.
      scored: of `scores`.
      folder: of the PNG files.
      ceiling: pictures of that control, which are shown beside them.
    """
    right = scored["looks"].samples == 1
    half = measure.SHOWN // 2
    wrong = np.flatnonzero(~right)[:half]
    chosen = sorted([*wrong, *np.flatnonzero(right)[: measure.SHOWN - len(wrong)]])
    disk.make_folder(folder)
    found = []
    for number in map(int, chosen):
        example, picture = examples[number], pictures[number]
        drawn = _saved(picture, folder / f"{example.key}.png")
        beside = ceiling[number] if ceiling else None
        alone = {name: round(float(score.samples[number]), 4) for name, score in scored.items()}
        found.append(
            {
                "key": example.key,
                "media": [list(pair) for pair in example.media],
                "drawn": drawn,
                CEILING: _saved(beside, folder / f"{example.key}-{CEILING}.png"),
                "question": example.instruction,
                "said": example.transcript,
                "answer": "" if picture is None else "<image>",
                "reference": example.outputs[0][1],
                "scores": alone,
                "right": bool(right[number]),
                "tags": list(example.tags),
            }
        )
    return found


def _saved(picture: np.ndarray | None, file: Path) -> str:
    """The path of a picture's PNG file; '' without a picture."""
    if picture is None:
        return ""
    with atomic.whole(file) as partial, partial.open("wb") as opened:
        Image.fromarray(picture).save(opened, "PNG")
    return str(file)


def _in_place(verdict: Verdict) -> bool:
    return verdict.looks and verdict.places is not False and verdict.relation is not False


def _judged(picture: np.ndarray | None, example: Example) -> Verdict | None:
    return None if picture is None else scene_reader.judge(asked_for(example), picture)


def asked_for(example: Example) -> Request:
    """What a picture of an example shall show, of `requests` as of `edits`."""
    edit = example.key.startswith(f"{world_edits.PREFIX}-")
    return (world_edits if edit else world_requests).asked_for(example.key)


def names_place(example: Example) -> bool:
    """Whether a request names a place or a relation."""
    request = asked_for(example)
    return bool(request.relation) or any(wanted.place for wanted in request.objects)


def by_answers(
    reply: Callable[[Sequence[Example]], Sequence[Reply]], renderer: Renderer, how: Rendering
) -> Draw:
    """Draws the first picture of every answer.

    Args:
      reply: of an `Assistant`.
      renderer: the decoder.
      how: to draw.
    """

    def draw(examples: Sequence[Example]) -> list[np.ndarray | None]:
        found = [next(iter(one.pictures), None) for one in reply(examples)]
        drawn = [number for number, one in enumerate(found) if one is not None]
        conditions = [one.embeddings for one in found if one is not None]
        pictures: list[np.ndarray | None] = [None] * len(examples)
        for number, picture in zip(drawn, how(renderer, conditions, drawn)):
            pictures[number] = picture
        return pictures

    return draw


def by_words(base: DecoderBase, renderer: Renderer, how: Rendering, words: bool = True) -> Draw:
    """Draws what is asked for by the decoder's own text encoder, or nothing in particular.

    Args:
      base: of the decoder.
      renderer: of it.
      how: to draw.
      words: False gives it the empty text.
    """

    def draw(examples: Sequence[Example]) -> list[np.ndarray | None]:
        said = [example.outputs[0][1] if words else "" for example in examples]
        return list(how(renderer, base.conditions(said), range(len(examples))))

    return draw


@dataclasses.dataclass(frozen=True)
class Rendering:
    """How all pictures of a comparison are drawn; picture n begins with the noise of seed n.

    Attributes:
      size: (height, width) in pixels.
      steps, guidance: as of `Renderer`.
    """

    size: tuple[int, int]
    steps: int = 10
    guidance: float = 3.0

    def __call__(
        self, renderer: Renderer, conditions: Sequence[np.ndarray], seeds: Sequence[int]
    ) -> np.ndarray:
        """`[n, height, width, 3]` uint8."""
        if not len(conditions):
            return np.zeros((0, *self.size, 3), np.uint8)
        options = {"size": self.size, "steps": self.steps, "guidance": self.guidance}
        return renderer(np.stack(conditions), list(seeds), **options)


def spoken(examples: Sequence[Example], folder: Path, frames: int) -> list[Example]:
    """The same requests with a description that is said, by the voice that training never has.

    The recognizer has never heard the verbs of requests: 画 stands before the speech in writing.

    Args:
      examples: of `requests`.
      folder: of the FLAC files.
      frames: that speech may have; longer requests are left out.
    """
    disk.make_folder(folder)
    found = []
    for example in examples:
        text = language.spoken(asked_for(example).said)
        file = folder / f"{example.key}.flac"
        voice = speak.sample_voice(np.random.default_rng(zlib.crc32(example.key.encode())), True)
        samples = speak.speak(text, voice)
        if speech.frames_of(len(samples)) > frames:
            continue
        speak.write_flac(file, samples)
        media = (("speech", str(file)),)
        changed = {"media": media, "instruction": "画<speech>", "transcript": text}
        found.append(dataclasses.replace(example, **changed))
    return found
