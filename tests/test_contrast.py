"""ITC, ITM and ITG against the recorded reference: values, gradients, ranks and AdamW steps."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recording import Recording
from vision_models import contrast_table, images, info_of, load_contrast, load_vision

from xllm_jax.convert import export_tree
from xllm_jax.core import optim
from xllm_jax.core.stage import Optimizer
from xllm_jax.models import layers
from xllm_jax.models.blip2_pretraining import SIZES, ContrastModel
from xllm_jax.objectives import blip2_pretraining


@pytest.fixture(scope="module")
def case(golden):
    """(recording folder, stage-1 model, parameters, encoder function, [DEC])."""
    vision, vision_params = load_vision(golden)
    model, params, _ = load_contrast(golden)
    encode = jax.jit(lambda pixels: vision.apply({"params": vision_params}, pixels)[0])
    start = json.loads((golden / "vision/cases_bert_init.json").read_text())["bos_token_id"]
    return golden / "vision", model, params, encode, start


def everything(model, params, features, ids, mask, start, negatives) -> dict:
    """Every intermediate value of the three losses, in one compiled call."""

    @jax.jit
    def run(features, ids, mask, start_ids, negatives):
        variables = {"params": params}
        image = model.apply(variables, features, method="normalize")
        states, units, cache = model.apply(variables, image, method="image")
        text, text_units = model.apply(variables, ids, mask, method="text")
        similar = blip2_pretraining.similarities(units, text_units[:, 0], params["temperature"])
        rows = blip2_pretraining.matching_rows(image, ids, mask, *negatives)
        matched, per_query = model.apply(variables, *rows, method="match")
        captioned, logits = model.apply(variables, start_ids, mask, cache, method="caption")
        return {
            "image": image,
            "states": states,
            "text": text,
            "similar": similar,
            "rows": rows,
            "matched": matched,
            "per_query": per_query,
            "captioned": captioned,
            "logits": logits,
        }

    start_ids = ids.copy()
    start_ids[:, 0] = start
    return run(features, ids, mask, start_ids, negatives)


def norms(tensors: dict[str, np.ndarray], order: list[str]) -> np.ndarray:
    """L2 norm of every tensor."""
    return np.array([np.linalg.norm(tensors[name].astype(np.float64)) for name in order])


@pytest.mark.golden
@pytest.mark.parametrize("rule", ["xllm", "lavis"])
def test_values(case, rule):
    folder, model, params, encode, start = case
    recording = Recording(folder / "cases_stage1.npz")
    recording.close("temp", params["temperature"])
    ids, mask = recording.input("text_input_ids"), recording.input("text_attention_mask") > 0
    features = encode(images(recording.input("pixels")))
    negatives = [recording.input(f"{rule}_neg_{side}_idx") for side in ("image", "text")]
    found = everything(model, params, features, ids, mask, start, negatives)
    recording.close(f"{rule}_image_embeds", found["image"])
    recording.close(f"{rule}_query_last_hidden_state", found["states"])
    recording.close(f"{rule}_text_last_hidden_state", found["text"])
    _projections(recording, rule, params, found["states"], found["text"])
    _similarities(recording, rule, found["similar"])
    _matching(recording, rule, model, found)
    recording.close(f"{rule}_itg_last_hidden_state", found["captioned"])
    recording.close(f"{rule}_itg_logits", found["logits"])
    start_ids = ids.copy()
    start_ids[:, 0] = start
    labels = np.where(mask, start_ids, -100)[:, 1:].reshape(-1)
    recording.equal(f"{rule}_itg_labels_shifted", labels)
    run = jax.jit(functools.partial(blip2_pretraining.pair_loss, model))
    total, metrics = run(params, features, ids, mask, start=start, negatives=negatives)
    recording.close(f"{rule}_loss", total)
    for name, ours in (("itc", "itc"), ("itm", "itm"), ("lm", "itg")):
        recording.close(f"{rule}_loss_{name}", metrics[ours])
    other = "lavis" if rule == "xllm" else "xllm"
    recording.assert_all_used([f"{other}_*"])


def _projections(recording, rule, params, states, text):
    embed = params["image_projection"]["bias"].shape[0]
    dense = layers.Dense(embed)
    projected = dense.apply({"params": params["image_projection"]}, states)
    recording.close(f"{rule}_vision_proj", projected)
    projected = dense.apply({"params": params["text_projection"]}, text[:, 0])
    recording.close(f"{rule}_text_proj", projected)


def _similarities(recording, rule, similar):
    for name, value in zip(("i2t", "t2i"), similar):
        recording.close(f"{rule}_sim_{name}", value)
        recording.close(f"{rule}_weights_{name}", blip2_pretraining.negative_weights(value, rule))
    recording.equal(f"{rule}_itc_targets", np.arange(similar[0].shape[0]))


def _matching(recording, rule, model, found):
    rows, per_query, queries = found["rows"], found["per_query"], model.queries
    mask = np.pad(rows[2], ((0, 0), (queries, 0)), constant_values=True)
    recording.equal(f"{rule}_itm_input_ids", rows[1])
    recording.equal(f"{rule}_itm_attention_mask", mask)
    recording.close(f"{rule}_itm_last_hidden_state", found["matched"])
    recording.close(f"{rule}_itm_head", per_query)
    recording.close(f"{rule}_itm_logits", per_query.mean(1))
    count = per_query.shape[0]
    recording.equal(f"{rule}_itm_labels", np.arange(count) < count // 3)


@pytest.mark.golden
def test_gradients(case):
    folder, model, params, encode, start = case
    order = info_of(folder.parent)["stage1"]["parameter_order_of_grad_norm"]
    values = Recording(folder / "cases_stage1.npz")
    recording = Recording(folder / "cases_stage1_grads.npz")
    ids, mask = values.input("text_input_ids"), values.input("text_attention_mask") > 0
    features = encode(images(values.input("pixels")))
    table = contrast_table(model)

    @functools.partial(jax.jit, static_argnames=("detach",))
    def gradients(negatives, detach=True):
        """{loss name: gradient of that loss}."""

        def terms(params):
            total, metrics = blip2_pretraining.pair_loss(
                model, params, features, ids, mask, start=start, negatives=negatives, detach=detach
            )
            return jnp.stack([total, metrics["itc"], metrics["itm"], metrics["itg"]])

        rows = jax.jacrev(terms)(params)
        names = ("loss", "itc", "itm", "lm")
        return {name: jax.tree.map(lambda leaf, i=i: leaf[i], rows) for i, name in enumerate(names)}

    for rule in ("xllm", "lavis"):
        negatives = [values.input(f"{rule}_neg_{side}_idx") for side in ("image", "text")]
        found = {name: export_tree(table, tree) for name, tree in gradients(negatives).items()}
        recording.close(f"{rule}_grad_norm", norms(found["loss"], order))
        whole = np.linalg.norm(norms(found["loss"], order))
        recording.close(f"{rule}_grad_norm_global", whole)
        for name in ("itc", "itm", "lm"):
            recording.close(f"{rule}_grad_norm_loss_{name}", norms(found[name], order))
        if rule == "xllm":
            for name in order:
                recording.close(f"grad.{name}", found["loss"][name])
            gathered = export_tree(table, gradients(negatives, detach=False)["loss"])
            recording.close("fullgather_grad_norm", norms(gathered, order))
    recording.assert_all_used()


@pytest.mark.golden
def test_two_ranks_are_one_global_batch(case):
    folder, model, params, encode, start = case
    recording = Recording(folder / "cases_stage1_world2.npz")
    both = lambda name: [recording.input(f"rank{rank}_{name}") for rank in (0, 1)]  # noqa: E731
    ids = np.concatenate(both("text_input_ids"))
    mask = np.concatenate(both("text_attention_mask")) > 0
    negatives = [np.concatenate(both(f"neg_{side}_idx")) for side in ("image", "text")]
    features = encode(images(recording.input("pixels")))
    found = everything(model, params, features, ids, mask, start, negatives)
    similar, captions = found["similar"], found["logits"]
    weights = [blip2_pretraining.negative_weights(value, "xllm") for value in similar]
    size, logits = ids.shape[0] // 2, found["per_query"].mean(1)

    @jax.jit
    def loss(params):
        return blip2_pretraining.pair_loss(
            model, params, features, ids, mask, start=start, negatives=negatives, shards=2
        )

    (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    for rank in (0, 1):
        own = slice(rank * size, (rank + 1) * size)
        for name, value, weight in zip(("i2t", "t2i"), similar, weights):
            recording.close(f"rank{rank}_sim_{name}", value[own])
            recording.close(f"rank{rank}_weights_{name}", weight[own])
        recording.equal(f"rank{rank}_itc_targets", np.arange(own.start, own.stop))
        parts = [logits[i * 2 * size :][own] for i in range(3)]
        recording.close(f"rank{rank}_itm_logits", np.concatenate(parts))
        _rank_losses(recording, rank, own, similar, np.concatenate(parts), captions[own], ids, mask)
    for name in ("itc", "itm", "itg"):
        recorded = "lm" if name == "itg" else name
        mean = np.mean([recording.arrays[f"rank{rank}_loss_{recorded}"] for rank in (0, 1)])
        np.testing.assert_allclose(metrics[name], mean, atol=1e-4)
    tensors = export_tree(contrast_table(model), gradient)
    order = info_of(folder.parent)["world2"]["parameter_order_of_ddp_grad_norm"]
    recording.close("ddp_grad_norm", norms(tensors, order))
    for name in recording.names("ddp_grad.*"):
        recording.close(name, tensors[name.removeprefix("ddp_grad.")])
    recording.assert_all_used()


def _rank_losses(recording, rank, own, similar, logits, captions, ids, mask):
    """Each rank's own losses, from the rows that it owns."""
    targets = np.arange(own.start, own.stop)
    parts = [
        blip2_pretraining.smoothed_cross_entropy(value[own], targets, 0.1).mean()
        for value in similar
    ]
    itc, (itm, _) = (
        sum(parts) / 2,
        blip2_pretraining.matching(logits[:, None], np.ones(len(targets))),
    )
    itg, _ = blip2_pretraining.captioning(captions, ids[own], mask[own], 0.1)
    for name, value in (("_itc", itc), ("_itm", itm), ("_lm", itg), ("", itc + itm + itg)):
        recording.close(f"rank{rank}_loss{name}", value)


