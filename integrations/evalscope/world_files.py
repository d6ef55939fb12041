"""Writes the demo's world in the forms of three of EvalScope's benchmarks.

    python integrations/evalscope/world_files.py --world=demo/world --output=evalscope_files

    vqav2/validation.jsonl     questions about pictures, as the suite `vqa:tiny` asks them
    msr_vtt/validation.jsonl   clips to describe, as `captions:tiny`
    fleurs/test.parquet        speech to write down, as `asr:tiny`
    dataset_args.json          for EvalScope's --dataset-args

The samples, their order and their words are those of our suites. Captions have spaces between their
characters, as `run.py` writes those of the answers: EvalScope counts what spaces divide. Needs
pyarrow (pip install pyarrow).
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import soundfile

from xllm_jax.configs.suites import asr, captions, vqa
from xllm_jax.core.suite import Suite
from xllm_jax.data.example import Example
from xllm_jax.data.text.instructions import instructions
from xllm_jax.evaluation import caption_metrics, scorers
from xllm_jax.evaluation.suites import run

PEOPLE = 10  # whose answers VQA's accuracy compares with


def samples(config: Suite, name: str, world: Path, limit: int) -> tuple[Example, ...]:
    """What a suite asks of one set, in its order."""
    config.root, config.only, config.limit = str(world), (name,), limit
    return run.samples(config)[name]


def question(example: Example) -> dict[str, Any]:
    """A row of `vqav2`: everybody gives the one right answer."""
    content = Path(example.media[0][1]).read_bytes()
    return {
        "question_id": example.key,
        "question": example.instruction,
        "answers": [example.answer] * PEOPLE,
        "image": f"data:image/jpeg;base64,{base64.b64encode(content).decode()}",
    }


def clip(example: Example) -> dict[str, Any]:
    """A row of `msr_vtt`."""
    known = [" ".join(caption_metrics.clean(text)) for text in scorers.references(example)]
    path = str(Path(example.media[0][1]).absolute())
    return {"video_id": example.key, "video": path, "references": known}


def utterance(number: int, example: Example) -> dict[str, Any]:
    """A row of `fleurs`, its sound as WAV: what EvalScope says that it sends."""
    samples, rate = soundfile.read(example.media[0][1], dtype="int16")
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format="WAV", subtype="PCM_16")
    said = scorers.reference(example)
    return {
        "id": number,
        "num_samples": len(samples),
        "audio": {"bytes": content.getvalue(), "path": f"{number}.wav"},
        "transcription": said,
        "raw_transcription": said,
        "language": "Mandarin Chinese",
        "gender": 0,
        "lang_group_id": 6,
    }


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON, a row a line."""
    path.parent.mkdir(parents=True)
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    path.write_text(text, "utf-8")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Parquet, which holds bytes."""
    try:
        from pyarrow import Table, parquet
    except ImportError:
        raise SystemExit("pyarrow is not installed: pip install pyarrow") from None
    path.parent.mkdir(parents=True)
    parquet.write_table(Table.from_pylist(rows), path)


def arguments(folder: Path) -> dict[str, dict[str, Any]]:
    """What EvalScope is told of each set: where it lies, and what is asked."""
    place = {name: str((folder / name).absolute()) for name in ("vqav2", "msr_vtt", "fleurs")}
    asked = {task: instructions(task)[0] for task in ("video_caption", "asr")}
    return {
        "vqav2": {"dataset_id": place["vqav2"], "prompt_template": "{question}"},
        "msr_vtt": {
            "dataset_id": place["msr_vtt"],
            "prompt_template": asked["video_caption"],
            "filters": {"characters": {}},
        },
        "fleurs": {
            "dataset_id": place["fleurs"],
            "subset_list": ["default"],
            "prompt_template": asked["asr"],
        },
    }


def write(world: Path, folder: Path, limit: int = 0) -> None:
    """Writes all files into a new folder.

    Args:
      world: of `xllm world`.
      folder: that is not there yet.
      limit: most samples of a set; 0 takes all.
    """
    folder.mkdir(parents=True)
    asked = samples(vqa.get_config("tiny"), "questions", world, limit)
    write_lines(folder / "vqav2/validation.jsonl", map(question, asked))
    clips = samples(captions.get_config("tiny"), "msrvtt", world, limit)
    write_lines(folder / "msr_vtt/validation.jsonl", map(clip, clips))
    heard = samples(asr.get_config("tiny"), "sentences", world, limit)
    write_table(folder / "fleurs/test.parquet", [utterance(*pair) for pair in enumerate(heard)])
    text = json.dumps(arguments(folder), ensure_ascii=False)
    (folder / "dataset_args.json").write_text(text, "utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=0)
    flags = parser.parse_args()
    write(flags.world, flags.output, flags.limit)


if __name__ == "__main__":
    main()
