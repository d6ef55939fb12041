"""A data set reads its own files: absolute paths, `../` and links to others cost the record."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import os
import pathlib
import sys

import forked
import numpy as np
import pytest
import soundfile
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source, Stage
from xllm_jax.core.stage_record import parse_stage
from xllm_jax.data import mixture
from xllm_jax.data.media import paths
from xllm_jax.prepare import preparation, shard
from xllm_jax.prepare.recipes import resampled

ROOT = pathlib.Path(__file__).parents[1]
TALK = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A cat."}]


def picture(path, gray):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (gray, gray, gray)).save(path, "PNG")


@pytest.fixture
def home(tmp_path):
    """A set with one picture of its own, and private files beside it."""
    picture(tmp_path / "root/set/a.jpg", 10)
    picture(tmp_path / "root/other/b.jpg", 20)
    picture(tmp_path / "private/mine.jpg", 200)
    (tmp_path / "private/notes.txt").write_text("my private notes\n")
    (tmp_path / "root/set/link.jpg").symlink_to(tmp_path / "private/mine.jpg")
    (tmp_path / "root/set/up").mkdir()
    (tmp_path / "root/set/up/link.jpg").symlink_to("../../../private/mine.jpg")
    return tmp_path


def outside(home):
    """Paths of the private picture, in every way that a list can write one."""
    mine = home / "private/mine.jpg"
    return (
        str(mine),
        "../../private/mine.jpg",
        "up/../../../private/mine.jpg",
        f"/proc/self/root{mine}",
        paths.part(mine, 0, mine.stat().st_size),
        f"{mine}#t=0,1",
        "link.jpg",
        "up/link.jpg",
        "a\0.jpg",
    )


def conversations(folder, names):
    rows = [{"id": str(n), "image": name, "conversations": TALK} for n, name in enumerate(names)]
    (folder / "train.json").write_text(json.dumps(rows))
    return Source("instructions", "set/train.json")


def table(folder, names):
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *((n, "A cat.") for n in names)])
    return Source("table", "set")


def pairs(folder, names):
    rows = [{"image": name, "caption": "A cat."} for name in names]
    (folder / "captions.json").write_text(json.dumps(rows))
    return Source("captions_folder", "set")


def coco(folder, names):
    (folder / "annotations").mkdir(exist_ok=True)
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    said = [{"image_id": n, "caption": "A cat."} for n in range(len(names))]
    found = {"images": images, "annotations": said}
    (folder / "annotations/captions_train.json").write_text(json.dumps(found))
    return Source("coco", "set", options={"images": str(folder)})


def theirs(folder, names):
    rows = [{"image": name, "caption": "A cat.", "image_id": "1", "dataset": "x"} for name in names]
    (folder / "train.json").write_text(json.dumps(rows))
    return Source("reference", "set")


def challenger(folder, names):
    rows = [{"image_id": name, "caption": ["A cat."]} for name in names]
    (folder / "caption_train_annotations_1.json").write_text(json.dumps(rows))
    return Source("ai_challenger", "set", options={"images": str(folder)})


LISTS = (conversations, table, pairs, coco, theirs, challenger)


@pytest.mark.parametrize("write", LISTS)
def test_only_files_of_the_set_are_read(write, home):
    names = [name for name in outside(home) if write is not table or "\0" not in name]
    source = write(home / "root/set", ["a.jpg", *names])
    found = mixture.read("set", source, str(home / "root"))
    assert found[0].media[0][1].endswith("a.jpg")
    for place in range(1, len(names) + 1):
        with pytest.raises(UserError, match=r"lies outside of|no name of a file"):
            found[place]


@pytest.mark.parametrize("write", LISTS)
def test_what_lies_below_the_root_is_read(write, home):
    """Absolute paths, too, and through a link in the user's own root."""
    (home / "linked").symlink_to(home / "root")
    names = ["../other/b.jpg", str(home / "root/other/b.jpg"), str(home / "linked/other/b.jpg")]
    source = write(home / "root/set", names)
    found = mixture.read("set", source, str(home / "linked"))
    assert all(paths.read(found[n].media[0][1])[:4] == b"\x89PNG" for n in range(3))


