"""A fourth modality, a sensor's time series, without a change to the library: all it takes is here.

From its files to an answer: prepared, inspected, trained on for two steps, asked about.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec
from small_stage import GLM, TOKENIZER

from xllm_jax.assembly import networks
from xllm_jax.audit import audit, page
from xllm_jax.core import base_description, batch, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Optimizer, Part, Route, Source, Stage
from xllm_jax.data import mixture
from xllm_jax.data.batching import padding
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities, paths
from xllm_jax.data.media.decode_workers import Decoders
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.record import DoesNotFit, Record
from xllm_jax.data.rows import columns
from xllm_jax.inference.assistant import Assistant
from xllm_jax.inference.load_run import load_run
from xllm_jax.prepare import manifest, preparation, shard
from xllm_jax.report import page as report
from xllm_jax.training import loop

ROOT = Path(__file__).parents[1]
CHANNELS, STEPS, QUERIES, WIDTH = 2, 24, 3, 8


# The data file: a `.npy` of `[steps, 2]` numbers.


def read(path: str) -> np.ndarray:
    """One series, `[steps, 2]` float32.

    Raises:
      UserError: the file is missing, not `.npy`, or of another shape.
    """
    source = paths.source(path)
    try:
        with open(source, "rb") if isinstance(source, str) else source as file:
            values = np.lib.format.read_array(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as a series ({error})", field=str(path)) from error
    if values.ndim != 2 or values.shape[1] != CHANNELS:
        raise UserError(f"has the shape {values.shape}, not (steps, {CHANNELS})", field=str(path))
    return values.astype(np.float32)


def load(path: str, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    """One series in units of `data.options`, noisy in training where that says so."""
    values = read(path) / data.options["sensor"]["unit"]
    noise = data.options["sensor"].get("noise")
    return (values + rng.normal(0, noise, values.shape) if rng and noise else values)[None]


def shape(data: Data) -> tuple[int, ...]:
    return data.options["sensor"]["steps"], CHANNELS


SENSOR = Modality(
    load=load,
    read=read,
    shape=shape,
    fields=("options",),
    random=lambda data: ("data.options.sensor.noise",) if "noise" in data.options["sensor"] else (),
    bound="data.options.sensor.steps",
    view="plot",
    padding="lower data.options.sensor.steps",
)


# The network file: an encoder and an interface.


class SensorEncoder(nn.Module):
    """Every step by itself."""

    width: int = WIDTH
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, values, lengths, train=False):
        """`[N, steps, channels]` to `[N, steps, width]`; zero behind the series' end."""
        valid = jnp.arange(values.shape[1]) < lengths[:, None]
        x = nn.Dense(self.width, dtype=self.dtype, name="linear")(values)
        return x * valid[..., None], lengths

    def example(self):
        return jnp.zeros((1, STEPS, CHANNELS)), jnp.full(1, STEPS, jnp.int32)


class SensorInterface(nn.Module):
    """A perceptron with one hidden layer makes every third of the series one embedding."""

    queries: int = QUERIES
    hidden: int = 16
    llm_width: int = GLM["width"]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features, lengths, counts=None, train=False):
        """`[N, steps, width]` to `[N, queries, llm_width]`."""
        x = features.reshape(len(features), self.queries, -1)
        x = jax.nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        x = nn.Dense(self.llm_width, dtype=self.dtype, name="adapter")(x)
        return x, jnp.where(lengths > 0, self.queries, 0).astype(jnp.int32)

    def example(self):
        return jnp.zeros((1, STEPS, WIDTH)), jnp.full(1, STEPS, jnp.int32)


SIZES = {"tiny": {}}
SHARDING = ((r"(linear|hidden|adapter)/(kernel|bias)", PartitionSpec()),)


# The entry of the configuration.

PLACES = {"sensor": f"{__name__}:SENSOR"}


