"""The feature cache: the same losses, nothing else computed, and every change refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import forked
import jax
import ml_dtypes
import numpy as np
import pytest
import small_cache
import virtual_devices
from small_runs import make_world
from small_stage import ROOT, curve

from xllm_jax.assembly import networks, parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import base_description, checkpoint, checksum, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Validation
from xllm_jax.data import cached_features, mixture, pipeline
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.record import DoesNotFit, Record
from xllm_jax.feature_cache import cache_plan, check, describe, write
from xllm_jax.training import loop
from xllm_jax.training.trainer import Trainer, stage_loss

CONFIG = "configs/small.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world's folder."""
    return make_world(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def speech(world):
    """(stage 2 speech without its cache, the cache's folder)."""
    stage = small_cache.based(small_cache.stage2_speech(world), world.parent)
    return stage, written(stage, world.parent / "speech")


def written(stage, folder, **options):
    """The folder of a stage's finished cache, five media a shard."""
    made = cache_plan.make(stage, folder, CONFIG, 5, **options)
    assert write.run(made, 4) is not None
    return folder


def cached(stage, folder):
    """The stage that reads its cache."""
    return small_cache.changed(stage, cache=str(folder))


@pytest.fixture(scope="module")
def plain(speech):
    """(the stage with held-out speech, the folder of its run without a cache)."""
    assert speech[0].parts["speech_interface"].fields["dropout"] > 0
    # Held-out speech is no part of the cache: what it needs is loaded beside.
    sources = {"said": dataclasses.replace(speech[0].data.sources["utterances"], split="val")}
    stage = dataclasses.replace(speech[0], validation=Validation(sources, every=6))
    loop.fit(stage, speech[1].parent / "plain")
    return stage, speech[1].parent / "plain"


def test_a_run_continues_with_a_cache_as_if_without(speech, plain, tmp_path):
    """Losses under dropout, results and bases: from the second step on with the cache."""
    copy, speech, plain = tmp_path / "copy", (plain[0], speech[1]), plain[1]
    shutil.copytree(plain, copy)
    for later in ("4", "6"):
        shutil.rmtree(copy / "checkpoints" / later)
    shutil.rmtree(copy / "final")
    loop.fit(cached(*speech), copy)
    losses, others = curve(plain), curve(copy)
    assert list(losses) == list(others) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(others.values()), list(losses.values()), rtol=2e-6)
    held = [curve(run, "validation/loss/speech") for run in (plain, copy)]
    assert list(held[0]) == list(held[1]) == [6]
    np.testing.assert_allclose(held[1][6], held[0][6], rtol=2e-6)
    bases = [base_description.base_about(run / "final")["base"] for run in (plain, copy)]
    assert bases[0] == bases[1] and bases[0].keys() == speech[0].parts.keys()
    results = [load(run / "final") for run in (plain, copy)]
    assert results[0].keys() == results[1].keys()
    for path in results[0]:
        np.testing.assert_allclose(results[1][path], results[0][path], atol=2e-6)
        frozen = path.startswith("speech_interface/cif")
        assert not frozen or np.array_equal(results[1][path], results[0][path])


def load(folder):
    """{path: array} of a base."""
    stores = checkpoint.open_leaves(folder)
    return {path: np.asarray(store.read().result()) for path, store in stores.items()}


def test_what_is_cached_is_neither_loaded_nor_compiled(speech):
    shapes = {}
    for name, stage in (("plain", speech[0]), ("cached", cached(*speech))):
        trainer = Trainer(System.build(stage, mesh.make({})))
        state = trainer.abstract_state
        shapes[name] = rules.flatten(rules.join(state.trainable, state.frozen))
        batch, _ = next(pipeline.Pipeline(stage.data).iterate())
        text = trainer.step.lower(state, batch).as_text()
        assert ("speech_encoder" in text) == (name == "plain")
        assert ("416x80" in text) == (name == "plain")  # the filterbanks
    gone = shapes["plain"].keys() - shapes["cached"].keys()
    assert {path.split("/")[0] for path in gone} == {"speech_encoder", "speech_interface"}
    assert all(path.startswith(("speech_encoder/", "speech_interface/cif/")) for path in gone)
    assert not any("cif" in path or "speech_encoder" in path for path in shapes["cached"])


