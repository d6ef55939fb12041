"""Micro-batches of one update weigh what they hold: tokens, pairs, or whatever a term counts."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_speech
import small_stage

from xllm_jax.assembly.system import System
from xllm_jax.core import mesh, optim, rules
from xllm_jax.core.batch import TextPairs
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Divergence, Optimizer, Stage
from xllm_jax.core.weighted_mean import WeightedMean
from xllm_jax.data import mixture
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.models.blip2_pretraining import SIZES, ContrastModel
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import answer, asr, blip2_pretraining, unilm
from xllm_jax.preflight import micro_batch
from xllm_jax.training import divergence, loop, startup, telemetry
from xllm_jax.training.step import TrainState, train_step
from xllm_jax.training.trainer import Trainer


def stage(accumulation: int, examples: int, **changes) -> Stage:
    """The small stage, with an AdamW whose first update is nearly the gradient times the rate."""
    made = small_stage.stage(steps=1, **changes)
    made.optimizer = Optimizer(
        "constant", peak=1.0, warmup_from=-1, eps=1e3, weight_decay=0.0, accumulation=accumulation
    )
    made.data.examples = made.data.rows = examples
    return made


def batches(made: Stage, device_mesh) -> list:
    """All micro-batches of the first update."""
    stream = Pipeline(made.data, made.seed).iterate()
    count = made.optimizer.accumulation
    return [mesh.to_global(device_mesh, next(stream)[0]) for _ in range(count)]


def moved(made: Stage) -> np.ndarray:
    """By how much the first update moves every parameter."""
    device_mesh = mesh.make({})
    trainer = Trainer(System.build(made, device_mesh))
    state = trainer.initial_state()
    before = rules.flatten(jax.tree.map(np.asarray, state.trainable))
    for batch in batches(made, device_mesh):
        state, _ = trainer.step(state, batch)
    after = rules.flatten(state.trainable)
    return np.concatenate([np.ravel(after[path] - before[path]) for path in sorted(before)])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_an_update_is_that_of_one_batch_however_it_is_divided():
    """Four micro-batches of unequal answers; as means of means they miss by per cents."""
    whole = moved(stage(1, 16))
    divided = stage(4, 4)
    assert distance(moved(divided), whole) < 2e-5
    divided.optimizer.averaging = "micro_batches"
    assert distance(moved(divided), whole) > 2e-3


def quadratic(params, batch, key):
    """Two terms with a normalizer each, of which one micro-batch may hold nothing."""
    terms = {
        name: WeightedMean((weight * (params["w"] - x) ** 2).sum(), weight.sum())
        for name, (x, weight) in batch.items()
    }
    return sum(term.mean for term in terms.values()), {"terms": terms}


@pytest.mark.parametrize("empty", [False, True])
def test_each_term_is_averaged_over_what_it_counts(empty):
    """Against float64 arithmetic over all entries at once."""
    rng = np.random.default_rng(0)
    sizes = [(3, 40), (50, 0 if empty else 1), (8, 7)]
    made = [
        {
            name: (rng.normal(size=60).astype(np.float32), np.float32(np.arange(60) < size))
            for name, size in zip(("pairs", "tokens"), both)
        }
        for both in sizes
    ]
    start = np.float32(0.7)
    wanted = 0.0
    for name in ("pairs", "tokens"):
        x, weight = (np.concatenate([b[name][i] for b in made]).astype(float) for i in range(2))
        wanted += 2 * (weight * (start - x)).sum() / weight.sum()
    optimizer = optim.accumulate(optax.sgd(1.0), 3, 2)
    params = {"w": jnp.asarray(start)}
    state = trainer_state(params, optimizer)
    for batch in made:
        state, _ = step(state, batch, optimizer)
    assert float(start - state.trainable["w"]) == pytest.approx(wanted, rel=1e-5)
    assert not np.any(state.optimizer.weights) and int(state.optimizer.gradient_step) == 1


def trainer_state(params, optimizer):
    guard = divergence.initial_guard(Divergence())
    return TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params), guard)


def step(state, batch, optimizer):
    return train_step(
        state, batch, loss=quadratic, optimizer=optimizer, policy=Divergence(), seed=0
    )


@pytest.mark.parametrize("weights", [[5.0, 5.0, 5.0, 5.0], [3.0, 90.0, 1.0, 7.0]])
def test_equal_weights_and_the_mean_of_means_are_optax_bit_for_bit(weights):
    """The numbers of every run of before, by the accumulator that it used."""
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
    weighted = len(set(weights)) == 1
    ours = optim.accumulate(optax.adam(0.1), 3, 1, weighted)
    theirs = optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation()
    states, apart = [ours.init(params), theirs.init(params)], []
    ours, theirs = jax.jit(ours.update), jax.jit(theirs.update)
    for number, weight in enumerate(weights):
        key = jax.random.key(number)
        gradients = jax.tree.map(lambda x, k=key: jax.random.normal(k, x.shape), params)
        one, states[0] = ours(
            gradients, states[0], params, weights=jnp.asarray([weight], jnp.float32)
        )
        two, states[1] = theirs(gradients, states[1], params)
        same = jax.tree.map(np.array_equal, (one, states[0].acc_grads), (two, states[1].acc_grads))
        apart += [number] if not all(jax.tree.leaves(same)) else []
    assert apart == []


def test_a_larger_accumulation_takes_no_more_memory():
    """The compiled step beside optax's, which knows no weights."""
    made, device_mesh = stage(4, 4), mesh.make({})
    trainer = Trainer(System.build(made, device_mesh))
    batch = micro_batch.sharded(made.data, device_mesh)
    sizes = []
    for optimizer in (trainer.optimizer, plain(made, trainer)):
        like = dataclasses.replace(
            trainer.abstract_state,
            optimizer=jax.eval_shape(optimizer.init, trainer.abstract_state.trainable),
        )
        call = functools.partial(
            train_step, loss=trainer.loss, optimizer=optimizer, policy=made.divergence, seed=0
        )
        with jax.set_mesh(device_mesh):
            compiled = jax.jit(call, donate_argnums=0).lower(like, batch).compile()
        used = compiled.memory_analysis()
        sizes.append((used.argument_size_in_bytes, used.temp_size_in_bytes))
    (ours, temporary), (theirs, before) = sizes
    assert ours - theirs <= 64 and temporary <= before * 1.001 + 256