def stage(**changes) -> Stage:
    """Encoder and interface train, the LLM is frozen."""
    data = Data(
        tokenizer=str(TOKENIZER),
        modalities=PLACES,
        options={"sensor": {"steps": STEPS, "unit": 10.0}},
        items={"sensor": 2},
        embeddings={"sensor": QUERIES},
        examples=4,
        rows=2,
        length=96,
        answers=16,
        threads=1,
    )
    return Stage(
        name="sensor",
        parts={
            "sensor_encoder": Part(f"{__name__}:SensorEncoder", "tiny"),
            "sensor_interface": Part(f"{__name__}:SensorInterface", "tiny"),
            "llm": Part("glm.ChatGLM", "tiny", dict(GLM)),
        },
        modalities={"sensor": Route("sensor_encoder", "sensor_interface")},
        trainable=("sensor_.*",),
        optimizer=Optimizer(schedule="constant", peak=1e-2, weight_decay=0.0),
        data=dataclasses.replace(data, **changes),
        steps=2,
        save_every=2,
        log_every=1,
        compute="float32",
        frozen="float32",
    )


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Six series of different lengths, and questions about them in LLaVA's form."""
    folder = tmp_path_factory.mktemp("series")
    rng = np.random.default_rng(0)
    for number in range(6):
        np.save(folder / f"{number}.npy", rng.normal(0, 10, (12 + 2 * number, CHANNELS)))
    asked = [
        {
            "id": f"s{number}",
            "sensor": f"{number}.npy",
            "conversations": [
                {"from": "human", "value": "<sensor>有红色吗？"},
                {"from": "gpt", "value": "有" if number % 2 else "没有"},
            ],
        }
        for number in range(6)
    ]
    (folder / "train.json").write_text(json.dumps(asked), "utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(series):
    """The shards of the series."""
    source = Source("instructions", str(series), options={"modalities": PLACES})
    made = preparation.make("sensors", source, str(series / "out"), 4)
    found = made.examples()
    for number in made.shards.todo():
        shard.write(made, number, found)
    split = manifest.finish(made)["splits"]["train"]
    assert (split["records"], split["rejected"], made.modalities) == (6, 0, ("sensor",))
    return Source("prepared", str(series / "out"))


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """The folder of a run of two steps."""
    workdir = tmp_path_factory.mktemp("run")
    loop.fit(stage(sources={"one": prepared}), workdir)
    return workdir


def test_shards_hold_the_files_as_they_are(series, prepared):
    back = mixture.read("one", prepared, "")
    assert [name for one in back for name, _ in one.media] == ["sensor"] * 6
    for number, one in enumerate(back):
        assert paths.read(one.media[0][1]) == (series / f"{number}.npy").read_bytes()
    assert back[1].instruction == "有红色吗？" and back[1].task == "dialogue"


def test_a_broken_file_is_left_out_of_the_shards(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 3)))
    asked = {"id": "a", "sensor": "a.npy", "conversations": [
        {"from": "human", "value": "?"}, {"from": "gpt", "value": "有"}]}  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps([asked]), "utf-8")
    source = Source("instructions", str(tmp_path), options={"modalities": PLACES})
    made = preparation.make("broken", source, str(tmp_path / "out"), 4)
    (rejected,) = shard.write(made, 0, made.examples())["rejects"]
    assert "has the shape (5, 3)" in rejected["reason"]


def test_the_audit_draws_the_series(prepared):
    found = audit(stage(sources={"one": prepared}), samples=3)
    assert found.counts.tokens["one"]["sensor"] % QUERIES == 0 and not found.counts.skipped
    (medium,) = found.samples[0].media
    number = int(found.samples[0].key[1:])
    assert medium.values.shape == (12 + 2 * number, CHANNELS)  # as long as its file
    written = page.render(found)
    assert written.count("<polyline") == 3 * CHANNELS and f"sensor × {QUERIES}" in written
    assert found.counts.waste.hints["sensor"] == "lower data.options.sensor.steps"


def test_a_report_draws_the_file(series):
    assert modalities.named(PLACES)["sensor"] is SENSOR
    assert "sensor" in report.file("sensor", "/sensor.npy", {})  # of no known modality: named
    assert report.file("sensor", str(series / "0.npy"), PLACES).count("<polyline") == CHANNELS


def test_a_batch_holds_padded_series_and_their_lengths(prepared):
    data = stage(sources={"one": prepared}).data
    made, info = next(Pipeline(data).iterate())
    media = made.media["sensor"]
    assert media.values.shape == (2, 2, STEPS, CHANNELS)
    for row, segment, example in info["members"]:
        places = made.segments[row] == segment
        item = media.index[row][places].max() // QUERIES
        expected = read(example.media[0][1]) / 10
        count = media.lengths[row, item]
        np.testing.assert_array_equal(media.values[row, item, :count], expected)
        assert count == len(expected) and not media.values[row, item, count:].any()
    assert padding.hints(data)["image"] == padding.hints(Data())["image"]


def test_worker_processes_load_the_same(series):
    """They find the record where this process found it."""
    decoders = Decoders(stage(deadline=60.0).data)
    arguments = ("sensor", str(series / "1.npy"), stage().data, Record(Example("a")), 0, False)
    try:
        for mine, theirs in zip(modalities.load(*arguments), decoders.load(*arguments)):
            np.testing.assert_array_equal(mine, theirs)
    finally:
        decoders.close()


