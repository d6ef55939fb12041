"""The table that a base of ours belongs to: which row fills each kernel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_jax.convert import conversion_record, run_import
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.matrix import KERNEL, Matrix, matrix
from xllm_jax.core.errors import UserError
from xllm_jax.models import quantized

# Leaves by which an LLM tells its source, where no conversion.json does.
TELLING = {"chatglm": "llm/layers/attention/qkv", "llama": "llm/layers/attention/query"}


def matrices(
    path: str | Path, shapes: Mapping[str, Any], source: str = "", part: str = "llm"
) -> dict[str, Matrix]:
    """{path of a kernel: its row} of a part of a base.

    Args:
      path: folder of the base.
      shapes: {path of a leaf: its shape}; packed kernels are known by their names.
      source: name of its source; '' finds it out.
      part: whose kernels.

    Raises:
      UserError: nothing tells of which source the base is, or the part has no kernels.
    """
    plain = {
        f"{p.rpartition('/')[0]}{KERNEL}" if quantized.is_packed(p) else p: s
        for p, s in shapes.items()
        if not p.endswith(quantized.SCALE)
    }
    made = conversion_record.read(path)
    if made and source in ("", made.source):
        plan = run_import.source_named(made.source).plan(made.options)
    else:
        name = source or _told(plain, path)
        module = run_import.source_named(name)
        plan = module.plan(module.options_of(Base(plain, Path(path))))
    rows = filter(None, (matrix(row) for row in plan.table if row.target.startswith(f"{part}/")))
    found = {one.row.target: one for one in rows if one.row.target in plain}
    if not found:
        parts = sorted({p.partition("/")[0] for p in shapes})
        what = f"has no kernels of {part!r}, only {', '.join(parts)}"
        raise UserError(what, field=str(path), hint="Say --part")
    return found


def _told(shapes: Mapping[str, Any], path: str | Path) -> str:
    for name, place in TELLING.items():
        if place + KERNEL in shapes:
            return name
    raise UserError(
        "does not tell what it was converted from",
        field=str(path),
        hint=f"Say --source, such as {' or '.join(TELLING)}",
    )
