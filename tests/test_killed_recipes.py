"""kill -9 amid the writes of a recipe: the same command leaves the same files as without it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import reader_fixtures as fixtures
import small_stage

from xllm_jax.core import atomic

COUNT = 12
TEXTS = [f"a red circle number {number} stands here" for number in range(1, COUNT + 1)]


def pairs(root: Path) -> str:
    """Captioned images in COCO's form, a table of translations and a list of scores."""
    folder = root / "coco"
    if folder.exists():
        return str(folder)
    numbers = range(1, COUNT + 1)
    data = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in numbers],
        "annotations": [{"image_id": n, "caption": text} for n, text in zip(numbers, TEXTS)],
    }
    fixtures.write(folder / "annotations/captions_train2017.json", data)
    fixtures.pictures(folder / "train2017", *(f"{n}.jpg" for n in numbers))
    table = {text: f"第{n}个红色的圆在这里" for n, text in zip(numbers, TEXTS)}
    fixtures.write(root / "table.json", table)
    np.save(root / "scores.npy", np.linspace(0, 1, COUNT).astype(np.float32))
    for number in numbers:
        fixtures.sound(root / f"sounds/{number % 3}/{number}.wav")
    return str(folder)


def translated(root: Path, output: Path) -> None:
    from xllm_jax.prepare.recipes import translated

    table = str(root / "table.json")
    translated.build(pairs(root), str(output), "coco", translations=table)


def similar(root: Path, output: Path) -> None:
    from xllm_jax.prepare.recipes import similar

    similar.build(pairs(root), str(output), "coco", scores=str(root / "scores.npy"))


def questions(root: Path, output: Path) -> None:
    from xllm_jax.prepare.recipes import questions

    questions.build(pairs(root), str(output), reader="coco")


def resampled(root: Path, output: Path) -> None:
    from xllm_jax.prepare.recipes import resampled

    pairs(root)
    resampled.build(str(root / "sounds"), str(output))


def instructions(root: Path, output: Path) -> None:
    from xllm_jax.core.stage import Source
    from xllm_jax.prepare.recipes import instructions

    sources = {"talks": Source("coco", pairs(root))}
    instructions.build(str(output), sources, counts={"talks": 8})


def world(_: Path, output: Path) -> None:
    from xllm_jax.data.synthetic_world import build, plan

    sizes = {field.name: 2 for field in dataclasses.fields(plan.WorldSizes)}
    build.build(output / "world", plan.WorldSizes(**sizes), workers=0)


def tokenizer(_: Path, output: Path) -> None:
    """What `build-backbones --tokenizer` learns."""
    from xllm_jax.data.text import chatglm_tokenizer

    chatglm_tokenizer.train_tokenizer(TEXTS, output, learned=20, longest=2, words=[])


def visdial(root: Path) -> str:
    """Dialogues in VisDial's form, and a table of their translations."""
    folder = root / "visdial"
    rounds = [{"question": n, "answer": n % 2} for n in range(4)]
    talks = [{"image_id": n, "caption": "", "dialog": rounds[n : n + 2]} for n in range(3)]
    asked, answers = [f"what is number {n}?" for n in range(4)], ["yes", "two"]
    data = {"questions": asked, "answers": answers, "dialogs": talks}
    fixtures.write(folder / "visdial_1.0_train.json", {"data": data})
    said = {text: f"第{n}个是什么" for n, text in enumerate(asked)} | {"yes": "是", "two": "两个"}
    fixtures.write(root / "visdial.json", said)
    fixtures.pictures(root / "photos", *(f"COCO_train2014_{n:012d}.jpg" for n in range(3)))
    return str(folder)


def hum(text: str) -> np.ndarray:
    """A speech engine."""
    return np.sin(np.arange(4000) / (9 + len(text))).astype(np.float32) / 2


def vsdial_cn(root: Path, output: Path) -> None:
    from xllm_jax.prepare.recipes import vsdial_cn

    folder, table = visdial(root), str(root / "visdial.json")
    engine, images = f"{__name__}:hum", str(root / "photos")
    vsdial_cn.build(folder, str(output), translations=table, engine=engine, images=images)


