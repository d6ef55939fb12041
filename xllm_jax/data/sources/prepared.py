"""A data set that `launch/prepare.py` wrote: ArrayRecord shards with the media inside.

    PATH/manifest.json, features.json, dataset_info.json
    PATH/NAME-SPLIT.array_record-00000-of-00012

Examples come back as the original reader gave them, in its order, media as encoded bytes. The
license is that of the set it was made from.
"""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Sequence

from xllm_jax.core import lookup
from xllm_jax.core.errors import UserError
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.rows import prepared, translated, verified
from xllm_jax.data.rows.lazy import Lazy
from xllm_jax.data.sources import layout, tfds


def examples(
    path: str, split: str = "train", kind: str = "", captions: str = ""
) -> Sequence[Example]:
    """Examples of a split.

    Args:
      path: folder of the layout above.
      split: as it was prepared.
      kind: of the original reader's examples, so that a set can take its source's place in a stage.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: no such set or split, a shard that is not what the manifest says, no rows, another
        kind; on access, a broken row.
    """
    if kind:
        _check_kind(pathlib.Path(path) / f"{split}.plan.json", kind)
    verified.check(pathlib.Path(path), split)
    rows, where = tfds.rows(path, "", split)

    def example(index: int) -> Example:
        return prepared.example(rows[index], f"{where}[{index}]")

    found = layout.not_empty(Lazy(len(rows), example), where, "rows")
    return translated.examples(found, captions, split)


def _check_kind(plan: pathlib.Path, kind: str) -> None:
    """Raises UserError where a set holds examples of another kind."""
    if not plan.is_file():
        return
    source = layout.read_json(plan)["source"]
    reader = lookup.module(mixture.READERS, source["reader"], str(plan)).examples
    parameter = inspect.signature(reader).parameters.get("kind")
    default = parameter.default if parameter else ""
    held = source["options"].get("kind", default)
    if held != kind:
        what = f"holds examples of the kind {held!r}, not {kind!r}"
        hint = f'Prepare another set with --options=\'{{"kind": "{kind}"}}\''
        raise UserError(what, field=str(plan.parent), hint=hint)
