"""Batch formats: one file each, with shapes that their batches have; older names still load."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_stage

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Divergence, Source
from xllm_jax.core.stage_record import parse_stage
from xllm_jax.data import mixture
from xllm_jax.data.batching import batch_format
from xllm_jax.data.batching.batch_format import BatchPlan, Entry, RowPerRecord
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.record import Mode, Record, Skipped
from xllm_jax.data.synthetic_world import clip_vocabulary
from xllm_jax.preflight import micro_batch
from xllm_jax.training import divergence
from xllm_jax.training.step import TrainState, train_step

LETTERS = [Example(str(i), answer=word) for i, word in enumerate(("a", "bb", "ccc", "dddd", ""))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counted:
    """`lengths` `[B]` int32 of texts, and `weights` `[B]` float32, 0 where a row is empty."""

    lengths: np.ndarray
    weights: np.ndarray


class Lengths(RowPerRecord[Entry, Counted, str]):
    """A sixth format, of this file alone: how many letters an answer has."""

    row_tokens = 1

    def load_resources(self) -> str:
        return "none"

    def zeros(self, rows: int, bucket: int = -1) -> Counted:
        return Counted(np.zeros(rows, np.int32), np.zeros(rows, np.float32))

    def entry(self, record: Record, mode: Mode) -> Entry:
        if not record.example.answer:
            raise UserError("has no letters", field=record.example.key)
        return Entry(record)

    def fill(
        self,
        plan: BatchPlan[Entry],
        rows: slice,
        mode: Mode,
        load: modalities.Load = modalities.load,
    ) -> tuple[Counted, list[Skipped]]:
        batch = self.zeros(len(plan.rows[rows]))
        for number, _, record in plan.members(rows):
            batch.lengths[number], batch.weights[number] = len(record.example.answer), 1
        return batch, []

    def padding(self, batch: Counted) -> dict[str, tuple[int, int]]:
        return {"texts": (int(batch.weights.sum()), len(batch.weights))}


@pytest.fixture
def sixth(monkeypatch):
    reader = types.SimpleNamespace(examples=lambda path, split: LETTERS)
    monkeypatch.setattr(mixture.lookup, "module", lambda *_, **__: reader)
    name = f"{__name__}:Lengths"
    return Data(sources={"a": Source("letters")}, batch_format=name, examples=5, max_bad_share=1.0)


def test_a_format_of_another_package_passes_through_the_pipeline(sixth):
    batch, info = next(Pipeline(sixth, train=False).iterate())
    assert batch.lengths.tolist() == [1, 2, 3, 4, 0] and batch.weights.tolist() == [1, 1, 1, 1, 0]
    assert info["keys"] == ["0", "1", "2", "3"] and info["supervised"] == 4
    assert info["padding"] == {"texts": (4, 5)}
    assert [skip.reason for skip in info["skipped"]] == ["has no letters"]
    stage = small_stage.stage()
    stage.data = sixth
    assert micro_batch.rows(stage) == micro_batch.tokens(stage) == 5
    assert_shapes(batch, batch_format.find(sixth).shapes())


def test_a_format_of_another_package_trains(sixth):
    """The loss reads the batch by its own names; the step asks nothing about it."""
    batch, _ = next(Pipeline(sixth, train=False).iterate())

    def loss(params, batch, key):
        errors = (params["own"]["mean"] - batch.lengths) ** 2 * batch.weights
        return errors.sum() / batch.weights.sum(), {}

    optimizer, params = optax.sgd(0.5), {"own": {"mean": jnp.zeros(())}}
    guard = divergence.initial_guard(Divergence())
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params), guard)
    state, metrics = train_step(
        state, batch, loss=loss, optimizer=optimizer, policy=Divergence(), seed=0
    )
    assert float(metrics["loss"]) == 7.5 and float(state.trainable["own"]["mean"]) == 2.5


def assert_shapes(batch, shapes):
    """A batch has the structure, shapes and dtypes that were foretold."""
    assert jax.tree.structure(batch) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes)):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("conversation", Example("a", (), "红色的圆在哪里？", "左边")),
        ("blank_infilling", Example("a", answer="红色的圆在左边，蓝色的方块在右边。", task="text")),
        ("transcription", None),
        ("image_text_pairs", None),
        ("text_pairs", Example("a", (), "红色的圆", "左边")),
        ("scene_attributes", Example("3-7", task="attributes")),
        ("scene_pictures", Example("3-7", task="attributes")),
        ("scene_descriptions", Example("3-7", task="attributes")),
    ],
)
def test_shapes_are_those_of_the_batches(name, example, golden, tmp_path):
    (tmp_path / "characters.txt").write_text("红\n色\n")
    data = Data(
        batch_format=name,
        tokenizer=str(golden / "chatglm" / "tokenizer"),
        vocabulary=str(golden / "vision" / "weights" / "bert-base-uncased"),
        characters=str(tmp_path / "characters.txt"),
        caption_tokenizer=str(clip_vocabulary.write(tmp_path / "clip")),
        caption_length=32,
        examples=3,
        rows=2,
        frames=(50, 100),
        image={"size": 32},
        items={"image": 2, "speech": 1} if name == "conversation" else {},
        embeddings={"image": 4, "speech": 6},
    )
    form = batch_format.find(data)
    records = [Record(example, "s", 0, i, 0, bucket=1) for i in range(3)] if example else []
    plan = form.plan(records, Mode())
    plan = dataclasses.replace(plan, bucket=1)
    batch, unread = form.fill(plan, slice(None), Mode())
    assert not unread and not plan.skipped and len(plan.members(slice(None))) == len(records)
    assert_shapes(batch, form.shapes())
    assert jax.tree.leaves(batch)[0].shape[0] == form.rows
    again = divergence.unflat(divergence.flat(batch), form.shapes())
    jax.tree.map(np.testing.assert_array_equal, batch, again)


def test_most_answers_that_say_what_to_draw_are_said_again_with_their_words_hidden(golden):
    folder = str(golden / "chatglm" / "tokenizer")
    data = Data(
        batch_format="blank_infilling", tokenizer=folder, examples=1, rows=1, length=64, answers=40
    )
    form, plain = batch_format.find(data), batch_format.find(replaced(data, "conversation"))
    family = form.load_resources().family
    caption = "左边有大的红色圆形"
    made = {task: Example(task, (), "画一个圆", caption, task) for task in ("draw", "vqa")}
    words, again = family.tokenizer.encode(caption), 0
    for seed in range(200):
        records = {task: Record(one, "s", 0, 0, seed) for task, one in made.items()}
        rows = {task: form.sequence(record, Mode()) for task, record in records.items()}
        once = plain.sequence(records["draw"], Mode())
        np.testing.assert_array_equal(rows["vqa"].ids, once.ids)
        if len(rows["draw"].ids) == len(once.ids):
            np.testing.assert_array_equal(rows["draw"].ids, once.ids)
            continue
        again += 1
        # As an answer of these words and so many others, which the LLM reads as [MASK].
        said = dataclasses.replace(made["draw"], answer=f"{caption} ")
        visible = plain.sequence(Record(said, "s", 0, 0, seed), Mode())
        prefix = visible.ids[: int(visible.context.sum()) - 1]
        answer = family.tokenizer.encode(f"{caption} ")
        wanted = family.row(prefix, [*answer, *words])
        ids = wanted.ids.copy()
        ids[-1 - len(words) : -1] = family.mask
        np.testing.assert_array_equal(rows["draw"].ids, ids)
        for name in ("targets", "answer_index", "positions", "context", "segments"):
            np.testing.assert_array_equal(getattr(rows["draw"], name), getattr(wanted, name))
    assert 0.65 < again / 200 < 0.85


def replaced(data: Data, batch_format: str) -> Data:
    """The same settings with another format."""
    return dataclasses.replace(data, batch_format=batch_format)


def test_an_unknown_format_is_refused_with_the_choices():
    with pytest.raises(UserError) as error:
        batch_format.find(Data(batch_format="image_text_pair"))
    said = str(error.value)
    assert "data.batch_format" in said and "Did you mean 'image_text_pairs'?" in said
    assert "padding" not in said and "packing" not in said


@pytest.mark.parametrize(
    ("older", "name"),
    [
        ("text", "blank_infilling"),
        ("pairs", "image_text_pairs"),
        ("sentences", "text_pairs"),
        ("attributes", "scene_attributes"),
        ("conversation", "conversation"),
        ("transcription", "transcription"),
    ],
)
def test_a_stage_that_an_older_run_recorded_has_its_format(older, name):
    record = dataclasses.asdict(small_stage.stage())
    del record["data"]["batch_format"]
    record["data"]["form"] = older
    assert parse_stage(record).data.batch_format == name
    assert record["data"]["form"] == older, "the record itself stays"
