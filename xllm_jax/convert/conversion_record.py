"""conversion.json: what a conversion did, written beside the checkpoint it made."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_jax.convert import ConversionPlan, Report, bounds, files
from xllm_jax.core import atomic
from xllm_jax.core.base_description import CONVERSION
from xllm_jax.core.errors import UserError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The record of one import.

    Attributes:
      source: name of the source.
      options: what its table depends on.
      files: [{name, bytes, sha256}] of what was read.
      rows: [{source, target, pattern, layers, piece}] of the table.
      dropped: {source tensor: reason}.
      fresh: leaves of ours that the source does not hold.
      dtypes: {dtype: number of tensors} as stored; nothing is cast but what `computed` names.
      computed: {tensor: how it came about} of those that are not in the file as they stand.
      version: ours.
      fields: {part: {field of its network: value}} that no shape shows; a stage with another value
        does not load the part.
      renamed: {what was left out of the tensors' names, such as 'module.': of how many}.
    """

    source: str
    options: Mapping[str, Any]
    files: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    dropped: Mapping[str, str]
    fresh: list[str]
    dtypes: Mapping[str, int]
    computed: Mapping[str, str]
    version: str
    format: int = FORMAT
    fields: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: str,
        options: Mapping[str, Any],
        plan: ConversionPlan,
        opened: files.Checkpoint,
        tensors: Mapping[str, Any],
        report: Report,
    ) -> Conversion:
        """Collects the record; reads every file once for its SHA-256."""
        rows = [
            {
                key: value
                for key, value in dataclasses.asdict(row).items()
                if value not in ("", None, ())
            }
            for row in plan.table
        ]
        dtypes = collections.Counter(tensors.header(name).dtype.name for name in report.used)
        return cls(
            source=source,
            options=dict(options),
            files=[_below(opened.path, describe(file), file) for file in opened.files],
            rows=rows,
            dropped=report.dropped,
            fresh=list(report.fresh),
            dtypes=dict(sorted(dtypes.items())),
            computed=_computed(tensors, opened),
            version=importlib.metadata.version("xllm_jax"),
            fields={part: dict(fields) for part, fields in plan.fields.items() if fields},
            renamed=opened.renamed,
        )

    def write(self, folder: Path) -> None:
        """Writes conversion.json into a folder."""
        atomic.write_json(folder / CONVERSION, dataclasses.asdict(self))

    def line(self) -> str:
        """The record in one line."""
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        left = "".join(f"; {what!r} left out of {n} names" for what, n in self.renamed.items())
        return (
            f"{self.source}: {kinds} tensors of {len(self.files)} files used, "
            f"{len(self.dropped)} dropped, {len(self.fresh)} leaves fresh{left}"
        )


def read(folder: str | Path) -> Conversion | None:
    """The record of a base; None where it was not converted.

    Raises:
      UserError: the file is damaged.
    """
    file = Path(folder) / CONVERSION
    if not file.exists():
        return None
    try:
        return Conversion(**bounds.read_json(file))
    except (UserError, TypeError) as error:
        why = error.what if isinstance(error, UserError) else "it has other fields"
        what = f"is not a record of a conversion ({why})"
        raise UserError(what, field=str(file), hint="Convert again") from error


def describe(file: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest}


def _below(folder: Path, about: dict[str, Any], file: Path) -> dict[str, Any]:
    """What is known of a file, by its path below the input's folder, where that is one."""
    within = file.is_relative_to(folder) and file != folder
    return about | ({"name": str(file.relative_to(folder))} if within else {})


def _computed(tensors: Mapping[str, Any], opened: files.Checkpoint) -> dict[str, str]:
    if not isinstance(tensors, files.View):
        return {}
    return {
        name: f"{row.dtype} from "
        + ", ".join(f"{source} ({opened.header(source).dtype})" for source in row.inputs)
        for name, row in tensors.derived.items()
    }
