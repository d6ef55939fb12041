"""Alignment of signal tokens: the loss by hand, what trains, resuming, several runs in a row."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import small_outputs
import small_stage

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Output, Part, Signals
from xllm_jax.data.batching import batch_format
from xllm_jax.data.example import Example
from xllm_jax.data.record import Mode, Record
from xllm_jax.training import loop
from xllm_jax.training.trainer import Trainer, stage_loss

FIRST, COUNT = small_outputs.FIRST, small_outputs.COUNT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def made(folder):
    return small_outputs.stage(folder)


@pytest.fixture(scope="module")
def system(made):
    return System.build(made, mesh.make({}))


@pytest.fixture(scope="module")
def params(system):
    return parameters.parameters(system)


def picture(key, answer, *captions, **changes):
    outputs = tuple(("image", caption) for caption in captions)
    return Example(
        key, instruction="请画图", answer=answer, task="draw", outputs=outputs, **changes
    )


EXAMPLES = [
    picture("two", "好的，<image>和<image>。", "红色的圆", "蓝色的方块"),
    picture("one", "<image>", "red ball"),
    Example("none", instruction="图中有什么？", answer="一个圆。"),
    picture("behind", "好的", "ball red ball"),
]


def batch_of(data, examples):
    mode = Mode()
    format_ = batch_format.find(data)
    plan = format_.plan([Record(one) for one in examples], mode)
    batch, skipped = format_.fill(plan, slice(0, None), mode)
    return plan, batch, [*plan.skipped, *skipped]


def test_runs_are_ids_of_the_registry_and_never_text(made):
    _, batch, skipped = batch_of(made.data, EXAMPLES)
    assert not skipped
    table = batch.signals["image"]
    assert table.weights.sum() == 4
    tokenizer = batch_format.find(made.data).resources.captions
    said = {}
    for row, place in np.argwhere(table.weights > 0):
        start = table.start[row, place]
        np.testing.assert_array_equal(
            batch.ids[row, start : start + COUNT], np.arange(FIRST, FIRST + COUNT)
        )
        said[row, place] = table.captions[row, place].tolist()
    wanted = tokenizer.encode(
        ["红色的圆", "蓝色的方块", "red ball", "ball red ball"], made.data.caption_length
    )
    assert sorted(said.values()) == sorted(wanted.tolist())
    inside = (batch.ids >= FIRST) & (batch.ids < FIRST + COUNT)
    assert inside.sum() == 4 * COUNT
    # Every signal token is learnt, the first too.
    targets = batch.targets[batch.weights > 0]
    assert ((targets >= FIRST) & (targets < FIRST + COUNT)).sum() == 4 * COUNT


def test_a_text_that_looks_like_a_marker_stays_text(made):
    odd = Example("odd", instruction="请写", answer="<image> <IMG0>")
    _, batch, skipped = batch_of(made.data, [odd])
    assert not skipped and batch.signals["image"].weights.sum() == 0
    assert (batch.ids < FIRST).all()


@pytest.mark.parametrize("answers", range(4, 24))
def test_a_cut_answer_never_cuts_a_run(made, answers):
    """Left out and counted, and whatever is kept holds all of its runs."""
    data = dataclasses.replace(made.data, answers=answers)
    plan, batch, skipped = batch_of(data, EXAMPLES)
    table = batch.signals["image"]
    inside = ((batch.ids >= FIRST) & (batch.ids < FIRST + COUNT)).sum()
    assert inside == COUNT * table.weights.sum()
    keys = {entry.record.example.key for row in plan.rows for entry in row}
    assert len(keys) + len(skipped) == len(EXAMPLES)
    captions = {one.key: len(one.outputs) for one in EXAMPLES}
    assert table.weights.sum() == sum(captions[key] for key in keys)
    assert not any(one.bad for one in skipped)


def test_runs_that_a_row_has_no_place_for_go_elsewhere_or_are_left_out(made):
    signals = {"image": Signals(FIRST, COUNT, runs=1)}
    data = dataclasses.replace(made.data, signals=signals)
    _, batch, skipped = batch_of(data, EXAMPLES)
    assert [one.key for one in skipped] == ["two"]
    assert batch.signals["image"].weights.sum() == 2
    assert batch.signals["image"].weights.max() == 1


def test_runs_of_the_second_version_have_a_word_between(folder, made):
    """2 n - 1 positions, all of them read; a linear projection has a weight for each."""
    stage = small_outputs.stage(folder)
    stage.data.signals["image"].between = 20
    stage.parts["image_projection"].network = "outputs.projection.LinearProjection"
    _, batch, skipped = batch_of(stage.data, EXAMPLES)
    assert not skipped and batch.signals["image"].weights.sum() == 4
    run = np.insert(np.arange(FIRST, FIRST + COUNT), [1, 2, 3], 20)
    table = batch.signals["image"]
    for row, place in np.argwhere(table.weights > 0):
        start = table.start[row, place]
        np.testing.assert_array_equal(batch.ids[row, start : start + len(run)], run)
    other = System.build(stage, mesh.make({}))
    params = parameters.parameters(other)
    assert params["image_projection"]["head_0"]["mixing"].shape == (7, small_outputs.TOKENS)
    found = gradients(other, params, batch)
    assert (np.abs(found["image_projection/head_0/mixing"]).max(1) > 0).all()


def by_hand(system, params, batch, scale):
    """The loss from the networks' outputs, in NumPy and run by run."""
    model = system.model
    states = np.asarray(model.hidden(params, batch), np.float64)
    words = np.asarray(model.embed(params, batch))
    scores = np.asarray(model.logits(params, states.astype(np.float32)), np.float64)
    losses, far = [], []
    for row, place in np.argwhere(batch.weights > 0):
        line = scores[row, batch.answer_index[row, place]]
        largest = line.max()
        losses.append(
            largest + np.log(np.exp(line - largest).sum()) - line[batch.targets[row, place]]
        )
    table = batch.signals["image"]
    for row, place in np.argwhere(table.weights > 0):
        at = slice(table.start[row, place], table.start[row, place] + COUNT)
        made = model.apply(
            params, "image_projection", states[None, None, row, at], words[None, row, at]
        )
        said = model.apply(
            params, "text_encoder", table.captions[None, row, place], method="states"
        )
        gaps = np.asarray(made, np.float64)[0] - np.asarray(said, np.float64)[0]
        far.append(np.sqrt((gaps**2).sum(-1)).mean())
    return np.mean(losses), np.mean(far), np.mean(losses) + scale * np.mean(far)