@pytest.mark.golden
def test_adamw_steps(case):
    folder, model, params, encode, start = case
    recording = Recording(folder / "cases_adamw.npz")
    values, grads = (Recording(folder / f"cases_stage1{end}.npz") for end in ("", "_grads"))
    settings = json.loads((folder / "config.json").read_text())["adamw"]
    ids, mask = values.input("text_input_ids"), values.input("text_attention_mask") > 0
    features = encode(images(values.input("pixels")))

    @jax.jit
    def differentiate(params, negatives):
        run = functools.partial(blip2_pretraining.pair_loss, start=start, negatives=negatives)
        return jax.value_and_grad(lambda p: run(model, p, features, ids, mask), has_aux=True)(
            params
        )

    state, passed = None, 0.0
    for number, rate in enumerate(settings["lr_steps"]):
        negatives = [recording.input(f"step{number}_neg_{side}_idx") for side in ("image", "text")]
        (total, metrics), gradient = differentiate(params, negatives)
        recording.close(f"step{number}_loss", total)
        for name, ours in (("itc", "itc"), ("itm", "itm"), ("lm", "itg")):
            recording.close(f"step{number}_loss_{name}", metrics[ours])
        transformation, _ = optim.make(
            Optimizer(
                schedule="constant",
                peak=rate,
                b1=settings["betas"][0],
                b2=settings["betas"][1],
                eps=settings["eps"],
                weight_decay=settings["weight_decay"],
                no_decay=optim.NO_DECAY,
            ),
            params,
            len(settings["lr_steps"]),
        )
        state = transformation.init(params) if state is None else state
        updates, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        passed += rate
        tensors = export_tree(contrast_table(model), params)
        for name in recording.names(f"step{number}_after.*"):
            source = name.removeprefix(f"step{number}_after.")
            _parameter(recording, name, tensors[source], grads.arrays[f"grad.{source}"], 2 * passed)
    recording.assert_all_used()


