"""The mini BERT's data and objective: what is hidden, and losses against a NumPy rewrite."""

import jax
import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.sources import world_text
from xllm_jax.data.text.wordpiece import WordPiece
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import unilm

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"图中有一个大小的红绿蓝黄紫白色圆方三角星十字形左右上下边面间",
]
LENGTH = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("sentences") / "vocab.txt"
    vocabulary.write_text("\n".join(PIECES), "utf-8")
    source = Source("world_text", options={"count": 50, "shares": {"caption_scene": 1.0}})
    return Data(
        batch_format="text_pairs",
        sources={"text": source},
        vocabulary=str(vocabulary),
        examples=6,
        text_length=LENGTH,
    )


@pytest.fixture(scope="module")
def batch(data):
    return next(Pipeline(data, 3).iterate())[0]


def test_joined_texts_hide_some_pieces_and_never_the_ends(data, batch):
    kit = WordPiece(data.vocabulary)
    hidden = batch.hidden > 0
    assert 0 < hidden.sum() < 0.4 * batch.joined_mask.sum()
    assert (batch.joined[hidden] == PIECES.index("[MASK]")).all()
    assert (batch.joined[~hidden] == batch.targets[~hidden]).all()
    assert not np.isin(batch.targets[hidden], [kit.begin, kit.end, kit.pad]).any()
    for row in range(6):
        first = batch.first[row][batch.first_mask[row]]
        second = batch.second[row][batch.second_mask[row]]
        assert first[0] == second[0] == kit.begin and first[-1] == second[-1] == kit.end
        pieces = batch.targets[row][batch.joined_mask[row]]
        assert pieces.tolist() == [*first, *second[1:]]


def test_the_same_step_hides_the_same_pieces(data, batch):
    again = next(Pipeline(data, 3).iterate())[0]
    jax.tree.map(np.testing.assert_array_equal, batch, again)


def test_an_unknown_kind_of_text_is_refused():
    with pytest.raises(UserError, match="no kind 'capton_scene'"):
        world_text.examples("", shares={"capton_scene": 1.0})


def test_losses_are_means_over_hidden_and_over_written_pieces(batch):
    network = ContrastModel(
        queries=2, width=16, depth=2, heads=2, hidden=24, vocabulary=len(PIECES) + 1,
        positions=2 * LENGTH, embed=8, encoder_width=8, dropout=0.0,
    )  # fmt: skip
    params = jax.jit(network.init)(jax.random.key(0), *network.example())["params"]
    model = XLLM(networks={"text_model": network})
    run = jax.jit(lambda params, batch: unilm.loss(model, params, batch, train=True))
    whole, metrics = run({"text_model": params}, batch)

    @jax.jit
    def scores(ids, mask):
        states, _ = network.apply({"params": params}, ids, mask, method="text")
        return network.apply({"params": params}, states, method="scores")

    @jax.jit
    def captioned(first, first_mask, ids, mask):
        read = lambda m: m.qformer(ids=first, text_mask=first_mask, keep_cache=True)  # noqa: E731
        _, cache = network.apply({"params": params}, method=read)
        return network.apply({"params": params}, ids, mask, cache, method="caption")[1]

    logits = np.asarray(scores(batch.joined, batch.joined_mask), np.float64)
    masked = _losses(logits, batch.targets)[batch.hidden > 0].mean()

    # One pass over both texts, each row without padding: the first sees itself, the second what
    # stands before it. A row alone must be written with the same loss as in the batch.
    ids = batch.second.copy()
    ids[:, 0] = len(PIECES)
    found = []
    for row in range(len(ids)):
        real = batch.second_mask[row]
        read = (x[row : row + 1] for x in (batch.first, batch.first_mask))
        logits = captioned(*read, ids[row : row + 1, real], real[None, real])
        found.append(_losses(np.asarray(logits, np.float64)[0, :-1], ids[row, real][1:]))
    written = np.concatenate(found).mean()
    np.testing.assert_allclose(metrics["masked"], masked, rtol=1e-5)
    np.testing.assert_allclose(metrics["written"], written, rtol=1e-5)
    np.testing.assert_allclose(whole, masked + written, rtol=1e-5)


def _losses(logits, targets):
    highest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    return total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
