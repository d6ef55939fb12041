"""The instruction set of stage 3, drawn from its sources (paper section 3.4).

    OUTPUT/selection.json, OUTPUT/train.npy     what was drawn, for the reader 'selection'
    OUTPUT/instructions.json                    counts per source, rejects with their reasons
    OUTPUT/shards/                              the set with its media, for the reader 'prepared'

The same seed draws the same records from the same sources, whatever runs it. Records whose media
cannot be decoded are not drawn. A record that brings no question of its own gets one of its task's
instructions.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.sources import layout
from xllm_jax.prepare import engine, pick, preparation, runner, transforms

LEAST = 16  # records looked at together

COUNTS = {"minigpt4_zh": 3500, "aishell2": 2000, "activitynet": 1000, "vsdial_cn": 3500}
"""The paper names about 10k in all: 3.5k, 2k, 1k and 1k; VSDial-CN, the one task that joins image
and speech, makes up the rest here, as in `configs/stage3_instruction.py`."""

INSTRUCTIONS = {
    "caption": (
        "请描述这张图片。",
        "这张图片里有什么？",
        "请详细说说这张图。",
        "你在图里看到了什么？",
    ),
    "video_caption": (
        "请描述这段视频。",
        "视频里发生了什么？",
        "请说说视频的内容。",
        "你在视频里看到了什么？",
    ),
    "asr": (
        "请把语音转写成文字。",
        "这段语音说了什么？",
        "请写出语音的文字。",
        "请听写这段语音。",
    ),
    "spoken_vqa": (
        "请看图回答语音里的问题。",
        "根据图片回答语音的提问。",
        "请回答语音问的图片问题。",
        "语音问了什么？请看图作答。",
    ),
}
"""Four a task, as many as the paper's repository has, in our own words; `--instructions` names a
file with others, such as its own lists (xllm/datasets/datasets/*_instruction.py)."""


def build(
    output: str,
    sources: Mapping[str, Source],
    input: str = "",
    counts: Mapping[str, int] | None = None,
    instructions: str = "",
    seed: int = 0,
    beam: Sequence[str] = (),
    workers: int = 0,
    allow_paths: Sequence[str] = (),
) -> dict[str, Any]:
    """Draws the set.

    Args:
      output: folder of the set.
      sources: {name: Source}.
      input: folder that the sources' paths start from.
      counts: {name: records to be drawn}; the paper's by default, for the sources that there are.
      instructions: JSON file {task: [text, …]}; '' takes INSTRUCTIONS.
      seed: of the draw.
      beam, workers: as of `runner.options`.
      allow_paths: folders that the sources' files may lie in, too.

    Returns:
      {'records', 'sources': {name: records}, 'rejected', 'reasons': {reason: count}}.

    Raises:
      UserError: a count of no source, too few usable records, or what the readers raise.
    """
    wanted = {name: COUNTS.get(name, 0) for name in sources} | dict(counts or {})
    odd = sorted(wanted.keys() - sources.keys())
    if odd:
        hint = f"Sources: {', '.join(sources)}"
        raise UserError(f"there is no source {odd[0]!r}", field="--counts", hint=hint)
    whole = _placed({n: one for n, one in sources.items() if wanted[n]}, input, allow_paths)
    lists = read_lists(instructions) if instructions else INSTRUCTIONS
    texts = [text for task in sorted(lists) for text in lists[task]]

    def checked(usable: transforms.Usable, places: list[int]) -> list:
        return runner.mapped(usable, places, Path(output) / "checked.json", beam, workers)

    rows, rejects = [], []
    for number, (name, source) in enumerate(whole.items()):
        found = mixture.read(name, source, "")
        order = np.random.default_rng([seed, zlib.crc32(name.encode())])
        usable = functools.partial(checked, transforms.Usable(name, source))
        drawn, bad = draw(name, source, len(found), wanted[name], order, usable)
        rejects += bad
        rows += [(number, place, asked(found[place], lists, texts, seed)) for place in drawn]
    order = np.random.default_rng(seed).permutation(len(rows))
    pick.write(output, "train", whole, np.asarray(rows, np.int64)[order], texts)
    stored = prepare(output, whole.values(), beam, workers)
    reasons = dict(Counter(one["reason"] for one in rejects).most_common())
    summary = {"records": stored, "sources": {name: wanted[name] for name in whole}}
    summary |= {"rejected": len(rejects), "reasons": reasons}
    file = Path(output) / "instructions.json"
    atomic.write_json(file, summary | {"seed": seed, "rejects": rejects})
    atomic.remove_partial(Path(output))
    return summary


def _placed(
    sources: Mapping[str, Source], input: str, allow_paths: Sequence[str]
) -> dict[str, Source]:
    """The sources with whole paths, and what they may read beyond them."""
    return {
        name: dataclasses.replace(
            one, path=str(Path(input) / one.path), allow_paths=(*one.allow_paths, *allow_paths)
        )
        for name, one in sources.items()
    }


def prepare(output: str, sources: Iterable[Source], beam: Sequence[str], workers: int) -> int:
    """Writes the shards of what was drawn from sources; returns how many records they hold."""
    sources = list(sources)
    places = {place for one in sources for place in mixture.reach_of(one, "").places}
    further = [one.options.get("modalities") or {} for one in sources]
    named = {name: place for one in further for name, place in one.items()}
    options = {"modalities": named} if named else {}
    source = Source("selection", output, options=options, allow_paths=tuple(sorted(places)))
    shards = f"{output}/shards"
    made = preparation.make("instructions", source, shards, preparation.PER_SHARD, several=True)
    return engine.run(made, beam, workers)["splits"]["train"]["records"]


def read_lists(file: str) -> dict[str, list[str]]:
    """{task: instructions} of a JSON file.

    Raises:
      UserError: it is something else.
    """
    lists = layout.read_json(Path(file))
    good = isinstance(lists, dict) and all(isinstance(texts, list) for texts in lists.values())
    if not good or not all(isinstance(text, str) for texts in lists.values() for text in texts):
        raise UserError("is no table of lists", field=file, hint='{"caption": ["…", "…"]}')
    return lists


def draw(
    name: str,
    source: Source,
    size: int,
    count: int,
    order: np.random.Generator,
    usable: Callable[[list[int]], list],
) -> tuple[list[int], list[dict[str, str]]]:
    """Records of a source in a random order, until enough of them can be used.

    Args:
      name, source: which.
      size: records of the source.
      count: wanted.
      order: randomness.
      usable: what `transforms.Usable` says of places.

    Returns:
      (places of usable records, what is wrong with the others that were met).

    Raises:
      UserError: the source has fewer.
    """
    places, drawn, rejects, tried = order.permutation(size).tolist(), [], [], 0
    while len(drawn) < count and tried < size:
        some = places[tried : tried + max(count - len(drawn), LEAST)]
        wrong = dict(usable(some))
        rejects += [wrong[place] for place in some if wrong[place]]
        drawn += [place for place in some if not wrong[place]]
        tried += len(some)
    if len(drawn) < count:
        what = f"has {len(drawn)} usable records of {count} wanted"
        raise UserError(what, field=source.path, hint=f"--counts={name}={len(drawn)}")
    return drawn[:count], rejects


def asked(
    example: Example, lists: Mapping[str, Sequence[str]], texts: Sequence[str], seed: int
) -> int:
    """The number of the instruction that an example gets, -1 where it brings its own.

    Raises:
      UserError: its task has none.
    """
    if example.instruction:
        return -1
    known = lists.get(example.task, ())
    if not known:
        hint = "Add the task to the file of --instructions"
        raise UserError(
            f"no instruction for the task {example.task!r}", field=example.key, hint=hint
        )
    drawn = zlib.crc32(f"{seed} {example.key}".encode("utf-8", "backslashreplace"))
    return texts.index(known[drawn % len(known)])
