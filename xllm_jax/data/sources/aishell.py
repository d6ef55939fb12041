"""AISHELL-1 and AISHELL-2: Mandarin utterances with transcripts.

AISHELL-1 is on openslr.org/33 (Apache 2.0). AISHELL-2 is sent on application to aishelltech.com,
for academic use.

AISHELL-1 (PATH is data_aishell):

    PATH/wav/{train,dev,test}/SPEAKER/NAME.wav          or .flac
    PATH/transcript/aishell_transcript_v0.8.txt         NAME, then words, divided by spaces
    PATH/tags.json                                      {NAME: [tag, …]}; our own worlds only

Both are also found where their archives unpack them below PATH: data_aishell/, iOS/data/,
AISHELL-DEV-TEST-SET/iOS/.

AISHELL-2 (PATH is iOS/data; 'val' and 'test' are PATH/dev and PATH/test with the same files):

    PATH/trans.txt      NAME, a tab, the sentence
    PATH/wav.scp        NAME, a tab, a path relative to PATH
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows.lazy import Lazy, Lines
from xllm_jax.data.sources import layout

FOLDERS = {"val": "dev"}
UNPACKED = ("data_aishell", "iOS/data", "AISHELL-2/iOS/data", "iOS", "AISHELL-DEV-TEST-SET/iOS")


def examples(path: str, split: str = "train") -> Sequence[Example]:
    """ASR examples of a split, sorted by name; utterances without transcript are left out.

    Args:
      path: folder of one of the layouts above.
      split: 'train', 'val' (their 'dev') or 'test'.

    Raises:
      UserError: no such file or folder, or no utterance with a transcript; on access, a line
        without text.
    """
    root = _root(pathlib.Path(path), split)
    second = next((place for place in _second(root, split) if place.is_file()), None)
    if second is not None:
        said, broken = _lines(second)
        places, lost = _lines(second.with_name("wav.scp"))
        sounds = {name: str(second.parent / place.strip()) for name, place in places.items()}
        broken += lost
    else:
        said, broken = _lines(_first(root))
        folder = root / "wav" / FOLDERS.get(split, split)
        sounds = layout.files([layout.first_folder([folder])], layout.SOUNDS)
    tagged = root / "tags.json"
    tags = layout.read_json(tagged) if tagged.is_file() else {}
    names = sorted(sounds.keys() & said.keys())

    def example(index: int) -> Example:
        name = names[index]
        # The spaces between words, which nobody says, are taken out.
        text, media = "".join(said[name].split()), (("speech", sounds[name]),)
        known = layout.tags(tags, name)
        return Example(name, media, "", text, "asr", (), (text,), transcript=text, tags=known)

    what = f"utterances with a transcript for {split!r}"
    return layout.not_empty(layout.with_broken(Lazy(len(names), example), broken), root, what)


def _root(root: pathlib.Path, split: str) -> pathlib.Path:
    """The folder of the layout, which archives unpack below others."""
    for place in (root, *(root / name for name in UNPACKED)):
        if any(file.is_file() for file in (*_second(place, split), _first(place))):
            return place
    return root


def _second(root: pathlib.Path, split: str) -> list[pathlib.Path]:
    inside = root / FOLDERS.get(split, split) / "trans.txt"
    return [inside, root / "trans.txt"] if split == "train" else [inside]


def _first(root: pathlib.Path) -> pathlib.Path:
    named = root / "transcript" / "aishell_transcript_v0.8.txt"
    return named if named.is_file() else next(iter(litter.glob(named.parent, "*.txt")), named)


def _lines(file: pathlib.Path) -> tuple[dict[str, str], list[UserError]]:
    """({name: the rest of its line}, what is wrong with the lines that are broken)."""
    found, broken = {}, []
    for number, line in enumerate(Lines(file).tried(), start=1):
        if isinstance(line, UserError):
            broken.append(line)
            continue
        name, rest = (*re.split(r"[ \t]+", line.strip(), maxsplit=1), "")[:2]
        if rest:
            found[name] = rest
        else:
            what = f"line {number} has a name and nothing else"
            broken.append(UserError(what, field=str(file), hint="A name, a space, the text"))
    return found, broken
