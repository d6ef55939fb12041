"""Adapters of PEFT in and out, and bases with their adapters in them: `xllm adapter`.

In: `adapter_config.json` with `adapter_model.safetensors` (or `.bin`), or a file of a training with
the adapters among its tensors, such as NExT-GPT's `pytorch_model.pt`. The names follow from the
table of the base (`base_table.py`), for every source.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import adapter_table, base_table, bounds, files, peft_config, run_import
from xllm_jax.convert.adapter_table import Published
from xllm_jax.convert.base_table import Matrix
from xllm_jax.convert.peft_config import PeftConfig
from xllm_jax.core import base_description, checkpoint, kernel_fingerprint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import lora, quantized

# [what a trainer put before] base_model.model. MODULE .lora_A [.adapter's name] [.weight]
NAME = re.compile(
    r"(?:.*\.)?base_model\.model\.(?P<module>.+)\."
    r"(?P<kind>lora_A|lora_B|lora_magnitude_vector)(?P<adapter>\.[^.]+)??(?:\.weight)?"
)
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
BASE_FILE = "base_kernels.json"  # beside an exported adapter: of which base it is


def import_adapter(
    path: str | Path,
    base: str | Path,
    output: str | Path,
    alpha: float = 0.0,
    source: str = "",
    part: str = "llm",
) -> str:
    """Writes PEFT's adapter as one that `lora.init` can name.

    Args:
      path: PEFT's folder, or a file of weights with adapters among them.
      base: folder of the base that it belongs to.
      output: folder to write.
      alpha: lora_alpha, where there is no configuration; else 0.
      source: name of the source that the base was converted from; '' finds it out.
      part: that the adapter is of.

    Returns:
      what was found, in a line.

    Raises:
      UserError: it is no adapter, or not of this base; names file, field or module.
    """
    path, base = Path(path), Path(base)
    stores, about = checkpoint.open_leaves(base), base_description.base_about(base)
    tensors, config = _opened(path, alpha)
    known = base_table.matrices(base, _shapes(stores), source, part)
    found = _adapters(tensors, config, known, path)
    places = {one.place for one in known.values()}
    check_base(path, kernel_fingerprint.of_leaves(stores, about, places))
    rank = max(one.a.shape[0] for one in found.values())
    made: dict[str, np.ndarray] = {}
    for one in known.values():
        layers = one.row.layers or (None,)
        held = [found.get(module_of(one, layer)) for layer in layers]
        if any(given is not None for given in held):
            made |= _stacked(one, held, kernel_shape(stores, one), rank, stores)
    told = {
        "source": f"adapter {path.name}",
        "adapter": {"rank": rank, "dora": config.dora, "base": config.base},
        kernel_fingerprint.FIELD: kernel_fingerprint.of_leaves(
            stores, about, {name.rpartition("/")[0] for name in made}
        ),
    }
    run_import.check_output(output, path, base)
    run_import.check_new(output)
    checkpoint.save_base(output, rules.unflatten(made), told)
    return f"{len(found)} adapters of rank {rank}{', DoRA' if config.dora else ''}"


def _opened(path: Path, alpha: float) -> tuple[files.Checkpoint, PeftConfig]:
    """The weights, and what scales them."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if found is None:
            hint = f"Give a folder that PEFT has written, with {WEIGHTS[0]}"
            raise UserError("holds no adapter", field=str(path), hint=hint)
    else:
        found = path
    if (folder / peft_config.FILE).is_file():
        config = peft_config.read(folder)
        if alpha:
            what = f"has no effect: {folder / peft_config.FILE} says lora_alpha {config.alpha:g}"
            raise UserError(what, field="--alpha", hint="Leave it out, or change the file")
        return files.open_checkpoint(found), config
    if not 0 < alpha < math.inf:
        what = f"has no {peft_config.FILE}, which says lora_alpha"
        hint = "Say --alpha; NExT-GPT's is 32, and PEFT's is 8 where nobody said another"
        raise UserError(what, field=str(path), hint=hint)
    opened = files.open_checkpoint(found)
    return opened, _unsaid(opened, alpha, path)


def _unsaid(opened: files.Checkpoint, alpha: float, path: Path) -> PeftConfig:
    """What a configuration would say of weights without one."""
    ranks, dora = {}, False
    for match in filter(None, map(NAME.fullmatch, opened)):
        dora |= match["kind"] == "lora_magnitude_vector"
        if match["kind"] == "lora_A":
            shape = opened.header(match[0]).shape
            ranks[re.escape(match["module"])] = max(shape[0] if shape else 1, 1)
    if not ranks:
        raise UserError("holds no adapter", field=str(path), hint="No name in it has lora_A")
    return PeftConfig(rank=next(iter(ranks.values())), alpha=alpha, ranks=ranks, dora=dora)


