"""AISHELL-1 and AISHELL-2: Mandarin utterances with transcripts.

AISHELL-1 is on openslr.org/33 (Apache 2.0). AISHELL-2 is sent on application to aishelltech.com,
for academic use.

AISHELL-1 (PATH is data_aishell):

    PATH/wav/{train,dev,test}/SPEAKER/NAME.wav          or .flac
    PATH/transcript/aishell_transcript_v0.8.txt         NAME, then words, divided by spaces
    PATH/tags.json                                      {NAME: [tag, …]}; our own worlds only

AISHELL-2 (PATH is iOS/data; 'val' and 'test' are PATH/dev and PATH/test with the same files):

    PATH/trans.txt      NAME, a tab, the sentence
    PATH/wav.scp        NAME, a tab, a path relative to PATH
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows.lazy import Lazy
from xllm_jax.data.sources import layout

FOLDERS = {"val": "dev"}


def examples(path: str, split: str = "train") -> Sequence[Example]:
    """ASR examples of a split, sorted by name; utterances without transcript are left out.

    Args:
      path: folder of one of the layouts above.
      split: 'train', 'val' (their 'dev') or 'test'.

    Raises:
      UserError: no such file or folder, a line without text, or no utterance with a transcript.
    """
    root = pathlib.Path(path)
    second = next((place for place in _second(root, split) if place.is_file()), None)
    if second is not None:
        texts, sounds = _transcripts(second), _paths(second.with_name("wav.scp"))
    else:
        texts = _transcripts(_first(root))
        folder = root / "wav" / FOLDERS.get(split, split)
        sounds = layout.files([layout.first_folder([folder])], layout.SOUNDS)
    tagged = root / "tags.json"
    tags = layout.read_json(tagged) if tagged.is_file() else {}
    names = sorted(sounds.keys() & texts.keys())

    def example(index: int) -> Example:
        name = names[index]
        said, media = texts[name], (("speech", sounds[name]),)
        known = tuple(tags.get(name, ()))
        return Example(name, media, "", said, "asr", (), (said,), transcript=said, tags=known)

    what = f"utterances with a transcript for {split!r}"
    return layout.not_empty(Lazy(len(names), example), root, what)


def _second(root: pathlib.Path, split: str) -> list[pathlib.Path]:
    inside = root / FOLDERS.get(split, split) / "trans.txt"
    return [inside, root / "trans.txt"] if split == "train" else [inside]


def _first(root: pathlib.Path) -> pathlib.Path:
    found = sorted((root / "transcript").glob("*.txt"))
    return found[0] if found else root / "transcript" / "aishell_transcript_v0.8.txt"


def _lines(file: pathlib.Path):
    for number, line in enumerate(layout.read_text(file).splitlines(), start=1):
        if line.strip():
            name, *rest = line.split(maxsplit=1)
            if not rest:
                what = f"line {number} has a name and nothing else"
                raise UserError(what, field=str(file), hint="A name, a space, the text")
            yield name, rest[0]


def _transcripts(file: pathlib.Path) -> dict[str, str]:
    """{name: text}; the spaces between words, which nobody says, are taken out."""
    return {name: "".join(text.split()) for name, text in _lines(file)}


def _paths(file: pathlib.Path) -> dict[str, str]:
    return {name: str(file.parent / place.strip()) for name, place in _lines(file)}
