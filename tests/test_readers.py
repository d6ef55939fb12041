"""Every reader, on files as they are published: prepared, looked at, and trained on for two steps.

One network of stages 2 and 3 with all modalities and one of stage 1 are compiled for all of them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys

import jax
import numpy as np
import pytest
import reader_fixtures as fixtures
import small_datasets
from small_stage import TOKENIZER

from xllm_jax.assembly.system import System
from xllm_jax.audit import audit
from xllm_jax.configs import stage1_speech, stage3_instruction
from xllm_jax.core import lookup, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Optimizer, Part, Source
from xllm_jax.data import mixture
from xllm_jax.data.media import cif_features, paths
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.text.characters import CharacterVocabulary
from xllm_jax.prepare import engine, manifest, preparation, shard
from xllm_jax.training import divergence
from xllm_jax.training import trainer as training
from xllm_jax.training.step import TrainState

pytestmark = pytest.mark.filterwarnings("default")

# {case: (reader, folder's maker, path inside, split, options, stage)}
OWN_NAMES = (
    *("activitynet", "ai_challenger", "captions_folder", "cc3m", "coco", "flickr30k"),
    *("instructions", "msrvtt", "sbu", "selection", "table", "visdial", "visual_genome"),
    *("vqav2", "webdataset", "wukong"),
)
CASES = {
    name: (name, name, "", "train", {}, "conversation") for name in OWN_NAMES
} | {
    "aishell-1": ("aishell", "aishell", "", "train", {}, "transcription"),
    "aishell-2": ("aishell", "aishell_2", "", "train", {}, "transcription"),
    "aishell-1 to the LLM": ("aishell", "aishell", "", "train", {}, "conversation"),
    "cc3m tars": ("cc3m", "webdataset", "", "train", {}, "conversation"),
    "hugging_face": (
        "hugging_face", "hugging_face", "", "train",
        {"image": "image", "answer": "caption"}, "conversation",
    ),
    "instructions jsonl": (
        "instructions", "instructions_by_line", "", "train", {}, "conversation"
    ),
    "instructions minigpt4": ("instructions", "minigpt4", "", "train", {}, "conversation"),
    "llava_test": ("llava_test", "llava_test", "", "test", {}, "conversation"),
    "reference captions": ("reference", "reference", "captions.json", "train", {}, "conversation"),
    "reference asr": ("reference", "reference", "asr.json", "train", {}, "transcription"),
    "reference vsd": ("reference", "reference", "vsd.json", "train", {}, "conversation"),
    "reference masr": ("reference", "reference", "vsd.json", "train", {}, "conversation"),
    "reference masr with target_text": (
        "reference", "reference", "masr.json", "train", {}, "conversation"
    ),
    "reference features": ("reference", "reference", "asr.json", "train", {}, "features"),
    "reference features vsd": ("reference", "reference", "vsd.json", "train", {}, "features"),
    "reference features masr": ("reference", "reference", "masr.json", "train", {}, "features"),
    "reference base64": ("reference", "reference", "packed.json", "train", {}, "conversation"),
    "reference instructions": (
        "reference", "reference", "instructions.json", "train", {}, "conversation"
    ),
    "reference clips": ("reference", "reference", "clips.json", "train", {}, "conversation"),
    "sbu tars": ("sbu", "webdataset", "", "train", {}, "conversation"),
    "tfds": ("tfds", "table", "", "train", {}, "conversation"),
    "visdial asr": ("visdial", "visdial", "", "train", {"kind": "asr"}, "transcription"),
    "visual_genome questions": (
        "visual_genome", "visual_genome", "", "train", {"kind": "questions"}, "conversation"
    ),
    "vsdial_cn": ("vsdial_cn", "visdial", "", "train", {}, "conversation"),
    "vsdial_cn asr": ("vsdial_cn", "visdial", "", "train", {"kind": "asr"}, "transcription"),
    "wukong tars": ("wukong", "webdataset", "", "train", {}, "conversation"),
}  # fmt: skip
OTHERS = {
    "captioned_list": "no reader",
    "layout": "no reader",
    "msrvtt_lists": "no reader",
    "prepared": "what every case is read by",
    "nextgpt": "answers with pictures: test_nextgpt_source.py",
    "requests": "captions that another reader reads: test_align.py",
    "world_edits": "pictures of the world's own files: test_drawing_suite.py",
    "world_requests": "made when read, without files: test_drawing_suite.py",
    "world_scenes": "drawn when read, for its own objective: test_world.py",
    "world_text": "made when read, without files: test_train.py",
}
SMALL = {"width": 16, "heads": 2, "hidden": 32}
LLM_WIDTH = 32


def test_no_reader_is_forgotten():
    known = set(lookup.choices(mixture.READERS))
    assert known == {case[0] for case in CASES.values()} | OTHERS.keys()


def conversation():
    """Stages 2 and 3: the adapters of all modalities train."""
    made = stage3_instruction.get_config("tiny")
    sight, ear = {**SMALL, "depth": 1}, {**SMALL, "depth": 2}
    ear |= {"kernel": 7, "pools": (1, 2), "channels": 8}
    seen = {"llm_width": LLM_WIDTH, **sight, "encoder_width": 16, "queries": 3}
    spoken = {"llm_width": LLM_WIDTH, **sight, "encoder_width": 16, "max_tokens": 16}
    fields = {
        "vision_encoder": {**sight, "image_size": 32},
        "speech_encoder": ear,
        "image_interface": seen,
        "video_interface": seen,
        "speech_interface": spoken | {"adapter_relu": False},
        "llm": {"vocab": 576, **SMALL, "width": LLM_WIDTH, "depth": 1, "alpha": 2.0},
    }
    data = Data(
        tokenizer=str(TOKENIZER),
        examples=2,
        rows=2,
        length=160,
        answers=40,
        items={"image": 2, "video": 2, "speech": 1},
        embeddings={"image": 3, "video": 3, "speech": 16},
        frames=(64,),
        image={"size": 32},
        video={"frames": 2},
        threads=1,
    )
    return small(made, fields, data)


def features():
    """The same on images and CIF features."""
    made = conversation()
    spoken = made.parts["speech_interface"]
    wide = dataclasses.replace(spoken, fields={**spoken.fields, "encoder_width": 512})
    return dataclasses.replace(
        made,
        parts={n: p for n, p in made.parts.items() if n != "video_interface"}
        | {"speech_interface": wide},
        modalities={name: made.modalities[name] for name in ("image", "speech")},
        trainable=("(image|speech)_interface/adapter/.*",),
        data=dataclasses.replace(made.data, items={"image": 1, "speech": 1}, speech_features="cif"),
    )


def transcription(folder):
    """Stage 1: speech encoder, CIF and ASR decoder train."""
    made = stage1_speech.get_config("tiny")
    ear = {**SMALL, "depth": 2, "kernel": 7, "pools": (1, 2), "channels": 8}
    spoken = {**SMALL, "depth": 1, "encoder_width": 16, "max_tokens": 16, "llm_width": 16}
    decoder = {**SMALL, "vocab": 64, "self_blocks": 1, "visual_width": 16, "linguistic_width": 16}
    fields = {"speech_encoder": ear, "speech_interface": spoken, "asr_decoder": decoder}
    CharacterVocabulary.build(list(fixtures.TEXTS) + ["红色吗几个"]).save(folder / "characters.txt")
    data = Data(
        batch_format="transcription",
        characters=str(folder / "characters.txt"),
        examples=2,
        frames=(64,),
        characters_length=16,
        threads=1,
    )
    return small(made, fields, data)


def small(made, fields, data):
    parts = {
        name: Part(part.network, part.size, {**part.fields, **fields[name]})
        for name, part in made.parts.items()
    }
    rate = Optimizer(schedule="constant", peak=1e-3, weight_decay=0.0)
    numbers = {
        "optimizer": rate,
        "compute": "float32",
        "frozen": "float32",
        "unroll": 1,
        "init": {},
    }
    return dataclasses.replace(made, parts=parts, data=data, **numbers)


class Trainer:
    """A compiled step and the state that all cases of one form train on."""

    def __init__(self, stage):
        self.stage, self._mesh = stage, mesh.make(stage.mesh)
        trainer = training.Trainer(System.build(stage, self._mesh))
        like, optimizer = trainer.abstract_state, trainer.optimizer
        # Drawn by NumPy: initializing for real would compile every network.
        rng = np.random.default_rng(0)
        drawn = {
            path: rng.normal(path.endswith(("scale", "variance")), 0.1, x.shape).astype(np.float32)
            for path, x in trainer.system.shapes.items()
        }
        trainable, frozen = rules.split(stage.trainable, rules.unflatten(drawn))
        moments, guard = optimizer.init(trainable), divergence.initial_guard(stage.divergence)
        state = TrainState(np.zeros((), np.int32), trainable, frozen, moments, guard)
        self.state = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, like)
        self._step = trainer.step

    def trained(self):
        """A copy of the trainable parameters."""
        return {k: np.array(v) for k, v in rules.flatten(self.state.trainable).items()}

    def step(self, batch):
        """One step; returns its loss."""
        with jax.set_mesh(self._mesh):
            self.state, metrics = self._step(self.state, mesh.to_global(self._mesh, batch))
        return float(metrics["loss"])


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """{form: Trainer}, made when they are asked for."""
    made = {}

    def get(form):
        if form not in made:
            folder = tmp_path_factory.mktemp("characters")
            stages = {"conversation": conversation, "features": features}
            make = stages.get(form, lambda: transcription(folder))
            made[form] = Trainer(make())
        return made[form]

    return get


def prepared(source, output, name="set"):
    """Prepares a source, through Beam where it is installed; returns the manifest's split."""
    made = preparation.make(name, source, str(output), 4)
    if importlib.util.find_spec("apache_beam") is None:
        found = made.examples()
        for number in made.shards.todo():
            shard.write(made, number, found)
        return manifest.finish(made)["splits"][source.split]
    return engine.run(made)["splits"][source.split]