def test_files_of_features_give_the_losses_of_their_sounds(speech, plain, tmp_path, monkeypatch):
    """What our own encoder and CIF make, saved as `.npy`: a cache's batches, and the same run."""
    made = small_cache.changed(speech[0], speech_features="cif", speech_width=16)
    sources = as_files(speech[0], speech[1], tmp_path)
    kept = pipeline.Pipeline(cached(*speech).data).iterate()
    monkeypatch.setattr(mixture, "read", lambda name, source, root, **_: sources[name])
    given = pipeline.Pipeline(made.data).iterate()
    for _ in range(6):
        jax.tree.map(np.testing.assert_array_equal, next(kept)[0], next(given)[0])
    loop.fit(dataclasses.replace(made, save_every=6), tmp_path / "run")
    losses, others = curve(plain[1]), curve(tmp_path / "run")
    assert list(losses) == list(others) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(others.values()), list(losses.values()), rtol=2e-6)
    results = [load(folder / "final") for folder in (plain[1], tmp_path / "run")]
    assert results[0].keys() == results[1].keys()  # CIF is beside where `init` has it
    for path in results[1]:
        np.testing.assert_allclose(results[1][path], results[0][path], atol=2e-6)


def as_files(stage, folder, output):
    """{source: its examples, with a cache's features as `.npy` instead of sounds}."""
    load = cached_features.Features(folder).loader(None)
    found = {}
    for name in stage.data.sources:
        found[name] = []
        for number, example in enumerate(
            mixture.read(name, stage.data.sources[name], stage.data.root)
        ):
            ((_, path),) = example.media
            values, lengths = load("speech", path, stage.data, Record(example, name), 0, True)
            file = output / f"{name}{number}.npy"
            np.save(file, values[0, : lengths[0]])
            found[name].append(dataclasses.replace(example, media=(("cif", str(file)),)))
    return found


def test_stage_three_reads_everything_below_its_adapters(world, tmp_path):
    """Three modalities, packed rows, videos of several frames: losses and gradients are equal."""
    stage = small_cache.based(small_cache.stage3(world), tmp_path)
    folder = written(stage, tmp_path / "cache")
    about = cached_features.manifest(folder)["modalities"]
    assert {name: (kind["steps"], kind["through"]) for name, kind in about.items()} == {
        "image": (2, "image_interface/qformer"),
        "video": (2, "video_interface/qformer"),
        "speech": (3, "speech_interface/c_former"),
    }
    found = []
    for made in (stage, cached(stage, folder)):
        system = System.build(made, mesh.make({}))
        check.verified(system)
        params = parameters.parameters(system)
        trainable, frozen = rules.split(made.trainable, params)
        loss = stage_loss(system)
        call = jax.jit(
            jax.value_and_grad(lambda t, f, b, loss=loss: loss(rules.join(t, f), b, None)[0])
        )
        batches = pipeline.Pipeline(made.data).iterate()
        found.append([call(trainable, frozen, next(batches)[0]) for _ in range(3)])
        parts = {path.split("/")[0] for path in rules.flatten(params)}
        assert ("vision_encoder" in parts) == (made is stage)
    for one, other in zip(*found):
        np.testing.assert_allclose(other[0], one[0], rtol=2e-6)
        gradients = [rules.flatten(gradient) for _, gradient in (one, other)]
        for path in gradients[0]:
            top = np.abs(gradients[0][path]).max()
            np.testing.assert_allclose(gradients[1][path], gradients[0][path], atol=1e-5 * top)
    assert all(np.abs(leaf).max() > 0 for leaf in gradients[0].values())


def refusal(stage):
    """What the check of a stage's cache says."""
    with pytest.raises(UserError) as caught:
        check.verified(System.build(stage, mesh.make({})))
    assert f"--config={CONFIG} --output={stage.data.cache} --again" in str(caught.value)
    return f"{caught.value.field}: {caught.value.what}"


def test_a_changed_setting_is_named(speech):
    stage = cached(*speech)
    assert check.verified(System.build(stage, mesh.make({})))
    told = refusal(small_cache.changed(stage, frames=(408,)))
    assert told == "data.frames: was [416] when the cache was written and is [408] now"
    told = refusal(small_cache.changed(stage, speech={"specaugment": True}))
    assert told.startswith("data.speech.specaugment: was not set when")
    fields = stage.parts["speech_encoder"].fields | {"kernel": 5}
    encoder = dataclasses.replace(stage.parts["speech_encoder"], fields=fields)
    parts = stage.parts | {"speech_encoder": encoder}
    told = refusal(dataclasses.replace(stage, parts=parts))
    assert told.startswith("parts.speech_encoder.fields.kernel: was 3")
    assert refusal(dataclasses.replace(stage, frozen="bfloat16")).startswith(
        "frozen: was 'float32'"
    )
    told = refusal(dataclasses.replace(stage, trainable=(r"speech_interface/.*",)))
    assert told.startswith("trainable: speech_interface/cif trains, and the cache holds its")


