"""One hash of everything that the demo's figures depend on.

PYTHONPATH=. python benchmarks/demo_behavior.py [--parts]

It covers what runs, not how it is written: comments, names of functions, files and variables do not
change it. In it are

    stages      every field of each stage that the demo trains, as its commands resolve it
    programs    StableHLO of each stage's training step and of decoding, without locations and names
    backbones   the bytes of the shipped backbones
    batches     the first batch of each stage on a small world: whole numbers exactly, pixels and
                sounds by deviation and by mean in deviations, which other processors share
    scorers     what the scorers say of fixed answers and pictures, and how pictures are drawn

and not: how the ASR model searches, the decoder's programs, which samples are asked, the report,
the order of the commands, versions of libraries other than by what they make of all that
(`requirements.lock` pins them), and processors.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import xllm_jax
from xllm_jax.assembly.system import System
from xllm_jax.configs import networks
from xllm_jax.core import fingerprint, mesh
from xllm_jax.core.stage import Stage
from xllm_jax.data.batching import scene_pictures
from xllm_jax.data.example import Example
from xllm_jax.data.media import image
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.synthetic_world import build as world
from xllm_jax.data.synthetic_world.plan import WorldSizes
from xllm_jax.data.text import llm_family
from xllm_jax.evaluation import demo_suite, drawing_suite
from xllm_jax.inference import decoding
from xllm_jax.training.trainer import Trainer

STAGES = {
    "stage1_image": {},
    "stage1_speech": {},
    "stage2_image": {},
    "stage2_image_no_init": {"image_interface": ""},
    "stage2_image_half": {},
    "stage2_video": {},
    "stage2_speech": {},
    "stage3": {},
    "stage_output_image": {},
}
FILES = {
    "stage2_image_no_init": "stage2_image",
    "stage2_image_half": "stage2_image",
    "stage3": "stage3_instruction",
}
SHARES = {
    "stage2_image_half": 0.5,
    "stage2_image_no_init": 0.5,
}  # of the records of each source, and of the steps
IDLE = ("name", "log_every", "save_every", "keep", "stall", "wandb", "profile", "best.")
IDLE += ("data.threads", "data.waiting", "validation.")
CAPTIONS = Path(networks.DECODER).name + "/tokenizer"
SHIPPED = Path(xllm_jax.__file__).parent / "data" / "synthetic_world" / "backbones"


def behavior() -> dict[str, str]:
    """{part: hash}."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {field.name: 24 for field in dataclasses.fields(WorldSizes)}
        made = world.build(Path(folder) / "world", WorldSizes(**sizes), workers=0)
        stages = {name: stage(name) for name in STAGES}
        return {
            "stages": digest({name: fields(one) for name, one in stages.items()}),
            "programs": digest(programs(stages, made)),
            "backbones": digest(dict(backbones())),
            "batches": digest({name: batch(one, made) for name, one in stages.items()}),
            "scorers": digest(scores()),
        }


def whole(parts: Mapping[str, str]) -> str:
    """One hash of all parts."""
    return digest(dict(parts))


