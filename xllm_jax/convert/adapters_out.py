"""Adapters of ours for PEFT, and bases with their adapters merged into the kernels."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import ml_dtypes
import numpy as np

from xllm_jax.assembly import adapter_source, parameters
from xllm_jax.convert import (
    adapter_table,
    adapters,
    base_table,
    peft_config,
    rewrite,
    run_export,
    run_import,
)
from xllm_jax.convert.adapter_table import Published
from xllm_jax.convert.base_table import Matrix
from xllm_jax.core import atomic, base_description, checkpoint, kernel_fingerprint
from xllm_jax.core.errors import UserError
from xllm_jax.core.new_folder import new_folder
from xllm_jax.core.streamed_leaf import Blocks
from xllm_jax.models import lora, quantized


def export_adapter(
    path: str | Path,
    output: str | Path,
    base: str | Path = "",
    source: str = "",
    part: str = "llm",
    name: str = "",
) -> str:
    """Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT reads them.

    Args:
      path: a run's result, or a folder of `import_adapter`.
      output: folder to write; must not exist, or be empty.
      base: folder of the base, where `path` does not hold its kernels.
      source: name of the source that the base was converted from; '' finds it out.
      part: whose adapters.
      name: what the configuration calls the base.

    Returns:
      what was written, in a line.

    Raises:
      UserError: there are no adapters, or not of this base.
    """
    opened = _Opened(path, base, source, part)
    output = Path(output).absolute()
    run_import.check_new(output)
    found = opened.published()
    ranks = {module: one.a.shape[0] for module, one in found.items()}
    alphas = {module: one.scale * ranks[module] for module, one in found.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = peft_config.written(
        sorted({module.rpartition(".")[2] for module in found}),
        rank,
        alpha,
        {module: value for module, value in ranks.items() if value != rank},
        {module: value for module, value in alphas.items() if value != alpha},
        any(one.magnitude is not None for one in found.values()),
        name,
    )
    tensors: dict[str, np.ndarray] = {}
    for module, one in found.items():
        start = f"base_model.model.{module}"
        tensors |= {f"{start}.lora_A.weight": one.a, f"{start}.lora_B.weight": one.b}
        if one.magnitude is not None:
            tensors[f"{start}.lora_magnitude_vector"] = one.magnitude
    with new_folder(output) as partial:
        partial.mkdir(parents=True)
        run_export.write_shards(tensors, partial, stem="adapter_model")
        atomic.write_json(partial / peft_config.FILE, config)
        atomic.write_json(partial / adapters.BASE_FILE, opened.fingerprints())
    return f"{len(found)} adapters of rank {rank}"


def merge(
    path: str | Path,
    output: str | Path,
    base: str | Path = "",
    source: str = "",
    part: str = "llm",
) -> str:
    """Writes a base with the adapters of a part in its kernels.

    Kernels keep their dtype; packed ones become bfloat16.

    Args:
      path, base, source, part: as in `export_adapter`.
      output: folder to write.

    Returns:
      what was done, in a line.

    Raises:
      UserError: there are no adapters, or not of this base.
    """
    opened = _Opened(path, base, source, part)
    run_import.check_output(output, path, opened.path, opened.base)
    made: dict[str, Blocks] = {}
    done = {one.place: one for one in opened.matrices.values() if one.place in opened.adapted}
    for name, store in opened.stores.items():
        if not name.startswith(f"{part}/") or lora.is_adapter(name):
            continue
        if name.rpartition("/")[0] in done and _is_kernel(name):
            one = done[name.rpartition("/")[0]]
            made[one.row.target] = opened.merged(one)
        elif quantized.is_packed(name):
            place = name.rpartition("/")[0]
            one = next(one for one in opened.matrices.values() if one.place == place)
            made[one.row.target] = opened.merged(one)
        else:
            made[name] = rewrite.copied(name, store)
    told = {"source": f"{opened.base.name} with the adapters of {opened.path.name}"}
    rewrite.write(output, opened.base, made, told)
    return f"{len(done)} kernels of {part} with their adapters in them"


def _is_kernel(name: str) -> bool:
    return name.endswith(base_table.KERNEL) or quantized.is_packed(name)


class _Opened:
    """Adapters and the base that they belong to, opened and compared.

    Args:
      path, base, source, part: as in `export_adapter`.

    Raises:
      UserError: there are no adapters, or not of this base.
    """

    def __init__(self, path: str | Path, base: str | Path, source: str, part: str):
        run = final_of(Path(path))
        whole = run.parent if run.name == "final" else run
        self.base = Path(base) if base else parameters.places(whole, part)[0]
        self.path = adapter_source.holder(run, part) or run
        held, self.stores = (checkpoint.open_leaves(p) for p in (self.path, self.base))
        self.leaves = {
            name: store
            for name, store in held.items()
            if lora.is_adapter(name) and name.startswith(f"{part}/")
        }
        self.adapted = {name.rpartition("/")[0] for name in self.leaves}
        if not self.leaves:
            hint = "Give a run that trained some, or a folder of --action=import"
            raise UserError(f"holds no adapters of {part!r}", field=str(self.path), hint=hint)
        shapes = {name: tuple(store.shape) for name, store in self.stores.items()}
        if not any(map(_is_kernel, shapes)):
            what = "holds no kernels, only adapters"
            raise UserError(what, field=str(self.base), hint="Say --base")
        self.matrices = base_table.matrices(self.base, shapes, source, part)
        self._check()

    def _check(self) -> None:
        known = {one.place for one in self.matrices.values()}
        for place in sorted(self.adapted - known):
            what = f"has an adapter of {place}, which the base lacks or its source does not name"
            raise UserError(what, field=str(self.path), hint="Say --base and --source")
        about = base_description.base_about(self.path)
        theirs, ours = about.get(kernel_fingerprint.FIELD, {}), self.fingerprints()
        for name in sorted(theirs.keys() & ours.keys()):
            if theirs[name] != ours[name]:
                what = f"is of another base: {name} has other values in {self.base}"
                raise UserError(what, field=str(self.path), hint="Give its base in --base")
        for one in self.matrices.values():
            if one.place in self.adapted:
                self._check_shape(one)

    def _check_shape(self, one: Matrix) -> None:
        kernel = adapters.kernel_shape(self.stores, one)
        a, b = (
            tuple(self.leaves[f"{one.place}/{n}"].shape)[one.layers :] for n in (lora.A, lora.B)
        )
        if (*a[:-1], *b[1:]) != kernel:
            what = f"is of another base: {one.row.target} has shape {kernel} there"
            raise UserError(what, field=str(self.path), hint="Give its base in --base")

    def fingerprints(self) -> dict[str, str]:
        """{kernel: hash} of what is adapted in the base."""
        about = base_description.base_about(self.base)
        return kernel_fingerprint.of_leaves(self.stores, about, self.adapted)

    def layer(self, one: Matrix, index: rewrite.Layer) -> dict[str, np.ndarray] | None:
        """Leaves of a kernel's adapter in one layer; None where it has none."""
        if one.place not in self.adapted:
            return None
        return {
            name: np.asarray(self.leaves[f"{one.place}/{name}"][index].read().result())
            for name in lora.LEAVES
            if f"{one.place}/{name}" in self.leaves
        }

    def published(self) -> dict[str, Published]:
        """{published layer: its adapter}."""
        groups: dict[str, list[Matrix]] = defaultdict(list)
        for one in self.matrices.values():
            groups[one.module].append(one)
        made = {}
        for pieces in groups.values():
            pieces.sort(key=lambda one: one.row.piece or (0, 1))
            if not any(one.place in self.adapted for one in pieces):
                continue
            layers = pieces[0].row.layers
            for number, layer in enumerate(layers or (None,)):
                index = () if layers is None else number
                found = [self.layer(one, index) for one in pieces]
                module = adapters.module_of(pieces[0], layer)
                made[module] = adapter_table.published(pieces, found)
        return made

    def merged(self, one: Matrix) -> Blocks:
        """A kernel with its adapter in it, layer by layer."""
        store = self.stores.get(one.row.target)
        dtype = store.dtype.numpy_dtype if store is not None else ml_dtypes.bfloat16
        kernel = adapters.kernel_shape(self.stores, one)
        lead = (len(one.row.layers),) if one.row.layers else ()

        def layer(index: rewrite.Layer) -> np.ndarray:
            whole = adapters.kernel_of(self.stores, one, index)
            leaves = self.layer(one, index)
            return whole if leaves is None else np.asarray(lora.merged(whole, leaves))

        return rewrite.computed(one.row.target, (*lead, *kernel), dtype, one.layers, layer)


def final_of(path: Path) -> Path:
    """The result of a run, where the folder is a run's."""
    return path / "final" if checkpoint.base_exists(path / "final") else path