def plain(made: Stage, trainer: Trainer) -> optim.Transformation:
    single = dataclasses.replace(made.optimizer, accumulation=1)
    inner, _ = optim.make(single, trainer.abstract_state.trainable, 1)
    steps = optax.MultiSteps(inner, made.optimizer.accumulation).gradient_transformation()
    return optax.with_extra_args_support(
        optax.GradientTransformation(steps.init, lambda g, s, p=None: steps.update(g, s, p))
    )


def test_accumulators_are_sharded_as_their_parameters():
    params = {"llm": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}}
    device_mesh = mesh.make({})
    spread = jax.sharding.NamedSharding(device_mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = jax.sharding.NamedSharding(device_mesh, jax.sharding.PartitionSpec())
    params["llm"]["kernel"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=spread)
    optimizer = optim.accumulate(optax.sgd(1.0), 2, 2)
    state = optim.abstract_state(optimizer, params, whole)
    for tree in (state.acc_grads, *state.others):
        assert tree["llm"]["kernel"].sharding == spread


def halves(batch):
    """The rows of a batch apart: all but two, and two."""
    return (jax.tree.map(operator.itemgetter(part), batch) for part in (slice(-2), slice(-2, None)))


def added(parts) -> dict[str, WeightedMean]:
    """Terms of several batches, added up by what they count."""
    return {
        name: WeightedMean(*(sum(float(p[name][i]) for p in parts) for i in range(2)))
        for name in parts[0]
    }


def agrees(run, batch, normalizers) -> None:
    """A batch's terms are the sums of its parts' terms; the loss is the sum of their means."""
    value, metrics = run(batch)
    terms = metrics["terms"]
    assert tuple(terms) == normalizers
    assert float(value) == pytest.approx(
        sum(float(t.total) / float(t.count) for t in terms.values())
    )
    for name, term in added([run(part)[1]["terms"] for part in halves(batch)]).items():
        assert float(terms[name].count) == term.count
        assert float(terms[name].total) == pytest.approx(term.total, rel=2e-5), name


def test_the_terms_of_the_answer_loss_add_up():
    made = stage(1, 8)
    system = System.build(made, mesh.make({}))
    state = Trainer(system).initial_state()
    params = rules.join(state.trainable, state.frozen)
    run = jax.jit(lambda batch: answer.loss(system.model, params, batch))
    batch = next(Pipeline(made.data, made.seed).iterate())[0]
    agrees(run, batch, answer.NORMALIZERS)
    rough = dataclasses.replace(batch, weights=batch.weights * np.float32(0.003))  # sum below 1
    assert float(run(rough)[0]) == pytest.approx(float(run(batch)[0]), rel=1e-5)


def test_the_terms_of_speech_recognition_add_up(tmp_path, monkeypatch):
    made, examples = small_speech.make(tmp_path)
    monkeypatch.setattr(mixture, "read", lambda *_, **__: examples)
    made.data.examples, made.data.frames = 6, made.data.frames[-1:]
    system = System.build(made, mesh.make({}))
    state = Trainer(system).initial_state()
    params = rules.join(state.trainable, state.frozen)
    run = jax.jit(lambda batch: asr.loss(system.model, params, batch))
    agrees(run, next(Pipeline(made.data, made.seed).iterate())[0], asr.NORMALIZERS)


def contrast() -> ContrastModel:
    return ContrastModel(**SIZES["tiny"] | {"depth": 2, "dropout": 0.0})


def test_the_terms_of_hidden_and_written_pieces_add_up():
    network, rng = contrast(), np.random.default_rng(0)
    params = {"text_model": jax.jit(network.init)(jax.random.key(0), *network.example())["params"]}
    model, length = XLLM(networks={"text_model": network}), 6
    ids = rng.integers(4, network.vocabulary - 1, (6, 4, length)).astype(np.int32)
    real = np.arange(length) < rng.integers(2, length + 1, (2, 6, 1))
    joined = np.concatenate(ids[:, 2:].swapaxes(0, 1), axis=1)
    seen = np.concatenate(real, axis=1)
    hidden = np.float32(seen & (rng.random(seen.shape) < 0.4))
    made = TextPairs(ids[:, 0], real[0], hidden, joined, seen, ids[:, 1], real[1], joined)
    run = jax.jit(lambda batch: unilm.loss(model, params, batch))
    agrees(run, made, unilm.NORMALIZERS)


def test_contrast_and_matching_count_pairs_and_captions_count_tokens():
    """The gradient of a rank's micro-batches: ITC and ITM by pairs, ITG by tokens, each from its
    own loss alone; and captions alone are one batch's."""
    network, rng = contrast(), np.random.default_rng(1)
    params = jax.jit(network.init)(jax.random.key(0), *network.example())["params"]
    features = rng.normal(size=(6, 5, network.encoder_width)).astype(np.float32)
    ids = rng.integers(4, network.vocabulary - 1, (6, 9)).astype(np.int32)
    mask = np.arange(9) < np.array([[9], [9], [8], [7], [2], [3]])
    weights = np.array([1, 1, 1, 0, 1, 1], np.float32)
    parts = (slice(0, 4), slice(4, 6))

    def loss(params, rows, shares):
        negatives = (np.roll(np.arange(rows.stop - rows.start), 1),) * 2
        return blip2_pretraining.pair_loss(
            *(network, params, features[rows], ids[rows], mask[rows]),
            weights=weights[rows], negatives=negatives, start=3, shares=shares,
        )  # fmt: skip

    only = [{"itc": 1.0, "itm": 1.0, "itg": 0.0}, {"itc": 0.0, "itm": 0.0, "itg": 1.0}]
    gradient = jax.grad(lambda p, *a: loss(p, *a)[0])
    pieces = [
        [flat(jax.jit(lambda p, r=rows, s=shares: gradient(p, r, s))(params)) for rows in parts]
        for shares in only
    ]
    counted = [[3, 2], [8 + 8 + 7, 1 + 2]]
    wanted = sum(np.average(p, axis=0, weights=c) for p, c in zip(pieces, counted))
    optimizer = optim.accumulate(optax.sgd(1.0), 2, 2)
    state = trainer_state({"q": params}, optimizer)
    both = {"itc": 1.0, "itm": 1.0, "itg": 1.0}
    for rows in parts:
        one = functools.partial(lambda rows, p, *_: loss(p["q"], rows, both), rows)
        call = functools.partial(
            train_step, loss=one, optimizer=optimizer, policy=Divergence(), seed=0
        )
        state, metrics = jax.jit(call)(state, None)
    found = flat(params) - flat(state.trainable["q"])
    assert distance(found, wanted) < 1e-4
    assert [float(t.count) for t in metrics["terms"].values()] == [2, 3]
    captions = flat(jax.jit(lambda p: gradient(p, slice(0, 6), only[1]))(params))
    assert distance(np.average(pieces[1], axis=0, weights=counted[1]), captions) < 1e-4
    assert distance(np.mean(pieces[1], axis=0), captions) > 1e-2


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_a_log_line_weighs_as_an_update_and_as_validation_do():
    sums = [(10.0, 5.0, 1.0, 4.0), (3.0, 1.0, 1.0, 8.0)]
    rows = [
        {"loss": 2.0 + number, "accuracy": WeightedMean(hits, count),
         "terms": {"tokens": WeightedMean(total, count), "pairs": WeightedMean(pairs, 2.0)}}
        for number, (total, count, hits, pairs) in enumerate(sums)
    ]  # fmt: skip
    found = telemetry.means(rows)
    assert found == {"loss": 13 / 6 + 12 / 4, "accuracy": 2 / 6}
    rows[1]["terms"]["tokens"] = WeightedMean(np.nan, 1.0)
    assert telemetry.means(rows)["loss"] == 10 / 5 + 4 / 2
    assert telemetry.mean([telemetry.score(row, "loss") for row in rows]) == 10 / 5 + 4 / 2


def test_the_loss_of_a_log_line_is_that_of_one_batch(tmp_path):
    """Two micro-batches in one line, against both of them in one batch."""
    made = stage(2, 8, log_every=2)
    loop.fit(made, tmp_path / "divided")
    loop.fit(stage(1, 16), tmp_path / "whole")
    divided, whole = (small_stage.curve(tmp_path / n) for n in ("divided", "whole"))
    assert divided[2] == pytest.approx(whole[1], rel=1e-6)
    accuracy = [small_stage.curve(tmp_path / n, "accuracy") for n in ("divided", "whole")]
    assert accuracy[0][2] == pytest.approx(accuracy[1][1], rel=1e-6)


def test_an_update_under_way_in_an_older_checkpoint_goes_on(tmp_path, capsys):
    """Saved in the middle of an update by optax's accumulator; the rest of it is added."""
    made = stage(4, 4)
    trainer = Trainer(System.build(made, mesh.make({})))
    state, older = trainer.initial_state(), plain(made, trainer)
    four = batches(made, mesh.make({}))
    saved = dataclasses.replace(state, optimizer=older.init(state.trainable))
    call = functools.partial(train_step, loss=trainer.loss, policy=made.divergence, seed=made.seed)
    for batch in four[:3]:
        saved, _ = call(saved, batch, optimizer=older)
    record = dataclasses.asdict(made)
    record["optimizer"].pop("averaging")
    checkpoints = startup.checkpoint.Checkpoints(tmp_path)
    checkpoints.save(3, startup.saved_arrays(saved), {"stage": record, "base": {}, "data": {}})
    checkpoints.wait()
    state, _ = startup.resume(trainer.initial_state(), checkpoints, {}, made.data)
    checkpoints.close()
    assert "averaging=micro_batches" in capsys.readouterr().err
    saved, _ = call(saved, four[3], optimizer=older)  # weighs as much as each of them
    state, _ = call(state, four[3], optimizer=trainer.optimizer)
    assert int(state.optimizer.mini_step) == 0 and int(state.optimizer.gradient_step) == 1
    assert (
        distance(flat(state.optimizer.inner_opt_state), flat(saved.optimizer.inner_opt_state))
        < 1e-6
    )


def test_an_unknown_average_is_refused():
    with pytest.raises(UserError, match=r"optimizer\.averaging.*'words'"):
        optim.make(Optimizer(averaging="words"), {}, 10)
    assert json.loads(json.dumps(dataclasses.asdict(Optimizer())))["averaging"] == "tokens"