@pytest.mark.parametrize("write", LISTS)
def test_allowed_folders_are_read(write, home):
    mine = os.path.realpath(home / "private/mine.jpg")
    source = write(home / "root/set", [mine, f"/proc/self/root{mine}", paths.part(mine, 0, 9)])
    source.allow_paths = (str(home / "private"),)
    found = mixture.read("set", source, str(home / "root"))
    for number in range(3):
        assert os.path.realpath(paths.place(found[number].media[0][1]).file) == mine


def test_a_name_that_only_begins_alike_is_outside(home):
    picture(home / "root/set2/a.jpg", 1)
    source = table(home / "root/set", ["../set2/a.jpg"])
    source.path = str(home / "root/set")
    with pytest.raises(UserError, match=r"outside of .*Where that is meant, add --allow_paths="):
        mixture.read("set", source, "")[0]


@pytest.mark.parametrize("name", ["captions.json", "annotations", "a.txt", "00.tar"])
def test_annotations_that_are_links_are_refused(name, home):
    """A caption could otherwise be a private text."""
    for target in ("notes.txt", ""):
        place = home / "root/set" / name
        place.symlink_to(home / "private" / target)
        with pytest.raises(UserError, match="is a link and leads outside"):
            mixture.read("set", Source("captions_folder", "set"), str(home / "root"))
        allowed = Source("captions_folder", "set", allow_paths=(str(home / "private"),))
        try:
            assert len(mixture.read("set", allowed, str(home / "root")))
        except UserError as error:  # it is no list of captions, but may be looked at
            assert "outside" not in str(error)
        place.unlink()


