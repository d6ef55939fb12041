"""The pipeline's promises: every example once, the same batches on any number of hosts, exact
resuming, the mixture that was asked for, bad files told and counted."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import soundfile
from jax import tree
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.data import mixture
from xllm_jax.data.batching import packing
from xllm_jax.data.example import Example
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.record import Mode, Record, Skipped
from xllm_jax.data.text.characters import CharacterVocabulary

SIZE = 32
SAID = ("红色的圆", "蓝色的方块在左边", "有几个物体", "对", "图中有一个很大的绿色三角形吗")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures and utterances, and one broken file of each."""
    path = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    for number in range(6):
        pixels = random.integers(0, 255, (40, 48, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
        sound = random.normal(size=4000 + 4000 * number).astype(np.float32) * 0.1
        soundfile.write(path / f"{number}.flac", sound, 16000)
    (path / "broken.png").write_bytes(b"not an image")
    (path / "broken.flac").write_bytes(b"not a sound")
    return path


@pytest.fixture
def pipeline(golden, folder, monkeypatch):
    """Makes pipelines over lists of examples, {source: examples}."""
    CharacterVocabulary.build(SAID).save(folder / "characters.txt")

    def make(sources, process=(0, 1), seed=3, train=True, quarantine=None, **fields):
        data = Data(
            sources={name: Source("list") for name in sources},
            template="chatglm_zh",
            tokenizer=str(golden / "chatglm" / "tokenizer"),
            characters=str(folder / "characters.txt"),
            vocabulary=str(golden / "vision" / "weights" / "bert-base-uncased"),
            **(SHAPES | fields),
        )
        monkeypatch.setattr(mixture, "read", lambda name, source, root, **_: sources[name])
        return Pipeline(data, seed, *process, train, quarantine)

    return make


SHAPES = {
    "examples": 8,
    "rows": 4,
    "length": 192,
    "answers": 64,
    "items": {"image": 2, "speech": 1},
    "embeddings": {"image": 3, "speech": 24},
    "frames": (200,),
    "characters_length": 24,
    "text_length": 12,
    "image": {"size": SIZE},
    "threads": 2,
}


def texts(count, name="t", task="vqa"):
    return [
        Example(f"{name}{i}", (), f"{i} 加 1 是几？" + "好" * (i % 5), str(i + 1), task)
        for i in range(count)
    ]


def mixed(folder, count):
    """Text, pictures, speech, and pictures with speech, in turn."""
    found = []
    for i in range(count):
        image = (("image", str(folder / f"{i % 6}.png")),)
        speech = (("speech", str(folder / f"{i % 6}.flac")),)
        media = ((), image, speech, image + speech)[i % 4]
        said = SAID[i % len(SAID)]
        found.append(Example(f"m{i}", media, "是什么？", said, "vqa", transcript=said))
    return found


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(one, other):
    assert tree.structure(one) == tree.structure(other)
    for a, b in zip(tree.leaves(one), tree.leaves(other)):
        np.testing.assert_array_equal(a, b)


def records(examples):
    return [Record(example, "s", 0, i, 0) for i, example in enumerate(examples)]


# Packing


def test_every_example_stands_in_one_row_once_and_apart(pipeline, folder):
    made = pipeline({"a": mixed(folder, 24)}, items={"image": 3, "speech": 2})
    plan = made.format.plan(records(mixed(folder, 12)), Mode())
    batch, unread = made.format.fill(plan, slice(None), Mode())
    assert not unread and not plan.skipped
    members = plan.members(slice(None))
    assert Counter(r.example.key for _, _, r in members) == Counter(f"m{i}" for i in range(12))
    for row, segment, record in members:
        check_segment(batch, row, segment, record, made)
    assert (batch.segments > 0).sum() == sum(
        len(placed.prompt.ids) for row in plan.rows for placed in row
    )


def check_segment(batch, row, segment, record, made):
    """What stands in a packed row is the example's own prompt, moved."""
    alone = made.format.sequence(record, Mode())
    places = np.flatnonzero(batch.segments[row] == segment)
    start = places[0]
    np.testing.assert_array_equal(places, start + np.arange(len(alone.ids)))
    np.testing.assert_array_equal(batch.ids[row, places], alone.ids)
    np.testing.assert_array_equal(batch.positions[row, places], alone.positions)
    np.testing.assert_array_equal(batch.context[row, places], alone.context)
    inside = (batch.weights[row] > 0) & np.isin(batch.answer_index[row], places)
    np.testing.assert_array_equal(batch.answer_index[row, inside] - start, alone.answer_index)
    np.testing.assert_array_equal(batch.targets[row, inside], alone.targets)
    for name, index in alone.index.items():
        moved = batch.media[name].index[row, places]
        np.testing.assert_array_equal(moved >= 0, index >= 0)
        (shift,) = set(moved[moved >= 0] - index[index >= 0])
        item, rest = divmod(int(shift), made.data.embeddings[name])
        assert rest == 0 and batch.media[name].lengths[row, item] > 0
        assert batch.media[name].counts[row, item] == alone.slots[-1].size or name == "image"


def test_slots_of_different_examples_never_share_an_embedding(pipeline, folder):
    made = pipeline({"a": mixed(folder, 24)}, items={"image": 3, "speech": 2})
    batch, _ = next(made.iterate())
    for entry in batch.media.values():
        for row in entry.index:
            assert len(set(row[row >= 0])) == (row >= 0).sum()


def test_first_fit_is_in_order_and_respects_every_limit():
    needs = [{"tokens": 6}, {"tokens": 5}, {"tokens": 4, "image": 1}, {"tokens": 1, "image": 1}]
    capacity = {"tokens": 10, "image": 1}
    assert packing.first_fit(needs, capacity, 2) == [0, 1, 0, 1]
    assert packing.first_fit([{"tokens": 11}, {"video": 1}], capacity, 2) == [None, None]


def test_packing_keeps_rows_even_when_items_are_scarce():
    needs = [{"tokens": tokens, "image": 1} for tokens in (6, 6, 4, 4)]
    capacity = {"tokens": 10, "image": 2}
    assert packing.first_fit(needs, capacity, 2) == [0, 1, 0, 1]
    assert packing.first_fit(needs[::-1], capacity, 2) == [0, 0, 1, None]
    assert None not in packing.pack(needs[::-1], capacity, 2)


def test_an_example_without_room_is_told_and_shapes_stay(pipeline, folder):
    long = Example("long", (("image", str(folder / "0.png")),) * 3, "看", "好")
    made = pipeline({"a": texts(7) + [long]})
    batch, info = next(made.iterate())
    assert batch.ids.shape == (4, 192) and batch.media["image"].values.shape == (4, 2, 32, 32, 3)
    (skipped,) = info["skipped"]
    assert skipped.key == "long" and "no room" in skipped.reason and not skipped.bad
    assert info["bad"] == 0 and info["examples"] == 7


def test_absent_modalities_are_empty_slots(pipeline):
    batch, _ = next(pipeline({"a": texts(8)}).iterate())
    for entry in batch.media.values():
        assert (entry.index == -1).all() and not entry.lengths.any() and not entry.values.any()


# Order


@pytest.mark.parametrize("name", ["conversation", "transcription", "image_text_pairs"])
def test_resuming_gives_the_same_batches(pipeline, folder, name):
    examples = [
        dataclasses.replace(e, media=(("image", str(folder / "1.png")),))
        if name == "image_text_pairs"
        else dataclasses.replace(e, media=(("speech", str(folder / f"{i % 6}.flac")),))
        for i, e in enumerate(mixed(folder, 20))
    ]
    fields = {
        "batch_format": name,
        "image": {"size": SIZE, "scale": (0.5, 1.0), "flip": True},
        "speech": {"specaugment": True},
    }
    batches = pipeline({"a": examples}, **fields).iterate()
    take(batches, 3)
    position = json.loads(json.dumps(batches.position()))
    expected = take(batches, 3)
    assert len(json.dumps(position)) < 200
    again = take(pipeline({"a": examples}, **fields).iterate(position), 3)
    for (one, info), (other, told) in zip(expected, again):
        assert_same(one, other)
        assert info == told
    other_seed, _ = next(pipeline({"a": examples}, seed=4, **fields).iterate(position))
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(tree.leaves(expected[0][0]), tree.leaves(other_seed))
    )


def test_threads_do_not_matter(pipeline, folder):
    one = take(pipeline({"a": mixed(folder, 20)}, threads=1).iterate(), 4)
    four = take(pipeline({"a": mixed(folder, 20)}, threads=4).iterate(), 4)
    for (a, _), (b, _) in zip(one, four):
        assert_same(a, b)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch(pipeline, folder, hosts):
    sources = {"a": mixed(folder, 20)}
    whole = take(pipeline(sources).iterate(), 3)
    parts = [take(pipeline(sources, (host, hosts)).iterate(), 3) for host in range(hosts)]
    for step, (batch, info) in enumerate(whole):
        joined = tree.map(lambda *x: np.concatenate(x), *[part[step][0] for part in parts])
        assert_same(batch, joined)
        keys = [key for part in parts for key in part[step][1]["keys"]]
        assert keys == info["keys"]
        assert {part[step][1]["examples"] for part in parts} == {info["examples"]}


@pytest.mark.parametrize("before, after", [(1, 4), (4, 2), (2, 1)])
def test_another_number_of_hosts_continues_the_same_batches(pipeline, folder, before, after):
    sources = {"a": mixed(folder, 20)}
    fields = {"image": {"size": SIZE, "scale": (0.5, 1.0), "flip": True}, "threads": 1}
    whole = take(pipeline(sources, **fields).iterate(), 4)
    old = pipeline(sources, (before - 1, before), **fields).iterate()
    take(old, 2)
    position = json.loads(json.dumps(old.position()))
    parts = [
        take(pipeline(sources, (host, after), **fields).iterate(position), 2)
        for host in range(after)
    ]
    for step, (batch, _) in enumerate(whole[2:]):
        assert_same(batch, tree.map(lambda *x: np.concatenate(x), *[p[step][0] for p in parts]))


def test_another_batch_size_continues_with_the_next_record(pipeline):
    sources = {"a": texts(30, "a"), "b": texts(50, "b")}
    old = pipeline(sources, rows=8, examples=8, mix={"a": 3.0, "b": 1.0})
    every = [k for _, info in take(old.iterate(), 8) for k in info["keys"]]
    batches = old.iterate()
    take(batches, 3)
    position = batches.position()
    new = pipeline(sources, rows=8, examples=4, mix={"a": 3.0, "b": 1.0})
    keys = [info["keys"] for _, info in take(new.iterate(position), 4)]
    assert [sorted(k) for k in keys] == [
        sorted(every[start : start + 4]) for start in range(24, 40, 4)
    ]
    odd = pipeline(sources, rows=8, examples=5, mix={"a": 3.0, "b": 1.0})
    with pytest.raises(UserError, match=r"data\.examples: cannot continue .* 8 examples .* with 5"):
        odd.iterate(position)


def test_buckets_keep_their_batch_size_at_resume(pipeline, folder):
    examples = [
        Example(f"{i}", (("speech", str(folder / f"{i % 6}.flac")),), transcript=SAID[0])
        for i in range(12)
    ]
    fields = {"batch_format": "transcription", "frames": (60, 200)}
    batches = pipeline({"a": examples}, examples=4, **fields).iterate()
    take(batches, 1)
    with pytest.raises(UserError, match="length buckets are on"):
        pipeline({"a": examples}, examples=2, **fields).iterate(batches.position())


def test_rows_must_divide_over_hosts(pipeline):
    with pytest.raises(UserError, match=r"data\.rows: 4 do not divide over 3 hosts"):
        pipeline({"a": texts(4)}, (0, 3))


def test_epochs_are_whole_and_shuffled_anew(pipeline):
    batches = pipeline({"a": texts(32)}, rows=8).iterate()
    epochs = [[k for _, info in take(batches, 4) for k in info["keys"]] for _ in range(2)]
    assert all(sorted(keys) == sorted(f"t{i}" for i in range(32)) for keys in epochs)
    assert epochs[0] != epochs[1]


def test_mixture_weights_are_honored(pipeline):
    sources = {"a": texts(30, "a"), "b": texts(50, "b"), "c": texts(9, "c")}
    batches = pipeline(sources, rows=8, mix={"a": 3.0, "b": 1.0, "c": 0}).iterate()
    keys = [key for _, info in take(batches, 20) for key in info["keys"]]
    assert Counter(key[0] for key in keys) == {"a": 120, "b": 40}
    batches = pipeline(sources, rows=8, mix={}).iterate()
    keys = [key for _, info in take(batches, 20) for key in info["keys"]]
    shares = Counter(key[0] for key in keys)
    assert all(abs(shares[n] - 160 * len(sources[n]) / 89) <= 1 for n in sources)


def test_a_mixture_names_its_sources(pipeline):
    with pytest.raises(UserError, match=r"data\.mix: 'b' is not in both"):
        pipeline({"a": texts(3), "b": texts(3)}, mix={"a": 1.0})
    with pytest.raises(UserError, match="no source takes part"):
        pipeline({"a": texts(3)}, mix={"a": 0.0})


# Evaluation


def test_evaluation_reads_every_example_once_in_order(pipeline, folder):
    examples = mixed(folder, 21)
    made = pipeline({"a": examples}, train=False)
    seen = list(made.iterate())
    assert len(seen) == len(made)
    keys = [example.key for _, info in seen for _, _, example in info["members"]]
    assert Counter(keys) == Counter(e.key for e in examples)
    assert len({tuple(x.shape for x in tree.leaves(batch)) for batch, _ in seen}) == 1


def test_evaluation_may_stop_early(pipeline):
    made = pipeline({"a": texts(40)}, train=False)
    few = Pipeline(made.data, 3, train=False, limit=5)
    assert [k for _, info in few.iterate() for k in info["keys"]] == [f"t{i}" for i in range(5)]


def test_evaluation_of_transcripts_pads_the_last_batch(pipeline, folder):
    examples = [e for e in mixed(folder, 20) if e.media and e.media[0][0] == "speech"]
    made = pipeline({"a": examples}, train=False, batch_format="transcription", examples=4)
    seen = list(made.iterate())
    assert [key for _, info in seen for key in info["keys"]] == [e.key for e in examples]
    last, _ = seen[-1]
    assert (last.token_lengths > 0).tolist() == [True] * (len(examples) % 4 or 4) + [False] * (
        -len(examples) % 4
    )
    assert not last.features[last.token_lengths == 0].any()


def test_a_prompt_too_long_for_evaluation_is_refused(pipeline):
    long = Example("too long", instruction="好" * 500, answer="好")
    with pytest.raises(UserError, match="too long: takes"):
        pipeline({"a": [long]}, train=False)
    _, info = next(pipeline({"a": [long]}, examples=1).iterate())
    assert info["cut"] > 300 and not info["skipped"]


# Length buckets


def test_buckets_hold_utterances_of_their_length(pipeline, folder):
    examples = [
        Example(f"{i}", (("speech", str(folder / f"{i % 6}.flac")),), transcript=SAID[0])
        for i in range(24)
    ]
    made = pipeline(
        {"a": examples}, batch_format="transcription", frames=(60, 110, 200), examples=4
    )
    seen = take(made.iterate(), 12)
    for batch, info in seen:
        frames = batch.features.shape[1]
        smaller = {60: 0, 110: 60, 200: 110}[frames]
        assert all(smaller < length <= frames for length in batch.lengths)
        assert not info["skipped"]
    assert {batch.features.shape[1] for batch, _ in seen} == {60, 110, 200}
    keys = Counter(key for _, info in seen for key in info["keys"])
    assert set(keys.values()) == {2} and len(keys) == 24


def test_conversations_with_speech_come_in_buckets_too(pipeline, folder):
    """Rows of one bucket are as long as their speech needs, and otherwise as without buckets."""
    spoken = [e for e in mixed(folder, 48) if e.media and e.media[-1][0] == "speech"]
    sources = {"a": spoken, "b": texts(8)}
    made = pipeline(sources, frames=(60, 110, 200), examples=4, threads=1)
    seen = take(made.iterate(), 16)
    widths = Counter()
    for batch, info in seen:
        entry = batch.media["speech"]
        frames = entry.values.shape[2]
        lengths = entry.lengths[entry.lengths > 0]
        assert frames in (60, 110, 200) and (lengths <= frames).all() and not info["skipped"]
        assert not len(lengths) or lengths.max() > {60: 0, 110: 60, 200: 110}[frames]
        widths[frames] += 1
    assert len(widths) == 3
    keys = Counter(key for _, info in seen for key in info["keys"])
    assert set(keys.values()) == {2} and len(keys) == len(spoken) + 8
    position = made.iterate().position()
    with pytest.raises(UserError, match="length buckets are on"):
        pipeline(sources, frames=(60, 110, 200), examples=8).iterate(position | {"next_index": 3})
    whole = pipeline(sources, train=False, frames=(200,), examples=4)
    for (one, _), (other, _) in zip(
        whole.iterate(), pipeline(sources, train=False, frames=(60, 110, 200), examples=4).iterate()
    ):
        frames = other.media["speech"].values.shape[2]
        assert not one.media["speech"].values[:, :, frames:].any()
        np.testing.assert_array_equal(
            one.media["speech"].values[:, :, :frames], other.media["speech"].values
        )


def test_an_utterance_longer_than_every_bucket_is_skipped_in_training_only(pipeline, folder):
    example = Example("long", (("speech", str(folder / "5.flac")),), transcript=SAID[0])
    sources = {"a": [example]}
    fields = {"batch_format": "transcription", "frames": (60, 100), "examples": 1}
    _, info = next(pipeline(sources, **fields).iterate())
    assert [s.key for s in info["skipped"]] == ["long"] and not info["bad"]
    with pytest.raises(UserError, match=r"has 148 frames, data\.frames holds 100"):
        list(pipeline(sources, train=False, **fields).iterate())


# Bad records


@pytest.mark.parametrize("name", ["conversation", "transcription", "image_text_pairs"])
def test_bad_files_are_counted_and_listed(pipeline, folder, tmp_path, name):
    kind = {"transcription": "flac"}.get(name, "png")
    modality = {"flac": "speech", "png": "image"}[kind]

    def example(key, name):
        media = ((modality, str(folder / f"{name}.{kind}")),)
        return Example(key, media, "看", SAID[0], transcript=SAID[0])

    good = [example(f"g{i}", i % 3) for i in range(10)]
    bad = [example(f"b{i}", "broken") for i in range(4)] + [example("absent", "absent")]
    listed = tmp_path / "quarantine.jsonl"
    fields = {"batch_format": name, "examples": 5, "rows": 5, "max_bad_share": 0.5}
    seen = take(pipeline({"a": good + bad}, quarantine=listed, **fields).iterate(), 3)
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(e.key for e in bad)
    assert {line["file"] for line in lines} == {path for e in bad for _, path in e.media}
    assert max(line["count"] for line in lines) == 4
    assert seen[-1][1]["bad"] == len(bad)
    assert sorted(k for _, info in seen for k in info["keys"]) == sorted(e.key for e in good)


def test_the_list_of_an_interrupted_run_is_that_of_a_whole_one(pipeline, folder, tmp_path):
    bad = dataclasses.replace(mixed(folder, 2)[1], key="bad")
    bad = dataclasses.replace(bad, media=(("image", str(folder / "broken.png")),))
    sources = {"a": [*texts(9), bad]}
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    fields = {"examples": 4, "max_bad_share": 0.5, "threads": 1}
    take(pipeline(sources, quarantine=whole, **fields).iterate(), 20)
    batches = pipeline(sources, quarantine=cut, **fields).iterate()
    take(batches, 7)
    position = batches.position()
    take(batches, 6)  # lost by the kill, and with them the end of a line
    with cut.open("a") as file:
        file.write('{"file": "half')
    take(pipeline(sources, quarantine=cut, **fields).iterate(position), 13)
    assert cut.read_text() == whole.read_text()
    assert [json.loads(line)["count"] for line in whole.read_text().splitlines()] == list(
        range(1, 9)
    )
    take(pipeline(sources, quarantine=cut, **fields).iterate(), 2)  # starts anew
    assert len(cut.read_text().splitlines()) <= 1
    assert pipeline(sources, (1, 2), quarantine=cut).quarantine == tmp_path / "cut.host1.jsonl"


def test_too_many_bad_files_stop_the_run(pipeline, folder):
    examples = mixed(folder, 18)
    examples[5] = dataclasses.replace(
        examples[5], media=(("image", str(folder / "broken.png")),), key="bad"
    )
    batches = pipeline({"a": examples}, max_bad_share=0.01).iterate()
    with pytest.raises(UserError, match=r"\d of \d+ records could not be read.*broken\.png"):
        take(batches, 4)


def test_a_reader_may_refuse_a_single_record(pipeline):
    class Refusing(list):
        def __getitem__(self, index):
            if index == 2:
                raise UserError("no caption", field="captions.json")
            return super().__getitem__(index)

    sources = {"a": Refusing(texts(8))}
    _, info = next(pipeline(sources, max_bad_share=0.2).iterate())
    assert info["skipped"] == (Skipped("a[2]", "no caption", True, "captions.json"),)
    assert info["examples"] == 7 and info["bad"] == 1
    _, info = next(pipeline(sources, train=False, max_bad_share=0.2).iterate())
    assert info["examples"] == 7 and info["bad"] == 1


def test_a_stream_with_nothing_to_learn_is_an_error(pipeline, folder):
    silent = [
        dataclasses.replace(e, media=(("image", str(folder / "0.png")),) * 9) for e in texts(20)
    ]
    with pytest.raises(UserError, match=r"nothing to learn, the last .* is t\d+: no room .*image"):
        take(pipeline({"a": silent}).iterate(), 20)


# Forms


def test_pairs_hold_images_and_word_pieces(pipeline, folder):
    made = pipeline({"a": mixed(folder, 8)[1::4] * 4}, batch_format="image_text_pairs")
    batch, _ = next(made.iterate())
    assert batch.images.shape == (8, SIZE, SIZE, 3) and batch.ids.shape == (8, 12)
    assert (batch.ids[:, 0] == made.resources.begin).all() and batch.weights.all()
    assert (batch.mask == (batch.ids != made.resources.pad)).all()


def test_the_blank_infilling_format_fills_blanks_and_answers_questions(pipeline):
    sentences = [Example(f"s{i}", answer="红色的圆在左边，蓝色的方块在右边。") for i in range(8)]
    made = pipeline(
        {"a": [*sentences, *texts(8)]}, batch_format="blank_infilling", items={}, rows=8
    )
    specials = made.resources.family.tokens
    ids = np.concatenate([batch.ids for batch, _ in take(made.iterate(), 6)])
    assert (ids == specials.mask).any() and (ids == specials.gmask).any()


@pytest.mark.parametrize("share, count", [(1.0, 9), (0.5, 5), (1 / 3, 3), (1e-9, 1)])
def test_a_share_of_a_source_is_its_first_records(share, count):
    source = Source("world_text", options={"count": 9})
    whole = mixture.read("a", source, "")
    found = mixture.read("a", dataclasses.replace(source, share=share), "")
    assert list(found) == list(whole)[:count]
    with pytest.raises(IndexError):
        found[count]


def test_readers_and_their_options_are_checked():
    with pytest.raises(UserError, match="Did you mean 'world_text'"):
        mixture.read("a", Source("world_txt"), "")
    with pytest.raises(UserError, match="no option 'cout'"):
        mixture.read("a", Source("world_text", options={"cout": 3}), "")
    assert len(mixture.read("a", Source("world_text", options={"count": 3}), "")) == 3
