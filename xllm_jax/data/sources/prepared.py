"""A data set that `launch/prepare.py` wrote: ArrayRecord shards with the media inside.

    PATH/manifest.json, features.json, dataset_info.json
    PATH/NAME-SPLIT.array_record-00000-of-00012

Examples come back as the original reader gave them, in its order, media as encoded bytes. The
licence is that of the set it was made from.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_jax.data import prepared
from xllm_jax.data.example import Example
from xllm_jax.data.lazy import Lazy
from xllm_jax.data.sources import layout, tfds


def examples(path: str, split: str = "train") -> Sequence[Example]:
    """Examples of a split.

    Args:
      path: folder of the layout above.
      split: as it was prepared.

    Raises:
      UserError: no such set or split, no rows; on access, a row of another kind.
    """
    rows, where = tfds.rows(path, "", split, "image")

    def example(index: int) -> Example:
        return prepared.example(rows[index], f"{where}[{index}]")

    return layout.not_empty(Lazy(len(rows), example), where, "rows")
