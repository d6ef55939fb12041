"""The preflight of every stage on every slice: compiles what is missing, prints the table.

PYTHONPATH=. python benchmarks/preflight_table.py [--stages=stage2_image,...] \
    [--slices=v5e-16,...] [--batches=arithmetic,configured,largest,chosen] \
    [--folder=benchmarks/preflight] [--show] [--forecasts]

Each cell of the table is a JSON file of its own, so that a second call goes on where the first one
stopped; `--show` measures nothing. 'configured' is the config as it is, 'largest' the largest
micro-batch of the same update that fits, 'chosen' what `--write` and `rows=auto` choose,
'arithmetic' the config as it is without the compiler: it stands in the table where 'configured' is
missing. '2xv5e-16' are two slices, over 'data'.

A stage may be one of CHOICES, with other encoders, interfaces and LLMs:

    --stages=siglip_vicuna,siglip_vicuna_nf4,whisper_cif,whisper_asr --slices=v5e-4 \
        --batches=configured
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from xllm_jax.core.stage import Part, Stage
from xllm_jax.preflight import absent, choose, forecast, report, targets

STAGES = (
    "stage1_speech", "stage1_image", "stage2_image", "stage2_video", "stage2_speech",
    "stage3_instruction", "stage_output_image",
)  # fmt: skip
SLICES = ("v5e-16", "v5p-8", "v4-32")
BATCHES = ("configured", "largest")  # and "arithmetic", "chosen"
NOTES = {"largest": ", best that fits", "chosen": ", chosen"}
SIGLIP_MLP = {
    "vision_encoder": Part("siglip.SiglipVision", "so400m_14_384"),
    "image_interface": Part("mlp_interface.MLPInterface", "siglip"),
    "llm": Part("causal.Causal", "vicuna_7b"),
}
PICTURES = {
    "image": {"size": 384, "normalization": "siglip"},
    "embeddings": {"image": 729},
    "length": 800,
    "rows": 16,
    "examples": 16,
    "llm_family": "causal",
    "template": "vicuna_v1",
}
WHISPER = {"speech_encoder": Part("whisper.WhisperEncoder", "whisper_large_v3", {"stride": 4})}
SOUNDS = {"speech": {"features": "whisper", "bins": 128}}
CIF = {"encoder_width": 1280}
# {name: (stage, {part: what replaces it}, {part: further fields}, {field of the data: value})}:
# docs/encoders.md has the same as flags.
CHOICES: dict[str, tuple[str, dict[str, Part], dict[str, dict], dict[str, Any]]] = {
    "siglip_vicuna": ("stage2_image", SIGLIP_MLP, {}, PICTURES),
    "siglip_vicuna_nf4": (
        "stage2_image",
        SIGLIP_MLP | {"llm": dataclasses.replace(SIGLIP_MLP["llm"], weights="nf4")},
        {},
        PICTURES,
    ),
    "whisper_cif": ("stage2_speech", WHISPER, {"speech_interface": CIF}, SOUNDS),
    "whisper_asr": (
        "stage1_speech",
        WHISPER,
        {"speech_interface": CIF, "asr_decoder": {"width": 1280}},
        SOUNDS,
    ),
}
HEADER = (
    "stage", "slice", "rows x accumulation", "GiB a chip", "state + temporaries",
    "FLOPs / needed", "GB sent", "s an update", "limit", "samples/s", "days", "chip-hours",
    "forecast: ms, of peak, samples/s", "CPU s to compile",
)  # fmt: skip


def place(folder: Path, cell: tuple[str, str, str]) -> Path:
    """File of one cell: (stage, slice, batch)."""
    return folder / f"{'_'.join(cell)}.json"


def stage_named(name: str) -> Stage:
    """A packaged stage at the real size, or one of CHOICES."""
    config, parts, fields, data = CHOICES.get(name, (name, {}, {}, {}))
    stage: Stage = importlib.import_module(f"xllm_jax.configs.{config}").get_config("real")
    for out in stage.outputs.values():  # else it stands beside the decoder, and no base is read
        out.schedule = out.schedule or "stable_diffusion_1_5"
    parts = stage.parts | parts
    for part, more in fields.items():
        parts[part] = dataclasses.replace(parts[part], fields={**parts[part].fields, **more})
    trains = ("speech_interface/cif/.*", "asr_decoder/.*")
    if name == "whisper_asr":  # the encoder stays frozen
        stage = dataclasses.replace(stage, trainable=trains)
    changed = {
        field: {**getattr(stage.data, field), **value} if isinstance(value, dict) else value
        for field, value in data.items()
    }
    optimizer = stage.optimizer
    if "rows" in data:  # as many examples an update
        count = optimizer.accumulation * stage.data.rows // data["rows"]
        optimizer = dataclasses.replace(optimizer, accumulation=count)
    data = dataclasses.replace(stage.data, **changed)
    return dataclasses.replace(stage, parts=parts, data=data, optimizer=optimizer)


def measure(cell: tuple[str, str, str], folder: Path) -> None:
    """Compiles one cell and writes its file."""
    name, slice_, batch = cell
    stage = stage_named(name)
    count, one = re.fullmatch(r"(?:(\d+)x)?(.+)", slice_).groups()
    stage = dataclasses.replace(stage, slices={"data": int(count)} if count else {})
    found = MAKERS[batch](stage, targets.parse(one))
    record = {"fits": False} if found is None else report.record(found, None, None)
    page = "nothing fits\n" if found is None else report.text(found, None, None)
    report.write(folder, place(folder, cell).stem, page, record)


MAKERS = {
    "configured": forecast.make,
    "largest": forecast.largest,
    "arithmetic": forecast.arithmetic,
    "chosen": lambda stage, target: choose.choose(stage, target).made,
}


def needless(cell: tuple[str, str, str], folder: Path) -> bool:
    """Whether the config's micro-batch is the whole update and fits: no larger one is possible."""
    name, slice_, batch = cell
    configured = place(folder, (name, slice_, "configured"))
    if batch != "largest" or not configured.exists():
        return False
    known = json.loads(configured.read_text())
    return known["fits"] and known["accumulation"] == 1


