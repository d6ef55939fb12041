"""Parts of an evaluation are kept, and measured again where anything they depend on has changed."""

import dataclasses
import json
import sys
import types

import pytest
import test_flags
from absl.testing import flagsaver

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.launch import measured


@pytest.fixture
def given(tmp_path):
    """Arguments of `key_of` with a run that ended and a question about a picture."""
    run = tmp_path / "runs" / "stage3" / "final"
    run.mkdir(parents=True)
    (run / "params").write_text("1")
    picture = tmp_path / "a.png"
    picture.write_text("pixels")
    asked = Example("1", (("image", str(picture)),), "红色？", "是", "vqa")
    return {
        "folders": [run, tmp_path / "runs" / "not_there" / "final"],
        "examples": [asked],
        "options": {"limit": 3},
        "code": {"a.py": "12"},
    }


class Counted:
    """Measures that count how often they are made."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return {"vqa@after": {"metrics": {"accuracy": {"value": 0.5, "margin": None}}}}


def test_a_part_is_measured_once_for_each_key(tmp_path):
    make = Counted()
    first = measured.part("answers", tmp_path, "one", make)
    assert measured.part("answers", tmp_path, "one", make) == first == Counted()()
    assert make.made == 1
    measured.part("drawings", tmp_path, "one", make)
    assert make.made == 2
    measured.part("answers", tmp_path, "other", make)
    assert make.made == 3
    assert measured.part("answers", tmp_path, "other", make) == first and make.made == 3


def test_without_the_pictures_beside_them_measures_are_made_again(tmp_path):
    make, pictures = Counted(), tmp_path / "pictures"
    for made in (1, 2):  # nothing is there
        measured.part("drawings", tmp_path, "one", make, [pictures])
        assert make.made == made
    pictures.mkdir()
    measured.part("drawings", tmp_path, "one", make, [pictures])
    assert make.made == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"key": "one"}', '{"key": "one", "measures": 1}']
)
def test_a_damaged_file_is_made_again(tmp_path, content):
    file = tmp_path / measured.FOLDER / "answers.json"
    file.parent.mkdir()
    file.write_text(content)
    make = Counted()
    assert measured.part("answers", tmp_path, "one", make) and make.made == 1
    assert json.loads(file.read_text())["key"] == "one"


def test_a_failed_measurement_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        measured.part("answers", tmp_path, "one", fail)
    assert not (tmp_path / measured.FOLDER).exists()


def test_the_key_tells_whatever_measures_depend_on(given):
    asked = given["examples"][0]
    keys = [measured.key_of(**given)]
    assert measured.key_of(**given) == keys[0]
    for name, value in {
        "examples": [dataclasses.replace(asked, answer="不是")],
        "options": {"limit": 4},
        "code": {"a.py": "13"},
        "folders": given["folders"][:1],
    }.items():
        keys.append(measured.key_of(**given | {name: value}))
    (given["folders"][0] / "params").write_text("22")  # trained again
    keys.append(measured.key_of(**given))
    given["folders"][1].mkdir(parents=True)
    (given["folders"][1] / "params").write_text("1")  # another run has ended
    keys.append(measured.key_of(**given))
    with open(asked.media[0][1], "a") as opened:  # another picture
        opened.write("more")
    keys.append(measured.key_of(**given))
    assert len(set(keys)) == len(keys) == 8


def test_the_report_of_two_parts_is_that_of_one_call(tmp_path, monkeypatch):
    """What --only measured is taken up, and nothing is measured twice."""
    with test_flags.command("evaluate"):
        launched = sys.modules["xllm_jax.launch.evaluate"]
        assert test_flags.run([])[0] == 0
        answers, drawn, wrote = Counted(), Counted(), []
        drawing = {"drawing": {"metrics": {"looks": {"scores": [1.0, 0.0]}}, "keys": ["a", "b"]}}
        base = types.SimpleNamespace(folder=tmp_path / "decoder")
        replaced = {
            "models": lambda _: {},
            "pairs": lambda _: {"pairs@stage1": {}},
            "drawings": lambda *given: given[2].mkdir() or (drawn() and drawing),
            "decoder": lambda _: base,
            "write": lambda found, *_: wrote.append(found),
        }
        for name, function in replaced.items():
            monkeypatch.setattr(launched, name, function)
        monkeypatch.setattr(launched.demo_suite, "tasks", lambda *_: {})
        monkeypatch.setattr(launched.demo_suite, "run", lambda *_: {"measures": answers()})
        for only in (launched.DRAWINGS, launched.ANSWERS, ""):
            with flagsaver.flagsaver(only=only, data=str(tmp_path)):
                launched.measure_all(tmp_path / "runs", tmp_path)
        assert answers.made == drawn.made == 1
        assert wrote == [answers() | drawing | {"pairs@stage1": {}}]
        monkeypatch.setattr(launched, "decoder", lambda _: None)
        alone = flagsaver.flagsaver(only=launched.DRAWINGS)
        with alone, pytest.raises(UserError, match="no run stage_output_image that draws"):
            launched.measure_all(tmp_path / "runs", tmp_path)
