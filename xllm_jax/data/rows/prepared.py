"""Rows of a prepared data set: an Example with the bytes of its media, as TFDS serializes them.

    key, task, question, answer, transcript        texts
    references                                     list of texts
    history, tags                                  JSON lists
    slots                                          JSON list: the modality of every file, in order
    image, video, speech, cif, …                   encoded files as they were, where there are any
    image_name, video_name …                       their names, perhaps with a span of time

Where every record has the same media, one file each, a medium is a column of single files, and its
images are TFDS's. Otherwise (dialogues about two images, sets of several modalities) every medium
is a column of lists. Images are encoded files already, so nothing here needs TensorFlow;
`sources/prepared.py` reads the rows back, and `sources/tfds.py` reads them as any TFDS set's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities as media
from xllm_jax.data.media import paths
from xllm_jax.data.media.modality import Modality

TEXTS = ("key", "task", "question", "answer", "transcript", "history", "tags")


def features(wanted: Mapping[str, Modality], several: bool = False) -> Any:
    """TFDS features of the rows of a set whose examples have these modalities.

    Args:
      wanted: {name: Modality} of the set.
      several: a record has any number of files of each; otherwise one.
    """
    from tensorflow_datasets import features as kinds

    found: dict[str, Any] = {name: kinds.Text() for name in (*TEXTS, "slots")}
    found["references"] = kinds.Sequence(kinds.Text())
    for name, modality in wanted.items():
        encoded = kinds.Tensor(shape=(), dtype=np.object_)
        single = kinds.Image(shape=(None, None, 3)) if modality.picture else encoded
        found[name] = kinds.Sequence(encoded) if several else single
        found[f"{name}_name"] = kinds.Sequence(kinds.Text()) if several else kinds.Text()
    return kinds.FeaturesDict(found)


def modalities(example: Example) -> tuple[str, ...]:
    """Which modalities an example has, in the order of its media."""
    return tuple(name for name, _ in example.media)


def row(
    example: Example,
    wanted: Mapping[str, Modality],
    check: Callable[[str, str], None],
    several: bool = False,
) -> dict[str, Any]:
    """The row of an example.

    Args:
      example: of a reader.
      wanted: {name: Modality} of the set, in the order of the media.
      check: (modality, path) -> None; raises UserError where a file cannot be used.
      several: as in `features`.

    Raises:
      UserError: other media than the set's, or a file that is missing or cannot be used.
    """
    has = modalities(example)
    if has != tuple(wanted) and not (several and set(has) <= set(wanted)):
        told, should = (" and ".join(m) or "no media" for m in (has, wanted))
        raise UserError(f"has {told}, the set holds {should}", field=example.key)
    made: dict[str, Any] = {
        "key": _written(example.key),
        "task": example.task,
        "question": example.instruction,
        "answer": example.answer,
        "transcript": example.transcript,
        "references": list(example.references),
        "history": json.dumps(example.history, ensure_ascii=False),
        "tags": json.dumps(example.tags, ensure_ascii=False),
        "slots": json.dumps(has),
    }
    for name, modality in wanted.items():
        places = [path for other, path in example.media if other == name]
        names = [_written(str(path)) for path in places]
        contents = [_content(name, path, check) for path in places]
        made[name] = contents if several else _single(modality, contents[0])
        made[f"{name}_name"] = names if several else names[0]
    return made


def _written(name: str) -> str:
    """A name as UTF-8 can hold it; file systems and JSON have others."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _content(name: str, path: str, check: Callable[[str, str], None]) -> bytes:
    check(name, path)
    return paths.read(path)


def _single(modality: Modality, content: bytes) -> io.BytesIO | bytes:
    return io.BytesIO(content) if modality.picture else content


def serialized(made: Mapping[str, Any], kinds: Any) -> bytes:
    """A row as the bytes of one record, the same in every process."""
    from tensorflow_datasets.proto import tf_example_pb2

    # What TFDS writes has its columns in an order that differs from process to process.
    written = kinds.serialize_example(kinds.encode_example(made))
    messages: Any = tf_example_pb2  # whose classes are made when it is imported
    return messages.Example.FromString(written).SerializeToString(deterministic=True)


def example(stored: Mapping[str, Any], where: str) -> Example:
    """A stored row back as an Example; its media carry their bytes.

    Args:
      stored: {column: value} as TFDS gives it with images left encoded.
      where: place for messages.

    Raises:
      UserError: the row is not one of `row`.
    """
    try:
        texts = {name: _text(stored[name]) for name in TEXTS}
        history, tags = json.loads(texts["history"]), json.loads(texts["tags"])
        files = _media(stored)
        references = tuple(map(_text, stored["references"]))
    except (KeyError, ValueError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"is no prepared row ({error})", field=where) from error
    return Example(
        texts["key"],
        files,
        texts["question"],
        texts["answer"],
        texts["task"],
        tuple((asked, answered) for asked, answered in history),
        references,
        texts["transcript"],
        tuple(tags),
    )


def _media(stored: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The files of a stored row in the order of its slots."""
    known = [name for name in media.stored() if name in stored]  # sets of before have no slots
    slots = json.loads(_text(stored["slots"])) if "slots" in stored else known
    there = dict.fromkeys(slots)
    several = any(not isinstance(stored[name], bytes) for name in there)
    rest = {
        name: iter(zip(*(stored[c] if several else [stored[c]] for c in (f"{name}_name", name))))
        for name in there
    }
    found = []
    for name in slots:
        path, content = next(rest[name])
        found.append((name, paths.Carried(_text(path), bytes(content))))
    return tuple(found)


def _text(value: object) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def describe(
    folder: str,
    name: str,
    splits: Mapping[str, tuple[Sequence[int], int]],
    wanted: Mapping[str, Modality],
    about: str,
    several: bool = False,
) -> None:
    """Writes TFDS's own description of a folder of shards: dataset_info.json and features.json.

    Args:
      folder: of the shards.
      name: of the set.
      splits: {split: (records of each shard, bytes in all)}.
      wanted: {name: Modality} of the set.
      about: a sentence.
      several: as in `features`.
    """
    import tensorflow_datasets as tfds

    place: Any = folder  # a text does where TFDS asks for a path
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=list(lengths),
            num_bytes=size,
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=place,
                template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                dataset_name=name,
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split, (lengths, size) in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(wanted, several),
        split_infos=infos,
        version="1.0.0",
        check_data=False,
        description=about,
    )