def test_encoder_and_interface_train(run):
    """Two steps moved both, and a row's loss reads the series."""
    about = base_description.base_about(run / "final")
    assert {path.split("/")[0] for path in about["shapes"]} == {
        "sensor_encoder", "sensor_interface"}  # fmt: skip
    restored = load_run(run)
    fresh = stage().parts["sensor_encoder"]
    assert fresh.network == restored.stage.parts["sensor_encoder"].network
    flat = rules.flatten(restored.params)
    assert np.abs(np.asarray(flat["sensor_interface/adapter/bias"])).max() > 0  # drawn as zeros
    assert np.abs(np.asarray(flat["sensor_encoder/linear/bias"])).max() > 0


def test_an_answer_reads_the_file(run, series):
    """By the assistant, and by the command in a process that knows the run's folder alone."""
    model = Assistant(load_run(run), max_tokens=4)
    first, last = str(series / "0.npy"), str(series / "5.npy")
    asked = [Example("q", (("sensor", path),), "有红色吗？") for path in (first, last)]
    answers = model.answers(asked)
    states = [model.encode([one]) for one in asked]
    one, two = (files["sensor", path].embeddings for files, path in zip(states, (first, last)))
    assert one.shape == (1, QUERIES, GLM["width"]) and not np.array_equal(one, two)
    command = [sys.executable, "-m", "xllm_jax.launch.generate", f"--checkpoint={run}"]
    command += [f"--media=sensor:{last}", "--prompt=有红色吗？", "--max_tokens=4"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = forked.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip("\n") == answers[1]


def test_the_chat_takes_the_file_by_its_name(series):
    """A task without an instruction of its own waits for a question."""
    from xllm_jax.launch import chat  # defines flags that launch/generate.py has, too

    seen, said = [], []
    known = modalities.named(PLACES)

    def answer(example: Example) -> str:
        seen.append(example)
        return "有"

    lines = [f"/sensor {series / '0.npy'}", "有红色吗？"]
    chat.converse(iter(lines), answer, said.append, 2, known)
    assert [one.media for one in seen] == [(("sensor", str(series / "0.npy")),)]
    assert said[-1] == "有" and len(said) == 2
    chat.converse(iter(lines[:1]), answer, said.append, 2)
    assert "unknown command" in said[-1] and len(seen) == 1


def test_rows_of_a_library_have_a_column_of_it():
    wanted = columns.Columns({"sensor": "waves"}, "said", places=PLACES)
    found = columns.example({"waves": "a.npy", "said": "有"}, wanted, "k", "row", 0)
    assert found.media == (("sensor", "a.npy"),) and found.task == "dialogue"
    with pytest.raises(UserError, match=r"unknown modality 'sensor'.*option 'modalities'"):
        columns.Columns({"sensor": "waves"}).present()


@pytest.mark.parametrize(
    "place, message",
    [
        ("no_such_package.sensor:SENSOR", "data.modalities.sensor: .*cannot be imported"),
        (f"{__name__}:NOTHING", "has no 'NOTHING'"),
        (f"{__name__}:STEPS", "is int, not a Modality"),
        (__name__, "has no ''.*'package.module:NAME'"),
    ],
)
def test_a_record_that_is_not_there_is_told(place, message):
    text = {"text": Source("world_text", options={"count": 4})}
    with pytest.raises(UserError, match=message):
        Pipeline(stage(modalities={"sensor": place}, sources=text).data)


@pytest.mark.parametrize(
    "network, message",
    [
        ("no_such_package.sensor:Encoder", "parts.sensor_encoder.network: .*cannot be imported"),
        (f"{__name__}:Encoder", "has no 'Encoder'"),
        (f"{__name__}:STEPS", "is no network"),
    ],
)
def test_a_network_that_is_not_there_is_told(network, message):
    made = stage()
    made.parts["sensor_encoder"].network = network
    with pytest.raises(UserError, match=message):
        networks.model(made)


def test_a_series_that_is_too_long_does_not_fit(tmp_path):
    np.save(tmp_path / "long.npy", np.zeros((STEPS + 1, CHANNELS)))
    data, record = stage().data, Record(Example("a"))
    with pytest.raises(DoesNotFit, match=r"25 frames, data\.options\.sensor\.steps holds 24"):
        modalities.load("sensor", str(tmp_path / "long.npy"), data, record, 0, False)


def test_zeros_of_the_batch_have_its_shape():
    """What initializes networks and compiles ahead of time."""
    data = stage().data
    shapes = {n: (count, modalities.find(n, data).shape(data)) for n, count in data.items.items()}
    assert batch.zeros(2, 8, 4, 2, shapes).media["sensor"].values.shape == (2, 2, STEPS, CHANNELS)
