"""Libraries that make pixels and samples: another version is named wherever it would matter."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import metadata

import PIL
import pytest
import small_cache
from small_runs import make_world
from small_stage import ROOT, curve

from xllm_jax.assembly.system import System
from xllm_jax.core import mesh
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Stage
from xllm_jax.data import manifest
from xllm_jax.data.media import preprocessing
from xllm_jax.feature_cache import cache_plan, check, write
from xllm_jax.training import loop, startup


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("libraries"))


@pytest.fixture(scope="module")
def stage(world) -> Stage:
    return small_cache.based(small_cache.stage2_speech(world), world.parent)


@pytest.fixture
def another_scipy(monkeypatch):
    monkeypatch.setitem(preprocessing.VERSIONS, "SciPy", lambda: "0.9")


def test_every_modality_names_its_libraries():
    packages = {"Pillow": "pillow", "PyAV": "av", "soxr": "soxr", "SciPy": "scipy"}
    wanted = {
        "image": {"Pillow"},
        "video": {"PyAV", "FFmpeg", "Pillow"},
        "speech": {"libsndfile", "soxr", "SciPy"},
    }
    for modality, names in wanted.items():
        found = manifest.media_settings(Data(items={modality: 1}))
        versions = {k.removeprefix("library "): v for k, v in found.items() if "library" in k}
        assert versions.keys() == names
        for name in names & packages.keys():
            assert versions[name].split()[0] == metadata.version(packages[name])
    assert manifest.media_settings(Data()) == {}
    assert re.search(
        r"libavcodec \d+\.\d+", manifest.media_settings(Data(items={"video": 1}))["library FFmpeg"]
    )


@pytest.mark.parametrize(
    ("batch_format", "library"),
    [("image_text_pairs", "Pillow"), ("transcription", "SciPy"), ("scene_attributes", "Pillow")],
)
def test_batches_without_slots_for_media_name_them_too(batch_format, library):
    assert f"library {library}" in manifest.media_settings(Data(batch_format=batch_format))


def test_one_version_of_pillow_is_asked_for():
    """test_golden.py shows that this version makes the recorded pixels, bit for bit."""
    asked = re.search(r"^pillow==(\S+)\s", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert asked and asked.group(1) == PIL.__version__


def test_hosts_compare_them(another_scipy, monkeypatch, stage):
    compared = {}
    monkeypatch.setattr(
        startup.hosts, "agree", lambda store, what, own: compared.update({what: own})
    )
    system = System.build(stage, mesh.make({}))
    startup.compare(system, loop.Pipeline(stage.data), store=object())
    assert compared["data"]["library SciPy"] == "0.9"


def settle(stage: Stage, folder) -> dict[str, str]:
    read = dataclasses.replace(stage, data=dataclasses.replace(stage.data, cache=str(folder)))
    return check.verified(System.build(read, mesh.make({})))


def test_a_cache_of_another_library_is_refused_by_its_name(stage, tmp_path, monkeypatch, capsys):
    made = cache_plan.make(stage, tmp_path / "cache", "configs/small.py", 5)
    write.run(made, 4)
    assert settle(stage, made.output)
    now = preprocessing.VERSIONS["SciPy"]()
    monkeypatch.setitem(preprocessing.VERSIONS, "SciPy", lambda: "0.9")
    wanted = f"library SciPy was {now} when the cache was written and is 0.9 now"
    with pytest.raises(UserError, match=re.escape(wanted)):
        settle(stage, made.output)
    capsys.readouterr()
    any_version = dataclasses.replace(stage, data=dataclasses.replace(stage.data, libraries="any"))
    assert settle(any_version, made.output)
    assert wanted in capsys.readouterr().err
    again = cache_plan.make(stage, made.output, "configs/small.py", 5)
    with pytest.raises(UserError, match=f"library SciPy was '{now}' when the cache was written"):
        write.run(again, 4)

    manifest_file = made.output / "cache.json"  # as it was written before versions were kept
    about = json.loads(manifest_file.read_text())
    fields = about["modalities"]["speech"]["fields"]
    about["modalities"]["speech"]["fields"] = {
        name: value for name, value in fields.items() if not name.startswith("library ")
    }
    manifest_file.write_text(json.dumps(about))
    assert settle(stage, made.output)
    assert "does not say which libraries" in capsys.readouterr().err


def test_a_run_says_what_changed_before_it_resumes(stage, tmp_path, monkeypatch, capsys):
    loop.fit(stage, tmp_path, stop_after=2)
    now = preprocessing.VERSIONS["soxr"]()
    monkeypatch.setitem(preprocessing.VERSIONS, "soxr", lambda: "2.0")
    wanted = f"library soxr was {now} at checkpoint 2 and is 2.0 now"
    with pytest.raises(UserError, match=re.escape(wanted)):
        loop.fit(stage, tmp_path)
    assert max(curve(tmp_path)) == 2
    capsys.readouterr()
    loop.fit(small_cache.changed(stage, libraries="any"), tmp_path, stop_after=4)
    assert wanted in capsys.readouterr().err
    assert max(curve(tmp_path)) == 4
    with pytest.raises(UserError, match=r"data.libraries: unknown choice 'newest'"):
        monkeypatch.setitem(preprocessing.VERSIONS, "soxr", lambda: "3.0")
        loop.fit(small_cache.changed(stage, libraries="newest"), tmp_path)


def test_what_only_one_side_knows_is_no_change():
    preprocessing.compare({}, {"library SciPy": "1"}, "before", "same")
    preprocessing.compare({"library SciPy": "1"}, {}, "before", "same")
    with pytest.raises(UserError, match="orientation was exif before and is ignore now"):
        preprocessing.compare(
            {"data.image.orientation": "exif"},
            {"data.image.orientation": "ignore"},
            "before",
            "any",
        )
