"""Instruction conversations for stage 3: LLaVA's form, and MiniGPT-4's captions.

    PATH/SPLIT.json, or PATH/SPLIT.jsonl with one of these a line (or PATH is the file)
      [{"id", "image": file, "video": file, "speech": file, "conversations":
        [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value": "…"}, …]}, …]

Each of image, video, speech and the option `modalities` may be missing, one file, or a list of
files. <image>, <video> and <speech> in the human turns order them; without slots they come first.
Optional keys: "task", "transcript" (what the speech says), "tags". Files are relative to PATH's
parent or PATH, whichever has the first one, or to the option `media`.

    PATH/filter_cap.json     MiniGPT-4: {"annotations": [{"image_id", "caption"}, …]}
    PATH/image/              its images, IMAGE_ID.jpg

MiniGPT-4's second-stage set (cc_sbu_align) is linked by github.com/Vision-CAIR/MiniGPT-4, for
research; the paper translates its captions into Chinese in the same file.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media.modalities import named, task
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.sources import layout

Known = Mapping[str, Modality]


def examples(
    path: str,
    split: str = "train",
    media: str = "",
    modality: str = "",
    modalities: Mapping[str, str] | None = None,
) -> list[Example]:
    """One example per answer, earlier rounds of its conversation as history.

    Args:
      path: folder or file of the layout above.
      split: 'train', 'val' or 'test'.
      media: folder that media paths start from, if it is another one.
      modality: one, or several as in 'image+speech': only conversations about just that.
      modalities: {name: 'package.module:NAME'} of the records of further modalities.

    Raises:
      UserError: no such file, broken JSON, a missing key, turns out of order, slots and files that
        do not match.
    """
    root = pathlib.Path(path)
    captions = root / "filter_cap.json"
    if split == "train" and captions.is_file():
        return _captions(captions)
    names = [root, root / f"{split}.json", root / f"{split}.jsonl"]
    file = next((name for name in names if name.is_file()), names[1])
    lined = file.suffix == ".jsonl"
    data = layout.read_json_lines(file) if lined else layout.rows(layout.read_json(file), str(file))
    known = named(modalities or {}, "modalities")
    folder = pathlib.Path(media) if media else _folder(data, file, known)
    found: list[Example] = []
    for index, record in enumerate(data):
        found += _conversation(record, folder, known, f"{file}: [{index}]", str(index))
    if modality:
        kinds = set(modality.split("+"))
        found = [example for example in found if {kind for kind, _ in example.media} == kinds]
    return layout.not_empty(found, file, "conversations")


def _captions(file: pathlib.Path) -> list[Example]:
    data = layout.read_json(file)
    files = layout.files([file.parent / "image"], layout.IMAGES)
    found: list[Example] = []
    for index, row in enumerate(layout.get(data, "annotations", list, str(file))):
        where = f"{file}: annotations[{index}]"
        name = str(layout.get(row, "image_id", (str, int), where))
        path = files.get(name, str(file.parent / "image" / f"{name}.jpg"))
        said = [layout.get(row, "caption", str, where).strip()]
        found += layout.captioned(name, (("image", path),), said, "caption", False)
    return layout.not_empty(found, file, "captions")


def _files(record: dict, known: Known, where: str) -> dict[str, list[str]]:
    found = {}
    for name in known:
        value = layout.get(record, name, (str, list), where) if record.get(name) else []
        found[name] = [value] if isinstance(value, str) else [str(one) for one in value]
    return found


def _folder(data: list, file: pathlib.Path, known: Known) -> pathlib.Path:
    places = (file.parent.parent, file.parent)
    for index, record in enumerate(data):
        if not isinstance(record, dict):
            continue
        for names in _files(record, known, f"{file}: [{index}]").values():
            for name in names:
                return next((place for place in places if (place / name).exists()), places[1])
    return places[1]


def _conversation(
    record: dict, folder: pathlib.Path, known: Known, where: str, name: str
) -> list[Example]:
    turns = layout.get(record, "conversations", list, where)
    files, marker = (
        _files(record, known, where),
        re.compile(f"<({'|'.join(map(re.escape, known))})>"),
    )
    texts = [
        layout.get(t, "value", str, f"{where}.conversations[{i}]") for i, t in enumerate(turns)
    ]
    _check_order(turns, where)
    slots = [slot for text in texts[::2] for slot in marker.findall(text)]
    slots = slots or [name for name in known for _ in files[name]]
    if sorted(slots) != sorted(name for name in known for _ in files[name]):
        what = f"slots {slots} do not match the files of {[n for n in known if files[n]]}"
        raise UserError(what, field=where, hint="One slot for each file")
    rest = {name: iter(paths) for name, paths in files.items()}
    media = tuple((slot, str(folder / next(rest[slot]))) for slot in slots)
    rounds = [(marker.sub("", q).strip(), a.strip()) for q, a in zip(texts[::2], texts[1::2])]
    key, kind = str(record.get("id", name)), record.get("task", _task(files, known))
    return [
        Example(
            f"{key}-{index}" if len(rounds) > 1 else key,
            media,
            question,
            answer,
            kind,
            tuple(rounds[:index]),
            references=(answer,),
            transcript=record.get("transcript", ""),
            tags=layout.tags(record),
        )
        for index, (question, answer) in enumerate(rounds)
    ]


def _check_order(turns: list, where: str) -> None:
    if not turns or len(turns) % 2:
        raise UserError(f"{len(turns)} turns are no rounds", field=f"{where}.conversations")
    for index, turn in enumerate(turns):
        place = f"{where}.conversations[{index}]"
        who = layout.get(turn, "from", str, place)
        wanted = ("human", "user") if index % 2 == 0 else ("gpt", "assistant")
        if who not in wanted:
            hint = "human and gpt take turns, human first"
            raise UserError(f"is {who!r}, not {wanted[0]!r}", field=f"{place}.from", hint=hint)


def _task(files: dict[str, list[str]], known: Known) -> str:
    present = [name for name, paths in files.items() if paths]
    if any(known[name].spoken for name in present):
        return task(present, known)
    return "dialogue" if present else "text"
