"""Held-out data: measured alike each time, by tokens, and without a trace in the training."""

from __future__ import annotations

import dataclasses
import importlib
import json
import types

import host_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
import small_speech
import small_stage
from test_configs import NAMES

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import hosts, mesh, rules, watchdog
from xllm_jax.core.batch import ImageTextPairs
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Best, Source, Validation
from xllm_jax.core.stage_record import parse_stage
from xllm_jax.data import mixture
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.record import DoesNotFit
from xllm_jax.data.synthetic_world import clip_vocabulary
from xllm_jax.evaluation.error_rate import character_errors, rate
from xllm_jax.inference import transcriber
from xllm_jax.inference.load_run import Restored
from xllm_jax.objectives import blip2_pretraining
from xllm_jax.training import loop, validation
from xllm_jax.training.trainer import Trainer, stage_loss

EXAMPLES, EVERY = 21, 2  # three batches, the last one of few examples


def measured(**changes):
    """A small stage with held-out text."""
    source = Source("world_text", split="val", options={"count": 50})
    return host_runs.stage(validation=Validation({"text": source}, {}, EXAMPLES, EVERY), **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with the runs `plain`, and `measured`, which stopped behind step 3 and went on."""
    folder = tmp_path_factory.mktemp("validation")
    loop.fit(host_runs.stage(), folder / "plain")
    made = measured(keep=1, best=Best("validation/loss", lowest=False))
    loop.fit(made, folder / "measured", stop_after=3)
    loop.fit(made, folder / "measured")
    return folder


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def trained_parameters(workdir):
    made = host_runs.stage(init={"llm": str(workdir)})
    return parameters.parameters(System.build(made, mesh.make({})))


def test_training_is_the_same_with_and_without(runs):
    assert small_stage.curve(runs / "measured") == small_stage.curve(runs / "plain")
    one, two = (rules.flatten(trained_parameters(runs / name)) for name in ("plain", "measured"))
    assert all(np.array_equal(one[path], two[path]) for path in one)


def test_a_resumed_run_measures_at_the_same_steps(runs):
    found = {line["step"]: line for line in lines(runs / "measured") if "validation/loss" in line}
    assert list(found) == [2, 4, 6]
    assert len({line["validation/count"] for line in found.values()}) == 1
    assert len({line["validation/loss"] for line in found.values()}) == 3
    assert not any("validation" in name for line in lines(runs / "plain") for name in line)


def test_the_mean_is_over_tokens(runs):
    """Against other batches of the same examples, added up in float64."""
    made = measured()
    data = dataclasses.replace(made.data, sources=made.validation.sources, examples=4)
    batches = list(Pipeline(data, train=False, sample=EXAMPLES).iterate())
    assert [info["examples"] for _, info in batches] == [4, 4, 4, 4, 4, 1]
    params = trained_parameters(runs / "measured")
    loss = stage_loss(System.build(made), False)
    found = [jax.jit(lambda p, b: loss(p, b, None)[1])(params, batch) for batch, _ in batches]
    counts, means = (np.array([f[n] for f in found], np.float64) for n in ("count", "loss"))
    last = lines(runs / "measured")[-1]
    assert last["validation/count"] == counts.sum()
    np.testing.assert_allclose(last["validation/loss"], (counts * means).sum() / counts.sum(), 1e-6)
    assert abs(means.mean() / last["validation/loss"] - 1) > 1e-5, "batches differ in their tokens"


def test_the_best_checkpoint_follows_the_measurement(runs):
    """The highest loss is the one before the restart."""
    found = {
        r["step"]: r["validation/loss"] for r in lines(runs / "measured") if r["step"] % 2 == 0
    }
    kept = {int(folder.name) for folder in (runs / "measured" / "checkpoints").iterdir()}
    assert max(found, key=found.get) == 2 and kept == {2, 6}


def test_character_errors_are_those_of_the_recognizer(tmp_path, monkeypatch):
    """Batches of two with one at the end, a file that is gone, two lengths: against the files one
    after another, and the losses against one batch of all."""
    stage, examples = small_speech.make(tmp_path)
    (tmp_path / "3.flac").unlink()
    monkeypatch.setattr(mixture, "read", lambda *_, **__: examples[:7])
    source = Source("list", split="val")
    stage.validation = Validation({"a": source}, examples=0, every=1, metrics=("cer",))
    system, said = System.build(stage, mesh.make({})), []
    watch = types.SimpleNamespace(
        reading=list,
        moved=lambda *words: said.append(words),
        compiles=lambda: said.append("compiles"),
    )
    state = Trainer(system).initial_state()
    params = rules.join(state.trainable, state.frozen)
    evaluation = validation.opened(system, state, tmp_path, watch)
    found, again = (evaluation.measure(state) for _ in range(2))
    evaluation.close()
    timeless = found.keys() - {"validation/seconds"}
    assert {name: found[name] for name in timeless} == {name: again[name] for name in timeless}
    assert said.count("compiles") == 1 and len(said) == 1 + 4 + 4
    assert "1 left out, the first " in evaluation.format_message(1, again)
    assert "3.flac" in (tmp_path / f"{validation.QUARANTINE}.jsonl").read_text()
    stage.data.examples, stage.data.frames = 8, stage.data.frames[-1:]
    stage.data.max_bad_share = 1.0
    batch, _ = next(Pipeline(stage.data, train=False, sample=0).iterate())
    _, whole = jax.jit(lambda p, b: stage_loss(system, False)(p, b, None))(params, batch)
    for name in ("loss", "ctc", "quantity", "cross_entropy", "accuracy", "count"):
        wanted = pytest.approx(float(whole[name]), rel=1e-5)
        assert found[f"validation/{name}"] == wanted, name
    left = [example for number, example in enumerate(examples[:7]) if number != 3]
    heard = transcriber.Transcriber(Restored(system.model, params, stage), 1).transcribe(left)
    errors = rate(character_errors(example.transcript, one) for example, one in zip(left, heard))
    assert any(heard) and found["validation/cer"] == pytest.approx(errors)
    assert found["validation/count"] == sum(len(example.transcript) + 1 for example in left)


def test_captions_add_up_over_batches_with_empty_rows():
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(6, 5, 9)), rng.integers(0, 9, (6, 5))
    mask = np.arange(5) < rng.integers(2, 6, (6, 1))
    weights = np.array([1, 1, 1, 1, 0, 0], np.float32)
    total = count = 0.0
    for rows in (slice(0, 3), slice(3, 6)):
        batch = ImageTextPairs(ids[rows], np.zeros((3, 1, 1, 3)), mask[rows], weights[rows])
        real = jnp.asarray(mask[rows] & (weights[rows] > 0)[:, None])
        mean, _ = blip2_pretraining.captioning(jnp.asarray(logits[rows]), ids[rows], real, 0.1)
        counts = blip2_pretraining.counts(batch, {})
        total, count = total + mean * counts["itg"], count + counts["itg"]
        assert counts["itc"] == counts["itm"] == counts["loss"] == weights[rows].sum()
    whole, _ = blip2_pretraining.captioning(
        jnp.asarray(logits[:4]), ids[:4], jnp.asarray(mask[:4]), 0.1
    )
    np.testing.assert_allclose(total / count, whole, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 5, 30, 500])
def test_a_sample_takes_each_record_once_and_spreads(count):
    sources = {"a": [small_speech.Example(f"a{i}") for i in range(40)], "b": [], "c": []}
    sources["b"] = [small_speech.Example(f"b{i}") for i in range(10)]
    del sources["c"]
    weights = {"a": None, "b": None} if count != 30 else {"a": 1.0, "b": 1.0}
    drawn = mixture.sample(sources, weights, count)
    assert drawn == mixture.sample(sources, weights, count)
    keys = [record.example.key for record in drawn]
    assert len(set(keys)) == len(keys)
    shares = {0: (40, 10), 5: (4, 1), 30: (15, 10), 500: (40, 10)}[count]
    assert tuple(sum(key[0] == name for key in keys) for name in "ab") == shares
    places = [record.index for record in drawn if record.source == "a"]
    assert np.ptp(np.diff(sorted(places))) <= 1 and {record.epoch for record in drawn} == {0}


def test_what_is_too_long_is_cut_as_in_training():
    data = dataclasses.replace(measured().data, length=24, answers=3)
    with pytest.raises(DoesNotFit):
        Pipeline(data, train=False)
    made = list(Pipeline(data, train=False, sample=0).iterate())
    assert sum(info["cut"] for _, info in made) > 0
    assert sum(info["examples"] for _, info in made) > 0


REFUSED = {
    "validation.sources: names nothing": {"sources": {}},
    "validation.every: is negative": {"every": -1},
    "validation.sources.text: is data.sources.text": {"sources": host_runs.stage().data.sources},
    "unknown metric 'wer'": {"metrics": ("wer",)},
    "validation.metrics: the run has no ": {"metrics": ("cer",)},
    "miss another": {"every": 3},
    "no held-out data is measured": {"every": 0},
}


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_contradict_each_other_are_refused(words, tmp_path):
    made = measured(best=Best("validation/loss"))
    made.validation = dataclasses.replace(made.validation, **REFUSED[words])
    with pytest.raises(UserError, match=words):
        validation.opened(System.build(made), None, tmp_path, None)


def test_an_unknown_metric_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"no metric 'validation/cer'.*validation/accuracy"):
        loop.fit(measured(best=Best("validation/cer")), tmp_path)
    assert lines(tmp_path) == []


def test_compiling_it_is_no_stall(tmp_path, monkeypatch):
    now, ended = [0.0], []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(hosts, "leave", ended.append)
    watch = watchdog.Watch(tmp_path, 10.0, None)
    watch.stepped()
    watch.compiles()
    watch.moved("measures held-out data")
    now[0] = 40.0
    watch._look()
    assert ended == []
    watch.stepped()
    watch._look()
    assert ended == [hosts.LOST]
    for end in (watch._ours, watch._theirs):
        end.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_runs.make_world(tmp_path_factory.mktemp("world"), 4)


@pytest.mark.parametrize("name", NAMES)
def test_the_miniatures_measure_the_validation_split(name, world, tmp_path):
    """Every batch can be read, and none of its files is trained on."""
    stage = importlib.import_module(f"xllm_jax.configs.{name}").get_config("tiny")
    backbones = small_runs.TOKENIZER.parent
    stage.data = dataclasses.replace(
        stage.data,
        root=str(world),
        tokenizer=stage.data.tokenizer and str(backbones / "llm"),
        characters=stage.data.characters and str(world / "characters.txt"),
        vocabulary=stage.data.vocabulary and str(backbones / "bert/vocab.txt"),
        caption_tokenizer=stage.data.caption_tokenizer
        and str(clip_vocabulary.write(tmp_path / "clip")),
    )
    assert parse_stage(dataclasses.asdict(stage)) == stage
    validation.check_settings(stage)
    made = list(validation.open_pipeline(stage, mesh.make({}), tmp_path).iterate())
    assert sum(info["supervised"] for _, info in made) > 0
    assert not any(info["skipped"] for _, info in made)
    sources = [dataclasses.replace(s, split="train") for s in stage.validation.sources.values()]
    trained = [example for s in sources for example in mixture.read("", s, str(world))]
    planned = [example for _, info in made for _, example in info["planned"]]
    files, others = ({file for e in found for file in e.media} for found in (planned, trained))
    assert not files & others
    if name.startswith("stage_output_"):  # whose pictures, if any, are no media of a prompt
        asked, known = ({example.key for example in found} for found in (planned, trained))
        assert asked and not asked & known
    else:
        assert files