def test_the_loss_is_cross_entropy_and_distance(made, folder, system, params):
    _, batch, _ = batch_of(made.data, EXAMPLES)
    tokens, far, whole = by_hand(system, params, batch, 0.5)
    halved = dataclasses.replace(system, stage=small_outputs.stage(folder, options={"scale": 0.5}))
    value, metrics = jax.jit(stage_loss(halved))(params, batch, jax.random.key(0))
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    np.testing.assert_allclose(metrics["distance/image"].mean, far, rtol=1e-5)
    np.testing.assert_allclose(metrics["terms"]["tokens"].mean, tokens, rtol=1e-5)
    np.testing.assert_allclose(metrics["terms"]["runs"].mean, 0.5 * far, rtol=1e-5)
    assert metrics["terms"]["runs"].count == 4


def test_signal_rows_stand_over_the_llms_own(system, params):
    """Other columns and other words are the LLM's, to the last bit."""
    model = system.model
    ids = np.array([[5, FIRST, FIRST + 3, FIRST + 4]])
    own = model.networks["llm"].apply({"params": params["llm"]}, ids, method="embed")
    seen = model.llm(params)(ids, method="embed")
    table = params["signal_tokens"]["image_embedding"]
    np.testing.assert_array_equal(seen[0, 1:3], table[np.array([0, 3])])
    np.testing.assert_array_equal(seen[0, [0, 3]], own[0, np.array([0, 3])])
    scores = model.networks["llm"].apply({"params": params["llm"]}, own, method="logits")
    both = model.logits(params, own)
    inside = np.arange(scores.shape[-1])
    inside = (inside >= FIRST) & (inside < FIRST + COUNT)
    np.testing.assert_array_equal(both[..., ~inside], scores[..., ~inside])
    wanted = np.asarray(own[0]) @ np.asarray(params["signal_tokens"]["image_head"]).T
    np.testing.assert_allclose(both[0][:, inside], wanted, atol=1e-5)