def test_a_changed_source_or_shard_is_named(speech, tmp_path):
    stage, folder = speech
    copy = shutil.copytree(folder, tmp_path / "copy")
    changed = dict(stage.data.sources)
    changed["utterances"] = dataclasses.replace(changed["utterances"], split="test")
    told = refusal(small_cache.changed(cached(stage, copy), sources=changed))
    assert told.startswith("data.sources.utterances: its ")
    fewer = {"utterances": stage.data.sources["utterances"]}
    stage = cached(stage, copy)
    subset = small_cache.changed(stage, sources=fewer)
    assert check.verified(System.build(subset, mesh.make({})))
    shard = copy / cached_features.shard_name("speech", 1, 3)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refusal(stage).startswith(f"{shard}: is missing or has not the ")
    shutil.rmtree(copy)
    with pytest.raises(UserError, match=r"data\.cache: no finished cache in .*xllm cache"):
        networks.model(stage)


def test_a_changed_weight_is_named(speech, tmp_path):
    stage = cached(*speech)
    params = rules.unflatten(load(stage.init["speech_encoder"]))
    kernel = params["speech_interface"]["cif"]["weight"]["kernel"]
    params["speech_interface"]["cif"]["weight"]["kernel"] = np.nextafter(kernel, 9)
    checkpoint.save_base(tmp_path / "other", params, {})
    init = stage.init | {"speech_interface": str(tmp_path / "other")}
    told = refusal(dataclasses.replace(stage, init=init))
    assert told.startswith("init.speech_interface: another speech_interface than the cache")
    assert "speech_interface/cif/weight/kernel" in told
    above = stage.init | {"speech_interface/c_former": str(tmp_path / "other")}
    allowed = dataclasses.replace(stage, init=above)
    assert check.verified(System.build(allowed, mesh.make({})))


def test_checksums_on_disk_are_those_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(checksum, "BLOCK", 28)  # bytes
    rng = np.random.default_rng(0)
    tree = {"b": rng.normal(size=(5, 3, 2)), "a": rng.normal(size=11), "c": rng.normal(size=())}
    tree = {"part": {name: np.asarray(leaf, np.float32) for name, leaf in tree.items()}}
    checkpoint.save_base(tmp_path / "base", tree, {})
    stores = checkpoint.open_leaves(tmp_path / "base")
    for dtype in (np.float32, ml_dtypes.bfloat16):
        kept = jax.tree.map(lambda leaf: leaf.astype(dtype), tree)  # noqa: B023
        wanted = checksum.of_tree(kept)
        assert {p: checksum.of_store(s, dtype) for p, s in stores.items()} == wanted
    swapped = {"part": tree["part"] | {"a": tree["part"]["a"][::-1]}}
    assert checksum.identity(swapped) != checksum.identity(tree)
    assert check.base({}, checksum.of_tree(tree)) == {"part": checksum.identity(tree["part"])}


@pytest.fixture
def arithmetic(monkeypatch):
    """Replaces the networks by arithmetic, so that nothing is compiled."""
    monkeypatch.setattr(write, "computation", small_cache.arithmetic)
    monkeypatch.setattr(write, "computing", lambda made, device_mesh: {})


def test_hosts_share_the_work_and_a_killed_one_continues(tmp_path, arithmetic):
    stage = small_cache.pictures(small_cache.draw(tmp_path / "pictures", 12))
    whole = small_cache.contents(written(stage, tmp_path / "whole"))
    assert len(whole) == 5  # three shards, the table, the description
    made = cache_plan.make(stage, tmp_path / "shared", CONFIG, 5)
    assert write.run(made, 4, host=1, count=2) is None
    assert write.run(made, 3, host=0, count=2) is not None
    assert small_cache.contents(tmp_path / "shared") == whole
    shards = made.shards(made.jobs[0])
    shards.note(1).unlink()  # killed between shard and note
    shards.file(1).write_bytes(b"half a shard")
    before = shards.file(0).stat().st_mtime_ns
    assert write.run(made, 4) is not None
    assert small_cache.contents(tmp_path / "shared") == whole
    assert shards.file(0).stat().st_mtime_ns == before