def test_a_selection_reads_within_its_own_reach(home):
    """What it names is a stranger's word, too."""
    folder = home / "root/set"
    picture(home / "private/pictures/x.jpg", 7)
    (home / "private/pictures/x.txt").write_text("my private caption")
    np.save(folder / "train.npy", np.asarray([[0, 0, -1]], np.int64))
    for below in ("../../private/pictures", str(home / "private/pictures")):
        one = {"reader": "captions_folder", "path": below, "split": "train", "options": {}}
        about = {"sources": {"x": one}, "instructions": []}
        (folder / "selection.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match="lies outside of"):
            mixture.read("set", Source("selection", "set"), str(home / "root"))
        source = Source("selection", "set", allow_paths=(str(home / "private"),))
        assert mixture.read("set", source, str(home / "root"))[0].answer == "my private caption"


def further(folder, place):
    """A selection whose source names a modality's record."""
    (folder / "train.json").write_text(
        json.dumps([{"id": "1", "image": "a.jpg", "conversations": TALK}])
    )
    np.save(folder / "train.npy", np.asarray([[0, 0, -1]], np.int64))
    one = {"reader": "instructions", "path": "train.json", "split": "train"}
    one["options"] = {"modalities": {"sensor": place}}
    (folder / "selection.json").write_text(json.dumps({"sources": {"x": one}, "instructions": []}))


def test_a_selection_imports_nothing(home, monkeypatch):
    (home / "a_module.py").write_text("raise SystemExit('I ran')")
    monkeypatch.syspath_prepend(str(home))
    folder = home / "root/set"
    further(folder, "a_module:NAME")
    with pytest.raises(UserError, match="would import 'a_module:NAME' for the modality 'sensor'"):
        mixture.read("set", Source("selection", "set"), str(home / "root"))
    assert "a_module" not in sys.modules
    np.save(home / "root/train.npy", np.asarray([[0, 0, -1]], np.int64))
    one = {"reader": "selection", "path": "set", "split": "train"}
    one["options"] = {"modalities": {"sensor": "a_module:NAME"}}
    about = {"sources": {"x": one}, "instructions": []}
    (home / "root/selection.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="would import"):
        mixture.read("set", Source("selection", ""), str(home / "root"))


def test_a_selection_imports_what_the_stage_names(home):
    place = "xllm_jax.data.media.image:MODALITY"
    further(home / "root/set", place)
    data = Stage().data
    data.root, data.sources = str(home / "root"), {"set": Source("selection", "set")}
    data.modalities = {"sensor": f"{place}_"}
    with pytest.raises(UserError, match="would import"):
        mixture.of_stage("set", data)
    data.modalities = {"sensor": place}
    assert mixture.of_stage("set", data)[0].answer == "A cat."
    options = {"modalities": {"sensor": place}}
    source = Source("selection", "set", options=options)
    assert mixture.read("set", source, data.root)[0].answer == "A cat."


def test_a_resampled_folder_has_no_foreign_files(home):
    sound = home / "in"
    sound.mkdir()
    soundfile.write(sound / "a.wav", np.random.default_rng(0).normal(size=8000) / 9, 8000)
    (sound / "transcript.txt").symlink_to(home / "private/notes.txt")
    with pytest.raises(UserError, match="lies outside of"):
        resampled.build(str(sound), str(home / "out"))
    assert not (home / "out").exists()


def test_nothing_from_outside_is_packed(home):
    folder = home / "root/set"
    source = conversations(folder, ["set/a.jpg", str(home / "private/mine.jpg"), "other/b.jpg"])
    for allowed, kept in (((), 1), ((str(home / "private"), str(home / "root/other")), 3)):
        source = Source("instructions", str(folder), allow_paths=allowed)
        plan = preparation.make("set", source, str(home / f"out{kept}"), 8)
        note = shard.write(plan, 0, plan.examples())
        assert note["records"] == kept
        assert all("lies outside of" in one["reason"] for one in note["rejects"])
    same = dataclasses.replace(plan, source=dataclasses.replace(source, allow_paths=()))
    assert same.identity() == plan.identity()


def test_the_command_line_allows_folders():
    code = (
        "import sys\nfrom xllm_jax.launch import cli, inspect_data\n"
        "cli.parse(sys.argv)\nstage = inspect_data.CONFIG.value\n"
        "print({one.allow_paths for one in stage.data.sources.values()})"
    )
    flags = ("--config=stage2_image:tiny", "--allow_paths=/a", "--allow_paths=/b")
    command = [sys.executable, "-c", code, *flags]
    told = forked.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert told.stdout.strip() == "{('/a', '/b')}"


def test_a_stage_keeps_what_it_allows():
    stage = Stage()
    stage.data.sources["a"] = Source("table", "a", allow_paths=("/x",))
    assert parse_stage(json.loads(json.dumps(dataclasses.asdict(stage)))).data == stage.data
    older = dataclasses.asdict(stage)
    del older["data"]["sources"]["a"]["allow_paths"]
    assert parse_stage(older).data.sources["a"].allow_paths == ()


def test_bytes_in_a_row_lie_nowhere(home):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    packed = base64.urlsafe_b64encode(stream.getvalue()).decode()
    rows = [{"image": packed, "caption": "A cat.", "image_id": "1", "dataset": "MUGE_zh"}]
    (home / "root/set/train.json").write_text(json.dumps(rows))
    found = mixture.read("set", Source("reference", "set"), str(home / "root"))
    assert paths.read(found[0].media[0][1]) == stream.getvalue()


def test_written_media_are_texts_and_no_files(tmp_path):
    """Beside a root, too, in which their words would be no file."""
    (tmp_path / "world").mkdir()
    shares = {"answer_scene": 1.0, "answer_speech": 1.0}
    source = Source("world_text", options={"count": 6, "shares": shares, "spelled": 0.5})
    found = mixture.read("words", source, str(tmp_path / "world"))
    kinds = {name for example in found for name, _ in example.media}
    assert {"text:image", "spelled:speech"} <= kinds
