"""BERT against transformers with random weights, and what its masks and dropout must do."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.sources import bert as table
from xllm_jax.core import rules
from xllm_jax.models.bert import SHARDING, SIZES, BertEncoder

SMALL = dict(width=32, depth=3, heads=4, hidden=48, vocabulary=50, positions=24, pooler=True)


@pytest.fixture(scope="module")
def peer():
    """transformers' BertModel with random weights, norms and biases included."""
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
        type_vocab_size=2,
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def ours(peer):
    """Our module and the peer's parameters in our tree."""
    model = BertEncoder(**SMALL)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    source = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    rows = table.rows(3, 4, source=table.prefix_of(source), pooler=True)
    tree, report = import_tree(rows, source, shapes, drop=table.DROP)
    assert not report.fresh
    exported = export_tree(rows, tree)
    assert exported.keys() == report.used.keys()
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor, source[name])
    return model, {"params": tree}


def test_equals_transformers_on_ids_and_embeddings(peer, ours):
    import torch

    model, params = ours
    random = np.random.default_rng(0)
    ids, types = random.integers(0, 50, (2, 9)), random.integers(0, 2, (2, 9))
    mask = np.arange(9)[None] < np.array([[9], [5]])
    vectors = random.normal(size=(2, 9, 32)).astype(np.float32)
    apply = jax.jit(model.apply)
    with torch.no_grad():
        tensors = {"attention_mask": torch.tensor(mask), "token_type_ids": torch.tensor(types)}
        by_ids = peer(torch.tensor(ids), **tensors)
        by_vectors = peer(inputs_embeds=torch.tensor(vectors), **tensors)
    for expected, value in (
        (by_ids, apply(params, ids, mask, types=types)),
        (by_vectors, apply(params, mask=mask, embeddings=vectors, types=types)),
    ):
        np.testing.assert_allclose(
            value[0][mask], expected.last_hidden_state.numpy()[mask], atol=1e-5
        )
        np.testing.assert_allclose(value[1], expected.pooler_output.numpy(), atol=1e-5)


def test_published_files_with_old_names(peer, ours, tmp_path):
    """bert-base as it is published: 'gamma' and 'beta', heads, a file from before zip archives."""
    import torch

    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    held = {}
    for name, tensor in peer.state_dict().items():
        for new, kind in old.items():
            name = name.replace(new, kind)
        held[f"bert.{name}"] = tensor
    heads = {"cls.predictions.bias": torch.zeros(50), "cls.seq_relationship.bias": torch.zeros(2)}
    path = tmp_path / "pytorch_model.bin"
    torch.save(held | heads, path, _use_new_zipfile_serialization=False)
    source = open_checkpoint(tmp_path)
    model, params = ours
    rows = table.rows(model.depth, model.heads, source=table.prefix_of(source), pooler=True)
    rows = table.named_as(rows, source)
    tree, report = import_tree(rows, source, params["params"], drop=table.DROP)
    assert report.dropped.keys() == heads.keys()
    jax.tree.map(np.testing.assert_array_equal, tree, params["params"])
    back = export_tree(rows, tree)
    assert back.keys() == held.keys()
    assert all(back[name].tobytes() == held[name].numpy().tobytes() for name in held)


def test_padding_changes_nothing_and_dropout_only_in_training(ours):
    model, params = ours
    ids = np.arange(12).reshape(1, 12) % 50
    mask = np.arange(12)[None] < 7
    run, train = jax.jit(model.apply), jax.jit(functools.partial(model.apply, train=True))
    short, _ = run(params, ids[:, :7])
    long, _ = run(params, ids, mask)
    np.testing.assert_allclose(long[:, :7], short, atol=1e-5)
    rngs = {"dropout": jax.random.key(1)}
    noisy, _ = train(params, ids, mask, rngs=rngs)
    assert np.abs(noisy - long).max() > 0.1
    with pytest.raises(ValueError, match="positions"):
        model.apply(params, np.zeros((1, 25), np.int32))


def test_scan_unroll_and_remat_agree_and_every_leaf_has_a_sharding_row():
    ids = np.arange(10).reshape(1, 10)
    model = BertEncoder(**SMALL)
    params = jax.jit(model.init)(jax.random.key(0), ids)
    expected, _ = jax.jit(model.apply)(params, ids)
    other = BertEncoder(**SMALL, unroll=3, remat="all")
    value, _ = jax.jit(other.apply)(params, ids)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    rules.assign(SHARDING, params["params"], what="bert.SHARDING")


def test_published_size():
    """As many parameters as transformers' bert-base with the Chinese vocabulary."""
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        peer = BertModel(BertConfig(vocab_size=SIZES["bert_base_chinese"]["vocabulary"]))
    model = BertEncoder(**SIZES["bert_base_chinese"], pooler=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == sum(parameter.numel() for parameter in peer.parameters()) == 102_267_648