def test_all_devices_compute(tmp_path):
    """Two devices, whose batch is rounded up, write what one writes."""
    stage = small_cache.pictures(small_cache.draw(tmp_path / "pictures", 5))
    alone = cached_features.Features(written(stage, tmp_path / "alone"))
    code = f"""
import sys; sys.path[:0] = ['tests', '.']
import jax, small_cache
from pathlib import Path
from xllm_jax.feature_cache import cache_plan, write
made = cache_plan.make(small_cache.pictures(Path({str(tmp_path / "pictures")!r})),
                 {str(tmp_path / "both")!r}, '', 5)
write.run(made, 3)
print(len(jax.local_devices()))
"""
    done = forked.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=virtual_devices.environment(2),
    )
    assert done.stdout.strip() == "2", done.stderr
    both = cached_features.Features(tmp_path / "both")
    load = alone.loader(modalities.load), both.loader(modalities.load)
    for number in range(5):
        path = str(tmp_path / "pictures" / f"{number:02d}.png")
        record = Record(Example("a", (("image", path),)))
        one, other = (call("image", path, stage.data, record, 0, True) for call in load)
        assert one[0].shape == (1, 5, 16) and np.abs(one[0]).max() > 0.1
        np.testing.assert_allclose(other[0], one[0], atol=1e-5)


def test_another_cache_in_the_folder_is_refused_in_words(tmp_path, arithmetic):
    stage = small_cache.pictures(small_cache.draw(tmp_path / "pictures", 3))
    folder = written(stage, tmp_path / "cache")
    smaller = cache_plan.make(small_cache.changed(stage, image={"size": 16}), folder, CONFIG, 5)
    with pytest.raises(UserError, match=r"data\.image\.size was 32 when .* is 16 now.*--again"):
        write.run(smaller, 4)
    assert write.run(smaller, 4, again=True) is not None
    assert (
        cached_features.manifest(folder)["modalities"]["image"]["fields"]["data.image.size"] == 16
    )


def test_shared_media_are_kept_once(tmp_path, monkeypatch):
    small_cache.draw(tmp_path / "pictures", 2)
    paths = [str(tmp_path / "pictures" / f"{n:02d}.png") for n in range(2)]
    rows = [Example(f"e{n}", (("image", paths[n % 2]),), "问", "答") for n in range(6)]
    monkeypatch.setattr(mixture, "read", lambda name, source, root, **_: rows)
    made = cache_plan.make(small_cache.pictures(tmp_path), tmp_path / "cache", CONFIG, 5)
    assert [cache_plan.FeatureCachePlan.medium(made, made.jobs[0], n)[0] for n in range(2)] == paths
    assert len(made.jobs[0].places) == 2 and "2 media" in cache_plan.summary(made)
    with pytest.raises(UserError, match=r"--most_gib: the cache may take .* --most_gib=1 writes"):
        cache_plan.check_capacity(made, 1e-9)


def test_random_augmentation_is_refused_by_its_field(tmp_path, world):
    folder = small_cache.draw(tmp_path / "pictures", 1)
    for options in ({"size": 32, "flip": True}, {"size": 32, "scale": (0.5, 1.0)}):
        stage = small_cache.pictures(folder, image=options)
        with pytest.raises(UserError) as caught:
            cache_plan.make(stage, tmp_path / "cache", CONFIG, 5)
        assert caught.value.field == f"data.image.{list(options)[1]}"
    stage = small_cache.changed(small_cache.stage3(world), speech={"specaugment": True})
    model = networks.model(stage)
    with pytest.raises(UserError, match=r"data\.speech\.specaugment.*--modality=image,video"):
        describe.depths(stage, model)
    assert describe.depths(stage, model, ["image"]) == {"image": 2}
    stage = dataclasses.replace(stage, trainable=(r"speech_.*",))
    with pytest.raises(UserError, match="nothing frozen for 'speech'"):
        describe.depths(stage, networks.model(stage), ["speech"])


UNSAID = dataclasses.replace(modalities.MODALITIES["image"], random=lambda _: ())


def test_a_loader_that_draws_without_saying_so_is_found_out(tmp_path, arithmetic):
    stage = small_cache.pictures(
        small_cache.draw(tmp_path / "pictures", 1), image={"size": 32, "flip": True}
    )
    stage.data.modalities = {"image": f"{__name__}:UNSAID"}
    made = cache_plan.make(stage, tmp_path / "cache", CONFIG, 5)
    with pytest.raises(UserError, match="loaded differently in every epoch"):
        write.run(made, 4)


