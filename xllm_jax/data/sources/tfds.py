"""A data set of TensorFlow Datasets, or of any TFDS builder, kept as ArrayRecord.

    PATH/NAME[/CONFIG]/VERSION/     as `tfds build NAME --data_dir=PATH --file_format=array_record`
                                    writes it, with the option `name`; or PATH is that folder
      options={"name": "coco_captions", "image": "image", "answer": "captions.text"}

Reading needs no TensorFlow (writing does, and so do TFDS's own Audio and Video features). The
catalogue, www.tensorflow.org/datasets, states each set's license. Images stay as they are stored
until they are used.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media import reach
from xllm_jax.data.rows import columns, translated, verified
from xllm_jax.data.rows.lazy import Lazy
from xllm_jax.data.sources import layout

SPLITS = {"val": "validation"}


def examples(
    path: str,
    split: str = "train",
    name: str = "",
    image: str = "",
    video: str = "",
    speech: str = "",
    answer: str = "",
    question: str = "",
    transcript: str = "",
    task: str = "",
    media: Mapping[str, str] | None = None,
    modalities: Mapping[str, str] | None = None,
    rate: int = 16_000,
    captions: str = "",
) -> Sequence[Example]:
    """Rows of a split, in order, read from their shards when they are asked for.

    Args:
      path: as above.
      split: 'train', 'val' (TFDS's 'validation', where there is no 'val'), 'test', or a slice.
      name: of the data set, with a config and version perhaps; '' where PATH is its own folder.
      image, video, speech, answer, question, transcript, task: see `data/rows/columns.py`.
      media: {modality: column} of further modalities.
      modalities: {modality: 'package.module:NAME'}, their records.
      rate: samples a second of audio that is stored as numbers.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: no such data set or split, a feature that needs TensorFlow, not kept as
        ArrayRecord, no such column; on access, a medium or text that is missing.
    """
    named = {"image": image, "video": video, "speech": speech, **(media or {})}
    wanted = columns.Columns(named, answer, question, transcript, task, modalities or {})
    builder = _builder(path, name)
    if not name:
        verified.check(pathlib.Path(path), split.partition("[")[0])
    where = f"{builder.info.full_name}/{split}"
    wanted.check(list(builder.info.features), where)
    rows = _rows(builder, split, where, [image] if image and "." not in image else [])

    def example(index: int) -> Example:
        key = f"{split}-{index}"
        return columns.example(rows[index], wanted, key, f"{where}[{index}]", rate)

    found = layout.not_empty(Lazy(len(rows), example), where, "rows")
    return translated.examples(found, captions, split)


def rows(path: str, name: str, split: str) -> tuple[Sequence, str]:
    """The stored rows of a split, its images left encoded, and their place for messages.

    Raises:
      UserError: as `examples`.
    """
    builder = _builder(path, name)
    where = f"{builder.info.full_name}/{split}"
    images = [n for n, kind in builder.info.features.items() if type(kind).__name__ == "Image"]
    return _rows(builder, split, where, images), where


def _builder(path: str, name: str) -> Any:
    import tensorflow_datasets

    reach.check_all_links(path)
    if not name and not (pathlib.Path(path) / "dataset_info.json").is_file():
        hint = "Name the data set by the option 'name'"
        raise UserError("has no dataset_info.json", field=path, hint=hint)
    try:
        if not name:
            return tensorflow_datasets.builder_from_directory(path)
        return _builder_from_files(name, path)
    except ImportError as error:
        what = "has features that TFDS reads with TensorFlow alone, as its Audio and Video are"
        hint = "Prepare the set again with encoded bytes, or as numbers in a Tensor feature"
        raise UserError(what, field=name or path, hint=hint) from error
    except (ValueError, OSError, AttributeError) as error:
        told = " ".join(str(error).split())[:120]
        raise UserError(f"no data set {name or path!r} ({told})", field=path) from error


def _builder_from_files(name: str, path: str) -> Any:
    """The set as its files describe it: the catalogue's own code may need TensorFlow."""
    import tensorflow_datasets
    from tensorflow_datasets.core import read_only_builder

    try:
        return read_only_builder.builder_from_files(name, data_dir=path)
    except tensorflow_datasets.core.DatasetNotFoundError:
        known = re.split("[/:]", name)[0]
        tensorflow_datasets.builder_cls(known)  # raises, too, where the catalogue has no such set
    told = f"tfds build {name} --data_dir={path} --file_format=array_record"
    raise UserError(f"{name!r} is not prepared", field=path, hint=told)


def _rows(builder: Any, split: str, where: str, encoded: Sequence[str]) -> Sequence:
    from tensorflow_datasets import decode

    known = list(builder.info.splits)
    if not known:
        told = f"tfds build {builder.name} --data_dir=… --file_format=array_record"
        raise UserError("is not prepared", field=where, hint=told)
    name = split if split in known else SPLITS.get(split, split)
    if name.partition("[")[0] not in known:
        raise UserError(f"has no split {split!r}", field=where, hint=f"Splits: {', '.join(known)}")
    own = reach.Reach([str(builder.data_dir)])
    for file in builder.info.splits[name.partition("[")[0]].filepaths:
        own.check(str(file), "its description names a file that lies")
    skipped = {column: decode.SkipDecoding() for column in encoded}
    try:
        return builder.as_data_source(split=name, decoders=skipped or None)
    except NotImplementedError as error:
        hint = "Convert it: tfds convert_format --out_file_format=array_record"
        raise UserError("is not kept as ArrayRecord", field=where, hint=hint) from error