def source_of(case, tmp_path):
    reader, maker, inside, split, options, _ = CASES[case]
    root = tmp_path / "data"
    root.mkdir()
    getattr(fixtures, maker)(root)
    if reader == "tfds":  # any TFDS set of ArrayRecord, such as one of ours
        prepared(Source("table", str(root)), tmp_path / "set", "a_set")
        options, root = {"image": "image", "answer": "answer"}, tmp_path / "set"
    if reader == "reference":
        heard = "features" if CASES[case][-1] == "features" else "audio"
        options = {"images": f"{root}/images", heard: f"{root}/{heard}"}
        options |= {"kind": "masr"} if case == "reference masr" else {}
        options |= {"videos": f"{root}/videos"} if case == "reference clips" else {}
    return Source(reader, str(root / inside) if inside else str(root), split, options)


@pytest.fixture
def without_network(monkeypatch, tmp_path):
    """The package `datasets` without its hub; a stand-in where it is not installed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if importlib.util.find_spec("datasets") is None:
        package = small_datasets.package(fixtures.hugging_face_rows())
        monkeypatch.setitem(sys.modules, "datasets", package)


@pytest.mark.usefixtures("without_network")
@pytest.mark.parametrize("case", CASES)
def test_a_reader_is_prepared_inspected_and_trained_on(case, tmp_path, trainers):
    source = source_of(case, tmp_path)
    originals = mixture.read(case, source, "")
    split = prepared(source, tmp_path / "out")
    assert (split["records"], split["rejected"]) == (len(originals), 0), split["reasons"]
    trainer = trainers(CASES[case][-1])
    ready = Source("prepared", str(tmp_path / "out"), source.split)
    data = dataclasses.replace(trainer.stage.data, sources={"one": ready})
    found = audit(dataclasses.replace(trainer.stage, data=data), samples=4)
    assert found.sources["one"].silent == 0 and not found.counts.skipped
    back = mixture.read(case, ready, "")
    keys = {(one.key, one.answer) for one in back}
    assert keys == {(one.key, one.answer) for one in originals}
    batches, before = Pipeline(data).iterate(), trainer.trained()
    losses = [trainer.step(next(batches)[0]) for _ in range(2)]
    assert np.isfinite(losses).all()
    after = trainer.trained()
    moved = {path for path in after if not np.array_equal(before[path], after[path])}
    for medium in {"speech" if name == "cif" else name for name, _ in originals[0].media}:
        assert any(path.startswith(f"{medium}_") for path in moved), medium


def test_a_prepared_set_takes_the_place_of_a_source_of_its_kind_only(tmp_path):
    fixtures.visual_genome(tmp_path)
    prepared(Source("visual_genome", str(tmp_path)), tmp_path / "out")
    out = str(tmp_path / "out")
    found = mixture.read("a", Source("prepared", out, "train", {"kind": "regions"}), "")
    assert len(found) == fixtures.COUNT
    with pytest.raises(UserError, match="of the kind 'regions', not 'questions'"):
        mixture.read("a", Source("prepared", out, "train", {"kind": "questions"}), "")


def test_features_of_the_reference_repository_are_prepared(tmp_path):
    """Shards keep them as they are."""
    fixtures.reference(tmp_path)
    options = {"features": f"{tmp_path}/features", "images": f"{tmp_path}/images"}
    source = Source("reference", str(tmp_path / "vsd.json"), "train", options)
    assert prepared(source, tmp_path / "out")["records"] == fixtures.COUNT
    back = mixture.read("a", Source("prepared", str(tmp_path / "out")), "")
    assert [name for name, _ in back[0].media] == ["image", "cif"]
    assert back[0].history == (("有吗？", "有"),)
    expected = np.load(tmp_path / "features/1.npy")
    np.testing.assert_array_equal(cif_features.load(back[0].media[1][1]), expected)
    assert paths.read(back[0].media[0][1]) == fixtures.picture()
    assert json.loads((tmp_path / "out/manifest.json").read_text("utf-8"))["name"] == "set"