def test_bad_media_are_quarantined_as_without_a_cache(tmp_path, arithmetic):
    folder = small_cache.draw(tmp_path / "pictures", 6)
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:200])
    stage = small_cache.pictures(folder, max_bad_share=0.5, examples=4)
    made = written(stage, tmp_path / "cache")
    lines = (made / "quarantine.jsonl").read_text().splitlines()
    (listed,) = map(json.loads, lines)
    kinds = cached_features.manifest(made)["modalities"]["image"]
    assert kinds["rejected"] == 1 and list(kinds["reasons"]) == [listed["reason"]]
    found = []
    for data in (stage.data, cached(stage, made).data):
        batches = pipeline.Pipeline(data, quarantine=tmp_path / "q.jsonl").iterate()
        infos = [next(batches)[1] for _ in range(6)]
        found.append([(info["keys"], info["skipped"], info["bad"]) for info in infos])
    assert found[0] == found[1] and found[0][-1][-1] > 0
    assert listed["file"] == str(folder / "03.png")
    strict = small_cache.changed(stage, max_bad_share=0.1)
    with pytest.raises(
        UserError, match=r"1 of 6 records could not be read, the last one .*03\.png"
    ):
        write.run(cache_plan.make(strict, tmp_path / "strict", CONFIG, 9), 4)


def test_a_continued_cache_lists_the_bad_media_of_all_its_starts(tmp_path, arithmetic):
    """Its list of bad media is that of an uninterrupted one, byte for byte."""
    folder = small_cache.draw(tmp_path / "pictures", 6)
    for name in ("00.png", "03.png", "05.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    stage = small_cache.pictures(folder, max_bad_share=0.6, examples=4)
    made = cache_plan.make(stage, tmp_path / "cache", CONFIG, 2)
    write.run(made, 4)
    whole = (tmp_path / "cache" / "quarantine.jsonl").read_bytes()
    assert whole.count(b"\n") == 3
    shards = made.shards(made.jobs[0])
    for lost in ([2], [1, 2], []):
        for shard in lost:
            shards.note(shard).unlink()
        write.run(made, 4)
        assert (tmp_path / "cache" / "quarantine.jsonl").read_bytes() == whole, lost


def test_a_new_modality_needs_nothing_here(tmp_path, arithmetic, monkeypatch):
    """A modality of the tests' own: a record, and parts of the model."""
    small_cache.draw(tmp_path / "pictures", 3)
    rows = [
        Example(f"e{n}", (("depth", str(tmp_path / "pictures" / f"{n:02d}.png")),), "问", "答")
        for n in range(3)
    ]
    monkeypatch.setattr(mixture, "read", lambda name, source, root, **_: rows)
    stage = small_cache.pictures(tmp_path, items={"depth": 1}, embeddings={"depth": 4})
    stage.modalities = {"depth": stage.modalities["image"]}
    stage.data.modalities = {"depth": "xllm_jax.data.media.image:MODALITY"}
    folder = written(stage, tmp_path / "cache")
    (kind,) = cached_features.manifest(folder)["modalities"].items()
    assert kind[0] == "depth" and kind[1]["through"] == "vision_encoder"
    batch, _ = next(pipeline.Pipeline(cached(stage, folder).data).iterate())
    assert batch.media["depth"].values.shape == (4, 1, 5, 16)  # 2 x 2 patches and the class token
    assert np.abs(batch.media["depth"].values[:3]).max() > 0


def test_records_keep_every_bit():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        values = rng.normal(size=(2, 6, 3)).astype(dtype)
        values[:, 4:] = 0
        lengths = np.array([3, 4], np.int32)
        content = cached_features.packed(values, lengths)
        assert len(content) == cached_features.HEAD.size + 8 + values[:, :4].nbytes
        back = cached_features.unpacked(content, (6, 3), np.dtype(dtype))
        np.testing.assert_array_equal(back[0].view(np.uint8), values.view(np.uint8))
        np.testing.assert_array_equal(back[1], lengths)
    empty = cached_features.unpacked(
        cached_features.packed(values * 0, lengths), (6, 3), values.dtype
    )
    assert not empty[0].any()
    for kind in (UserError, DoesNotFit):
        error = kind("is odd", field="a\udc80.wav", hint="Look")
        with pytest.raises(kind) as caught:
            cached_features.unpacked(cached_features.rejected(error), (1,), np.dtype("f4"))
        told = caught.value
        assert (type(told), str(told), told.field) == (kind, str(error), error.field)


def test_spoken_media_are_known_by_their_length_too(world):
    data = small_cache.stage2_speech(world).data
    record = Record(Example("a", transcript="红色的圆"))
    count = cached_features.wanted("speech", record, data)
    assert 0 < count <= 24 and cached_features.wanted("image", record, data) == 0
    path = f"{world}/aishell/a.wav"
    known = cached_features.digest("speech", path, count, str(world))
    assert known == cached_features.digest("speech", "/moved/aishell/a.wav", count, "/moved")
    assert known != cached_features.digest("speech", path, count + 1, str(world))