def _adapters(
    tensors: files.Checkpoint,
    config: PeftConfig,
    known: Mapping[str, Matrix],
    path: Path,
) -> dict[str, Published]:
    """{published layer: its adapter}.

    Raises:
      UserError: a tensor that is missing, over, misshapen or of no layer of the base.
    """
    modules = {
        module_of(one, layer) for one in known.values() for layer in one.row.layers or (None,)
    }
    held: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name in tensors:
        match = NAME.fullmatch(name)
        if match is None:
            if path.is_dir():
                what, hint = "is no tensor of a LoRA", "Save the adapter alone"
                raise UserError(what, field=tensors.where(name), hint=hint)
            continue
        if match["module"] not in modules:
            example = min(modules)
            what = f"is of no layer of this base, which has {example}"
            hint = "Give the base that it was trained on, or one of the same family"
            raise UserError(what, field=tensors.where(name), hint=hint)
        tensor = np.asarray(tensors[name])
        if tensor.dtype.name in run_import.EXPONENTS:
            run_import.check_finite(tensor, tensors.where(name))
        held[match["module"]][match["kind"]] = np.asarray(tensor, np.float32)
    if not held:
        raise UserError("holds no adapter", field=str(path), hint="No name in it has lora_A")
    wanted = {"lora_A": 2, "lora_B": 2} | ({"lora_magnitude_vector": 1} if config.dora else {})
    made = {}
    for module, parts in sorted(held.items()):
        for kind in sorted(wanted.keys() ^ parts.keys()):
            what = f"{'lacks' if kind in wanted else 'has'} {kind}"
            raise UserError(what, field=module, hint="The file is incomplete; save it again")
        a, b = parts["lora_A"], parts["lora_B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            what = f"lora_A is {a.shape} and lora_B is {b.shape}"
            raise UserError(what, field=module, hint="Their ranks are to be the same, at least 1")
        rank = config.rank_of(module)
        if a.shape[0] != rank:
            what = f"has the rank {a.shape[0]}, and {peft_config.FILE} says {rank}"
            raise UserError(what, field=module, hint="They are not of one adapter")
        magnitude = parts.get("lora_magnitude_vector")
        made[module] = Published(a, b, config.scale(module), magnitude)
    return made


def module_of(one: Matrix, layer: int | None) -> str:
    """Name of a published layer."""
    return one.module if layer is None else one.module.replace("{layer}", str(layer))


def _stacked(
    one: Matrix,
    held: list[Published | None],
    kernel: tuple[int, ...],
    rank: int,
    stores: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """The leaves of a kernel's adapters; a layer without one has zeros."""
    first = next(given for given in held if given is not None)
    rows = []
    for layer, given in enumerate(held):
        if given is None:
            blank = Published(np.zeros_like(first.a), np.zeros_like(first.b), first.scale)
            made = adapter_table.ours(one, blank.padded(rank), kernel)
            if first.magnitude is not None:
                whole = kernel_of(stores, one, layer if one.layers else ())
                made[lora.MAGNITUDE] = np.sqrt(np.square(whole).sum(tuple(range(one.inputs))))
        else:
            made = adapter_table.ours(one, given.padded(rank), kernel)
        rows.append(made)
    names = rows[0].keys()
    stacked = {n: np.stack([row[n] for row in rows]) if one.layers else rows[0][n] for n in names}
    return {f"{one.place}/{name}": np.float32(x) for name, x in stacked.items()}


def kernel_of(stores: Mapping[str, Any], one: Matrix, layer: Any) -> np.ndarray:
    """One layer's kernel, float32, unpacked where it is packed.

    Args:
      stores: leaves of the base.
      one: the kernel's row.
      layer: its index; `()` without layers.
    """
    for codes in quantized.CODES:
        values = stores.get(f"{one.place}/{quantized.KERNEL}_{codes}")
        if values is not None:
            scale = stores[f"{one.place}/{quantized.SCALE}"]
            both = (np.asarray(x[layer].read().result()) for x in (values, scale))
            return np.asarray(quantized.unpack(*map(jnp.asarray, both), codes, one.inputs))
    return np.asarray(stores[one.row.target][layer].read().result(), np.float32)


def _shapes(stores: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(store.shape) for name, store in stores.items()}


def kernel_shape(stores: Mapping[str, Any], one: Matrix) -> tuple[int, ...]:
    """Shape of a kernel in one layer, in floats whether it is packed or not."""
    store, twice = stores.get(one.row.target), 1
    for codes in quantized.CODES:
        packed = stores.get(f"{one.row.target}_{codes}")
        if packed is not None:
            store, twice = packed, 1 if codes == "int8" else 2
    found = list(store.shape)[one.layers :]
    found[one.inputs - 1] *= twice
    return tuple(found)


def check_base(path: Path, ours: Mapping[str, str]) -> None:
    """Compares an adapter that says of which base it is with the base.

    Raises:
      UserError: it is another one.
    """
    file = (path if path.is_dir() else path.parent) / BASE_FILE
    if not file.is_file():
        return
    theirs = bounds.read_json(file)
    for name, text in theirs.items() if isinstance(theirs, dict) else ():
        if ours.get(name, text) != text:
            what = f"is of another base: {name} has other values"
            hint = "Give the base that it was trained on"
            raise UserError(what, field=str(path), hint=hint)