def line(cell: tuple[str, str, str], record: dict[str, Any]) -> list[str]:
    """One row of the table."""
    shown = [cell[0], cell[1] + NOTES.get(cell[2], "")]
    if "rows" not in record:
        return [*shown, "none fits", *[""] * (len(HEADER) - 3)]
    used, speed = record["memory_per_chip"], record["speed"]
    compiling = f"{record['compile_seconds']:.0f}" if record["compiled"] else "arithmetic"
    state = used["total"] - used["temporaries"]
    seen = record["compiled"] and record.get("readable", True)
    sent = " + ".join(
        f"{sum(row['sent'] for row in record[kind].values()) / 1e9:.{digits}f}"
        for kind, digits in (("collectives", 1), ("collectives_between_slices", 2))
        if record.get(kind)
    )
    fits = "" if record["fits"] else ", DOES NOT FIT"
    cells = [
        f"{record['rows']} x {record['accumulation']}",
        f"{report.gib(used['total'])} of {record['chip_memory'] >> 30}{fits}",
        f"{report.gib(state)} + {report.gib(used['temporaries'])}",
        f"{record['flops'] / record['minimum_flops']:.3f}",
    ]
    if not record["fits"]:
        return [*shown, *cells, *[""] * 7, compiling]
    return [
        *shown,
        *cells,
        sent if seen else "",
        f"{speed['seconds'] * record['accumulation']:.2f}",
        speed["limit"] if seen else "arithmetic alone",
        f"{speed['samples_per_second']:.0f}",
        f"{speed['days']:.2f}",
        f"{speed['chip_hours']:.0f}",
        expected(record),
        compiling,
    ]


def expected(record: dict[str, Any]) -> str:
    """What the compiler's cycles say of one cell; '' where none are known."""
    found = record.get("forecast")
    if not found:
        return ""
    share = f"{found['utilization']:.2f}"
    return f"{found['seconds'] * 1e3:.0f}, {share}, {found['samples_per_second']:.0f}"


def table(cells: list[tuple[str, str, str]], folder: Path) -> Iterator[str]:
    """Markdown of the cells that are there."""
    yield "| " + " | ".join(HEADER) + " |"
    yield "| " + " | ".join("---" for _ in HEADER) + " |"
    for cell in cells:
        other = (*cell[:2], "arithmetic") if cell[2] == "configured" else cell
        files = [file for file in (place(folder, cell), place(folder, other)) if file.exists()]
        if files:
            yield "| " + " | ".join(line(cell, json.loads(files[0].read_text()))) + " |"


FORECASTS = (
    "stage", "slice", "rows x accumulation", "core, M cycles", "core, ms", "links at best, ms",
    "forecast, samples/s", "of peak on needed FLOPs",
)  # fmt: skip


def forecasts(folder: Path) -> Iterator[str]:
    """Markdown of what the compiler's cycles say of every cell that has them."""
    yield "| " + " | ".join(FORECASTS) + " |"
    yield "| " + " | ".join("---" for _ in FORECASTS) + " |"
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text())
        found = record.get("forecast")
        if not found or not record["fits"]:
            continue
        name, slice_, batch = file.stem.rsplit("_", 2)
        share, core = f"{found['utilization']:.2f}", f"{found['utilization_on_core']:.2f}"
        cells = [
            name,
            slice_ + NOTES.get(batch, ""),
            f"{record['rows']} x {record['accumulation']}",
            f"{found['cycles'] / 1e6:.1f}",
            f"{found['on_core'] * 1e3:.1f}",
            f"{record['speed']['links'] * 1e3:.1f}",
            f"{found['samples_per_second']:.0f}",
            share if share == core else f"{share} ({core} without the links)",
        ]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Fills the folder and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--slices", default=",".join(SLICES))
    parser.add_argument("--batches", default=",".join(BATCHES))
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/preflight"))
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--forecasts", action="store_true", help="print those that are there")
    given = parser.parse_args()
    if given.forecasts:
        print("\n".join(forecasts(given.folder)))
        return
    absent.prepare()
    lists = (given.stages, given.slices, given.batches)
    cells = list(itertools.product(*(names.split(",") for names in lists)))
    for cell in cells:
        known = place(given.folder, cell).exists() or needless(cell, given.folder)
        if not given.show and not known:
            measure(cell, given.folder)
            jax.clear_caches()
    print("\n".join(table(cells, given.folder)))


if __name__ == "__main__":
    main()