def _parameter(recording, name, value, gradient, loose):
    """Adam amplifies rounding where the true gradient is zero: there only the step size counts."""
    noise = recording.noise[name].get("max_abs_where_grad_gt_1e-6")
    strict = max(20 * (noise or 0.0), 2e-5 * np.abs(recording.arrays[name]).max())
    sure = (np.abs(gradient) > 1e-6) & (not name.endswith(".self.key.bias"))
    recording.close(name, value, atol=np.where(sure, strict, loose))


@pytest.fixture(scope="module")
def tiny():
    """A small fresh model with a batch of eight pairs."""
    model = ContrastModel(**SIZES["tiny"] | {"depth": 2, "dropout": 0.0})
    params = jax.jit(model.init)(jax.random.key(0), *model.example())["params"]
    random = np.random.default_rng(0)
    features = random.normal(size=(8, 5, model.encoder_width)).astype(np.float32)
    ids = random.integers(4, model.vocabulary - 1, (8, 9)).astype(np.int32)
    mask = np.arange(9) < random.integers(3, 10, (8, 1))
    return model, params, features, ids, mask


def test_negatives_follow_the_weights_and_never_hit_the_own_pair():
    similar = jnp.array([[9.0, 1.0, -50.0], [0.0, 9.0, 2.0], [3.0, 3.0, 9.0]])
    draw = jax.jit(
        jax.vmap(lambda key: blip2_pretraining.sample_negatives(key, similar, similar, "xllm")[0])
    )
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    weights = np.asarray(blip2_pretraining.negative_weights(similar, "xllm"))
    shares = weights / weights.sum(-1, keepdims=True)
    assert np.all(drawn != np.arange(3))
    for row in range(3):
        counts = np.bincount(drawn[:, row], minlength=3) / len(drawn)
        np.testing.assert_allclose(counts, shares[row], atol=0.04)
    lavis = np.asarray(blip2_pretraining.negative_weights(similar, "lavis"))
    np.testing.assert_allclose(lavis.sum(-1), 1, rtol=1e-6)
    assert np.all(np.diag(lavis) == 0)
    with pytest.raises(ValueError, match="negative rule"):
        blip2_pretraining.negative_weights(similar, "blip")


