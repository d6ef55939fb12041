"""What BLIP-2's first stage starts from a BERT: by the command, against transformers' own BERT."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from xllm_jax.assembly import parameters
from xllm_jax.convert import files, run_export, run_import
from xllm_jax.convert.sources import bert_qformer
from xllm_jax.core import checkpoint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.models.blip2_pretraining import SIZES, ContrastModel

torch = pytest.importorskip("torch")
FIELDS = SIZES["tiny"]
WORDS = 60


@pytest.fixture(scope="module")
def peer():
    """transformers' BERT with a language head, as a causal decoder without segments."""
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=FIELDS["width"],
        num_hidden_layers=FIELDS["depth"],
        num_attention_heads=FIELDS["heads"],
        intermediate_size=FIELDS["hidden"],
        max_position_embeddings=FIELDS["positions"],
        is_decoder=True,
    )
    model = BertLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.bert.embeddings.token_type_embeddings.weight.zero_()  # a Q-Former has none
    return model


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    peer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(f"w{n}" for n in range(WORDS)) + "\n")
    return folder


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("bases") / "bert_qformer"
    return output, run_import.run_import("bert_qformer", folder, output)


def test_words_and_queries_start_as_transformers_bert(base, peer):
    """The text branch, loaded as stage 1 loads it, gives BERT's logits; the queries' copies too."""
    output, done = base
    model = ContrastModel(**FIELDS | {"vocabulary": WORDS + 1})
    drawn = jax.jit(model.init)(jax.random.key(1), *model.example())["params"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        path: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=here)
        for path, x in rules.flatten(drawn).items()
    }
    flat = rules.flatten(drawn)
    for part in ("qformer", "language_head"):
        wanted = {f"image_interface/{p}": x for p, x in like.items() if p.startswith(part + "/")}
        found = parameters.load(f"{output}:{part}*", f"image_interface/{part}", wanted)
        taken = {path.removeprefix("image_interface/"): leaf for path, leaf in found.items()}
        left = {p.removeprefix("image_interface/") for p in wanted} - taken.keys()
        assert all("cross_attention" in path for path in left) and bool(left) == (part == "qformer")
        flat |= taken
    copies = [path for path in flat if "query_feed_forward" in path]
    assert copies
    for path in copies:
        text = flat[path.replace("query_feed_forward", "text_feed_forward")]
        np.testing.assert_array_equal(flat[path], text)
    ids = np.random.default_rng(0).integers(0, WORDS, (2, 9))
    with torch.no_grad():
        expected = peer(torch.as_tensor(ids)).logits.numpy()
    params = {"params": rules.unflatten(flat)}

    def logits(module, ids):
        states, _ = module.qformer(ids=ids, text_mask=np.ones(ids.shape, bool), causal=True)
        return module.scores(states)

    ours = np.asarray(jax.jit(functools.partial(model.apply, method=logits))(params, ids))
    np.testing.assert_allclose(ours[..., :-1], expected, atol=2e-5 * np.abs(expected).max())
    assert done.options["added"] == 1 and not done.fresh


def test_the_added_row_is_drawn_and_told(base, peer):
    output, done = base
    leaves = checkpoint.open_leaves(output)
    words = leaves["qformer/embeddings/words"].read().result()
    assert words.shape == (WORDS + 1, FIELDS["width"])
    np.testing.assert_array_equal(words[:-1], peer.bert.embeddings.word_embeddings.weight.detach())
    assert 0.01 < words[-1].std() < 0.03 and done.options["seed"] == bert_qformer.SEED
    assert bert_qformer.WORDS in done.computed
    assert leaves["language_head/bias"].read().result()[-1] == 0


def test_goes_back_bit_by_bit_and_not_once_the_queries_have_learnt(base, folder, tmp_path):
    output, done = base
    run_export.run_export("bert_qformer", output, tmp_path / "back")
    back, source = (files.open_checkpoint(path) for path in (tmp_path / "back", folder))
    assert set(back) == source.keys() - done.dropped.keys()
    assert all(back[name].tobytes() == source[name].tobytes() for name in back)
    flat = {path: leaf.read().result() for path, leaf in checkpoint.open_leaves(output).items()}
    path = next(path for path in flat if path.endswith("query_feed_forward/up/bias"))
    flat[path] = flat[path] + 1
    checkpoint.save_base(tmp_path / "trained", rules.unflatten(flat), {})
    (tmp_path / "trained" / "conversion.json").write_bytes(
        (output / "conversion.json").read_bytes()
    )
    with pytest.raises(UserError, match="no place for it"):
        run_export.run_export("bert_qformer", tmp_path / "trained", tmp_path / "no")


def test_room_behind_the_vocabulary_and_an_untied_head(folder, tmp_path):
    tensors = {name: x.copy() for name, x in files.open_checkpoint(folder).items()}
    write = lambda: run_export.write_shards(tensors, tmp_path)  # noqa: E731
    write()
    (tmp_path / "vocab.txt").write_text("\n".join(f"w{n}" for n in range(WORDS - 5)))
    opened = files.open_checkpoint(tmp_path)
    assert bert_qformer.recognize(opened)
    assert bert_qformer.options(opened, "")["added"] == 0
    tensors["cls.predictions.decoder.weight"] = tensors[bert_qformer.WORDS] + 1
    write()
    with pytest.raises(UserError, match=r"decoder\.weight.*tied"):
        run_import.run_import("bert_qformer", tmp_path, tmp_path / "base")