def backbone(_: Path, output: Path) -> None:
    """What `build-backbones` does with one network: ships it, and makes a base of what ships."""
    import jax

    from xllm_jax.convert.sources import world
    from xllm_jax.models.vit import VisionTransformer

    network = VisionTransformer(image_size=8, patch=4, width=8, depth=2, heads=2, hidden=8)
    drawn = jax.eval_shape(network.init, jax.random.key(0), *network.example())["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), drawn)
    world.export_vision(network, params, output / "shipped")
    world.import_vision(network, output / "shipped", output / "base")


CASES = {
    function.__name__: function
    for function in (
        *(translated, similar, questions, resampled, instructions, vsdial_cn, world, tokenizer),
        backbone,
    )
}


def needs(case: str) -> None:
    if case in ("instructions", "vsdial_cn"):
        pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")


@pytest.fixture(scope="module")
def imported():
    """Within it each killed process is a fork of one that has imported what the cases import."""
    names = ["translated", "similar", "questions", "resampled"]
    if importlib.util.find_spec("apache_beam"):
        names += ["instructions", "vsdial_cn"]
    modules = [f"xllm_jax.prepare.recipes.{name}" for name in names]
    with forked.imported("orbax.checkpoint", "xllm_jax.convert.sources.world", *modules):
        yield


@pytest.mark.parametrize("case", CASES)
def test_a_killed_recipe_continues_to_the_same_files(case, tmp_path, imported):
    needs(case)
    command = (sys.executable, str(Path(__file__).with_name("kill_midway.py")), case)
    paths = [str(small_stage.ROOT), str(Path(__file__).parent)]
    done = forked.run(
        [*command, str(tmp_path), os.environ.get("XLLM_KILLS", "2"), "7"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["writes"] and found["tried"]


def test_what_another_run_writes_at_the_same_time_stays(tmp_path):
    """The train split was killed amid its table; a run of another split is amid its own."""
    (tmp_path / "output").mkdir()
    killed = atomic.partial_name(tmp_path / "output/train.jsonl")
    killed.write_text("half")
    translated(tmp_path, tmp_path / "output")
    assert not killed.exists() and (tmp_path / "output/train.jsonl").is_file()
    others = [atomic.partial_name(tmp_path / "output" / name) for name in ("val.jsonl", "val.npy")]
    again = atomic.partial_name(tmp_path / "output/val_translated.json")
    (tmp_path / "output/val_translated.json").write_text("{}")
    for file in (*others, again):
        file.write_text("half")
        os.utime(file, ns=(time.time_ns() + 10**9,) * 2)
    translated(tmp_path, tmp_path / "output")
    assert all(file.exists() for file in (*others, again))


class Listed(Exception):
    """Told by the stand-in of Beam, at its first file of a recipe."""


@pytest.mark.parametrize("recipe", ["translated", "questions", "similar", "vsdial_cn", "spoken"])
def test_two_splits_in_one_folder_share_no_file_of_beam(recipe, tmp_path, monkeypatch):
    """Each removes and reads its own only."""
    from xllm_jax.prepare import runner, translators
    from xllm_jax.prepare.recipes import questions, similar, translated, vsdial_cn

    def listed(call, elements, file, *rest, **options):
        raise Listed(file)

    folder, files = pairs(tmp_path), set()
    os.rename(Path(folder, "train2017"), Path(folder, "val2017"))
    fixtures.pictures(Path(folder, "train2017"), "1.jpg")
    names = "annotations/captions_{}2017.json"
    shutil.copy(Path(folder, names.format("train")), Path(folder, names.format("val")))
    monkeypatch.setattr(runner, "mapped", listed)
    monkeypatch.setattr(translators.translate, "check", lambda folder: None)
    fixtures.write(tmp_path / "config.json", {})
    way = translators.Way(translator=str(tmp_path))
    for split in ("train", "val"):
        with pytest.raises(Listed) as told:
            if recipe == "translated":
                translated.build(folder, str(tmp_path), "coco", split, translator=str(tmp_path))
            elif recipe == "questions":
                questions.build(folder, str(tmp_path), split, reader="coco")
            elif recipe == "similar":
                scores = str(tmp_path / "scores.npy")
                similar.build(folder, str(tmp_path), "coco", scores=scores, split=split)
            elif recipe == "vsdial_cn":
                translators.outputs(["a"], way, str(tmp_path), split)
            else:
                data = Path(visdial(tmp_path))
                shutil.copy(data / "visdial_1.0_train.json", data / "visdial_1.0_val.json")
                table, engine = str(tmp_path / "visdial.json"), f"{__name__}:hum"
                options = {"translations": table, "engine": engine}
                vsdial_cn.build(str(data), str(tmp_path), split, **options)
        files.add(told.value.args[0])
    assert len(files) == 2