def digest(value: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def stage(name: str) -> Stage:
    """A stage as the demo trains it."""
    made = import_module(f"xllm_jax.configs.{FILES.get(name, name)}").get_config("tiny")
    sources = {
        key: dataclasses.replace(source, share=SHARES.get(name, 1.0))
        for key, source in made.data.sources.items()
    }
    data = dataclasses.replace(made.data, sources=sources)
    steps = int(made.steps * SHARES.get(name, 1.0))
    return dataclasses.replace(made, data=data, steps=steps, init={**made.init, **STAGES[name]})


def fields(one: Stage) -> dict[str, str]:
    """Fields with their values; log, checkpoint and watch settings change no figure."""
    found = fingerprint.configuration(one)
    return {path: text for path, text in found.items() if not path.startswith(IDLE)}


def placed(one: Stage, made: Path) -> Stage:
    """The stage on a world elsewhere, with the shipped tokenizers."""
    data = dataclasses.replace(
        one.data,
        root=str(made),
        tokenizer=str(SHIPPED / "llm") if one.data.tokenizer else "",
        caption_tokenizer=str(SHIPPED / CAPTIONS) if one.data.caption_tokenizer else "",
        characters=str(made / "characters.txt") if one.data.characters else "",
        vocabulary=str(SHIPPED / "bert" / "vocab.txt") if one.data.vocabulary else "",
        threads=1,
    )
    return dataclasses.replace(one, data=data, init={})


def programs(stages: Mapping[str, Stage], made: Path) -> dict[str, str]:
    """{stage: hash of the training step that JAX hands to its compiler}, and of decoding."""
    device_mesh = mesh.make({}, jax.devices()[:1])
    found = {}
    for name, one in stages.items():
        given = placed(one, made)
        trainer = Trainer(System.build(given, device_mesh))
        shapes = Pipeline(given.data, given.seed).format.shapes()
        with jax.set_mesh(device_mesh):
            found[name] = hashed(trainer.step.lower(trainer.abstract_state, shapes))
            if name == "stage3":
                how = decoding.Decoding.of(llm_family.load(given.data), max_new_tokens=64)
                system = trainer.system
                asked = decoding.generate.lower(system.model, system.tree, shapes, how)
                found["answers"] = hashed(asked)
    return found


def hashed(lowered: jax.stages.Lowered) -> str:
    """Of a program without names."""
    return hashlib.sha256(nameless(lowered.as_text()).encode()).hexdigest()


def nameless(text: str) -> str:
    """StableHLO with its functions numbered as they occur, and without locations and labels."""
    text = re.sub(r'jax\.result_info = "[^"]*"(, )?|\bloc\([^)]*\)|^#loc.*$', "", text, flags=re.M)
    numbers: dict[str, str] = {}
    return re.sub(r"@[\w.]+", lambda m: numbers.setdefault(m[0], f"@{len(numbers)}"), text)


def backbones() -> Iterator[tuple[str, str]]:
    """(path, hash) of the shipped files that the demo uses."""
    for file in sorted(SHIPPED.rglob("*")):
        name = str(file.relative_to(SHIPPED))
        if file.is_file():
            yield name, hashlib.sha256(file.read_bytes()).hexdigest()


def batch(one: Stage, made: Path) -> list[Any]:
    """The first batch, leaf by leaf."""
    given = placed(one, made)
    first, _ = next(Pipeline(given.data, given.seed).iterate())
    return [told(np.asarray(leaf)) for leaf in jax.tree.leaves(first)]


def told(leaf: np.ndarray) -> list[Any]:
    """An array in words: whole numbers by their hash, others by deviation and mean.

    The mean of features that are normalized is rounding noise, which processors do not share: it is
    told in deviations, and no noise is 0 with a sign.
    """
    about: list[Any] = [list(leaf.shape), str(leaf.dtype)]
    if leaf.dtype.kind in "iub":
        return [*about, hashlib.sha256(leaf.tobytes()).hexdigest()]
    numbers = leaf.astype(np.float64)
    mean, deviation = float(numbers.mean()), float(numbers.std())
    return [*about, f"{deviation:.2e}", f"{round(mean / (deviation or 1.0), 2) + 0.0:.2f}"]


def scores() -> dict[str, Any]:
    """What every scorer says of right, half right, wrong and empty answers."""
    true = ("图中左上有一个大的红色圆形。", "一个蓝色方形向左移动。", "两个")
    said = (true[0], "一个蓝色方形向右移动。", "三个")
    examples = [Example(f"fixed-{i}", answer=text, transcript=text) for i, text in enumerate(true)]
    scorers: dict[str, Callable[[Sequence[str], Sequence[Example]], Mapping[str, Any]]]
    scorers = {**demo_suite.SCORERS, "sentences": demo_suite.scorers.transcription}
    return {
        f"{name}/{number}/{metric}": [f"{value:.6f}" for value in score.samples]
        for name, scorer in scorers.items()
        for number, answers in enumerate((true, said, ("",) * len(true)))
        for metric, score in scorer(answers, examples).items()
    } | drawings()


def drawings() -> dict[str, Any]:
    """How the pictures of a comparison are drawn, and what the judge says of fixed ones."""
    asked = drawing_suite.requests(24)
    shown = [
        image.from_signed(scene_pictures.picture(drawing_suite.asked_for(e), 96)) for e in asked
    ]
    how = dataclasses.asdict(drawing_suite.Rendering((96, 96)))
    return {
        "rendering": {**how, "shares": [drawing_suite.ENOUGH, drawing_suite.HEARD]},
        "requests": [[one.instruction, one.outputs[0][1]] for one in asked],
    } | {
        f"drawing/{number}/{metric}": [f"{value:.6f}" for value in score.samples]
        for number, pictures in enumerate((shown, [*shown[1:], shown[0]]))
        for metric, score in drawing_suite.scores(pictures, asked).items()
    }


def main() -> None:
    """Prints the hash."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", action="store_true")
    parts = behavior()
    if parser.parse_args().parts:
        for name, value in parts.items():
            print(f"{name:10s} {value}")
    print(whole(parts))


if __name__ == "__main__":
    main()