def gradients(system, params, batch):
    trainable, frozen = rules.split(system.stage.trainable, params)
    loss = stage_loss(system)

    def value(trainable):
        return loss(rules.join(trainable, frozen), batch, jax.random.key(0))[0]

    return rules.flatten(jax.jit(jax.grad(value))(trainable))


def test_only_the_new_rows_and_the_projection_train(made, system, params):
    _, batch, _ = batch_of(made.data, EXAMPLES)
    found = gradients(system, params, batch)
    assert {path.split("/")[0] for path in found} == {"signal_tokens", "image_projection"}
    assert all(np.abs(leaf).max() > 0 for leaf in found.values())
    rows = found["signal_tokens/image_embedding"]
    assert rows.shape == (COUNT, 32) and (np.abs(rows).max(-1) > 0).all()


def test_whole_tables_train_where_the_allow_list_says_so(folder, made, params):
    trainable = (*made.trainable, "llm/embedding")
    other = System.build(small_outputs.stage(folder, trainable=trainable), mesh.make({}))
    _, batch, _ = batch_of(made.data, EXAMPLES)
    table = gradients(other, params, batch)["llm/embedding"]
    assert (np.abs(table).max(-1) > 0).sum() > 500  # the head reaches every word
    assert not np.abs(table[FIRST : FIRST + COUNT]).any()  # these live in signal_tokens


def test_rows_may_begin_at_the_mean_of_the_old_ones(folder):
    stage = small_outputs.stage(folder)
    stage.parts["signal_tokens"].fields["initial"] = "mean"
    found = parameters.parameters(System.build(stage, mesh.make({})))
    table = np.asarray(found["llm"]["embedding"], np.float64)
    mean = np.delete(table, range(FIRST, FIRST + COUNT), axis=0).mean(0)
    for name in ("image_embedding", "image_head"):
        np.testing.assert_allclose(
            found["signal_tokens"][name], np.tile(mean, (COUNT, 1)), atol=1e-6
        )


def test_the_mean_of_a_head_of_its_own(folder):
    stage = small_outputs.stage(folder)
    stage.parts["signal_tokens"].fields["initial"] = "mean"
    fields = {"vocab": 576, "width": 32, "depth": 1, "heads": 2, "hidden": 48, "tied": False}
    stage.parts["llm"] = Part("causal.Causal", "tiny", fields)
    stage.data.llm_family, stage.data.template = "causal", "paper"
    found = parameters.parameters(System.build(stage, mesh.make({})))
    head = np.delete(np.asarray(found["llm"]["head"], np.float64), range(FIRST, FIRST + COUNT), 0)
    rows = found["signal_tokens"]
    np.testing.assert_allclose(rows["image_head"], np.tile(head.mean(0), (COUNT, 1)), atol=1e-6)
    assert np.abs(rows["image_head"] - rows["image_embedding"]).max() > 1e-4