def test_detached_itc_trains_one_side_per_direction():
    key = jax.random.split(jax.random.key(0))
    image, text = jax.random.normal(key[0], (4, 3, 8)), jax.random.normal(key[1], (4, 8))
    to_text = lambda i, t: blip2_pretraining.similarities(i, t, 0.07)[0].sum()  # noqa: E731
    image_gradient, text_gradient = jax.grad(to_text, (0, 1))(image, text)
    assert np.abs(image_gradient).max() > 0 and not np.any(text_gradient)


def test_itg_shards_are_means_of_means():
    random = np.random.default_rng(1)
    logits = random.normal(size=(4, 6, 11)).astype(np.float32)
    ids = random.integers(0, 11, (4, 6))
    mask = np.arange(6) < np.array([[6], [5], [2], [3]])
    halves = [
        blip2_pretraining.captioning(logits[part], ids[part], mask[part], 0.1)[0]
        for part in (slice(0, 2), slice(2, 4))
    ]
    whole, _ = blip2_pretraining.captioning(logits, ids, mask, 0.1)
    sharded, _ = blip2_pretraining.captioning(logits, ids, mask, 0.1, shards=2)
    np.testing.assert_allclose(sharded, np.mean(halves), rtol=1e-6)
    assert abs(whole - sharded) > 1e-3


def test_training_lowers_every_loss_and_reaches_every_parameter(tiny):
    model, params, features, ids, mask = tiny
    settings = Optimizer(schedule="constant", peak=2e-3, no_decay=optim.NO_DECAY)
    transformation, _ = optim.make(settings, params, 150)

    @jax.jit
    def step(params, state, key):
        run = lambda p: blip2_pretraining.pair_loss(  # noqa: E731
            model, p, features, ids, mask, key, start=3, train=True
        )
        (_, metrics), gradient = jax.value_and_grad(run, has_aux=True)(params)
        updates, state = transformation.update(gradient, state, params)
        reached = jax.tree.map(lambda leaf: jnp.any(leaf != 0), gradient)
        return optax.apply_updates(params, updates), state, metrics, reached

    state, history = transformation.init(params), []
    for number in range(150):
        params, state, metrics, reached = step(params, state, jax.random.key(number))
        assert all(jax.tree.leaves(reached)), "a parameter without gradient"
        history.append(metrics)
    for name in ("itc", "itm", "itg"):
        assert history[-1][name] < 0.8 * history[0][name], name
    assert history[-1]["itc_accuracy"] > 0.9


def test_rows_without_a_pair_count_nowhere():
    random = np.random.default_rng(2)
    weights = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    to_text, to_image = random.normal(size=(2, 8, 8)).astype(np.float32)
    whole = blip2_pretraining.contrastive(to_text, to_image, 0.1, weights)
    alone = blip2_pretraining.contrastive(to_text[:5, :5], to_image[:5, :5], 0.1, weights[:5])
    np.testing.assert_allclose(whole, alone, rtol=1e-6)
    per_query = random.normal(size=(24, 3, 2)).astype(np.float32)
    kept = np.concatenate([part[:5] for part in np.split(per_query, 3)])
    whole = blip2_pretraining.matching(per_query, weights)
    np.testing.assert_allclose(whole, blip2_pretraining.matching(kept, weights[:5]), rtol=1e-6)
    for rule in ("xllm", "lavis"):
        draw = lambda key, rule=rule: blip2_pretraining.sample_negatives(  # noqa: E731
            key, to_text, to_image, rule, weights
        )
        images_, texts = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 2000))
        assert set(np.unique(images_)) == set(np.unique(texts)) == {0, 1, 2, 3, 4}