def test_an_inner_layer_of_the_llm_can_be_read(folder, made, params):
    """The states between the layers, against those of an LLM that ends there."""
    stage = small_outputs.stage(folder)
    stage.parts["image_projection"].fields["llm_layers"] = (-1, 1, 0)
    model = System.build(stage, mesh.make({})).model
    _, batch, _ = batch_of(made.data, EXAMPLES)
    places = np.array([[3, 7]] * len(batch.ids))
    states, found = model.read(params, batch, {"image": places})
    taken = found["image"].states
    rows = np.arange(len(batch.ids))[:, None]
    np.testing.assert_array_equal(taken[:, 0], states[rows, places])
    words = model.embed(params, batch)
    np.testing.assert_allclose(taken[:, 2], words[rows, places], atol=1e-6)
    short = stage.parts["llm"].fields | {"depth": 1}
    stage.parts["llm"].fields = short
    one = System.build(stage_without(stage), mesh.make({})).model
    first = jax.tree.map(lambda leaf: leaf[:1], params["llm"]["layers"])
    llm = params["llm"] | {"layers": first}
    ended = one.hidden(params | {"llm": llm}, batch)
    norm = params["llm"]["final_norm"]
    inner = np.asarray(taken[:, 1])
    inner = (inner - inner.mean(-1, keepdims=True)) / np.sqrt(inner.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(inner * norm["scale"] + norm["bias"], ended[rows, places], atol=1e-4)


def stage_without(stage):
    """With the last layer alone asked for."""
    stage.parts["image_projection"].fields["llm_layers"] = (-1,)
    return stage


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    loop.fit(small_outputs.stage(folder), workdir)
    return workdir


def test_two_steps_train_and_only_what_may(trained, folder, params):
    losses = list(small_stage.curve(trained).values())
    assert losses[-1] < losses[0]
    far = list(small_stage.curve(trained, "distance/image").values())
    assert far[-1] < far[0]
    stage = small_outputs.stage(folder, init={})
    stage.init = {name: str(trained) for name in ("signal_tokens", "image_projection")}
    after = rules.flatten(parameters.parameters(System.build(stage, mesh.make({}))))
    before = rules.flatten(params)
    changed = {p.split("/")[0] for p in before if not np.array_equal(before[p], after[p])}
    assert changed == {"signal_tokens", "image_projection"}


def test_a_stopped_run_continues_exactly(trained, folder, tmp_path):
    loop.fit(small_outputs.stage(folder), tmp_path, stop_after=3)
    loop.fit(small_outputs.stage(folder), tmp_path)
    assert small_stage.curve(tmp_path) == small_stage.curve(trained)


def test_micro_batches_count_their_runs(folder, tmp_path):
    """Two micro-batches with different numbers of runs are one batch of both."""
    stage = small_outputs.stage(folder)
    stage.optimizer.accumulation = 2
    system = System.build(stage, mesh.make({}))
    trainer = Trainer(system)
    _, few, _ = batch_of(stage.data, EXAMPLES[1:3])
    _, many, _ = batch_of(stage.data, EXAMPLES)
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), few, many)
    state = trainer.initial_state()
    for part in (few, many):
        state, _ = trainer.step(state, part)
    single = small_outputs.stage(folder)
    other = Trainer(System.build(single, mesh.make({})))
    once, _ = other.step(other.initial_state(), both)
    for path, leaf in rules.flatten(once.trainable).items():
        np.testing.assert_allclose(
            rules.flatten(state.trainable)[path], leaf, atol=2e-5, err_msg=path
        )


def no_projection(stage):
    stage.outputs = {"image": Output("projektion")}


def no_word_between(stage):
    stage.data.signals = {"image": Signals(FIRST, COUNT, between=FIRST + 1)}


def taken_ids(stage):
    stage.data.signals = {"image": Signals(519, COUNT)}


def beyond_the_table(stage):
    stage.data.signals = {"image": Signals(574, COUNT)}


def another_width(stage):
    stage.parts["image_projection"].fields["output_width"] = 10


def another_llm(stage):
    stage.parts["image_projection"].fields["llm_width"] = 64


def without_rows(stage):
    del stage.parts["signal_tokens"]
    stage.trainable = ("image_projection/.*",)


def only_signals(stage):
    stage.outputs = {}


def shared_ids(stage):
    stage.data.signals = {"image": Signals(521, 4), "audio": Signals(524, 8)}
    stage.outputs |= {"audio": stage.outputs["image"]}


def too_deep(stage):
    stage.parts["image_projection"].fields["llm_layers"] = (5,)


def no_tokenizer(stage):
    stage.data.caption_tokenizer = ""


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (no_projection, "outputs.image"),
        (taken_ids, "data.signals.image.first"),
        (no_word_between, "data.signals.image.between"),
        (beyond_the_table, "data.signals.image.first"),
        (another_width, "parts.image_projection.fields.output_width"),
        (another_llm, "parts.image_projection.fields.llm_width"),
        (without_rows, "data.signals"),
        (only_signals, "image"),
        (shared_ids, "data.signals.image.first"),
        (too_deep, "parts.image_projection.fields.llm_layers"),
        (no_tokenizer, "data.caption_tokenizer"),
    ],
)
def test_parts_that_do_not_fit(folder, change, field):
    stage = small_outputs.stage(folder)
    change(stage)
    with pytest.raises(UserError) as error:
        System.build(stage, mesh.make({}))
        batch_format.find(stage.data).load_resources()
    assert error.value.field == field
    assert error.value.hint and "\n" not in str(error.value)
