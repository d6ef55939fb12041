"""P-Tuning prefixes of ChatGLM against a small PyTorch rewrite of the reference's forward pass."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from xllm_jax.convert import export_tree, files, import_tree, run_export, run_import, sizes
from xllm_jax.convert.sources import chatglm, chatglm_prefix
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.data.text import glm_layout, token_rows
from xllm_jax.data.text.glm_layout import Specials
from xllm_jax.inference import decoding
from xllm_jax.models import glm, glm_prefix
from xllm_jax.models.xllm import XLLM

torch = pytest.importorskip("torch")

SMALL = dict(vocab=96, width=32, depth=2, heads=2, hidden=64)
SPECIALS = Specials(mask=90, gmask=91, sop=92, eop=93, pad=3)


def tensors_of(model: glm.ChatGLM) -> dict[str, np.ndarray]:
    """A random float32 checkpoint under the published names."""
    generator = np.random.default_rng(0)
    params = {
        path: (path.endswith("scale") + 0.3 * generator.normal(size=x.shape)).astype(np.float32)
        for path, x in rules.flatten(sizes.shapes_of(model)).items()
    }
    return export_tree(chatglm.rows(model.depth, model.heads), rules.unflatten(params))


def norm(tensors, name, x):
    weight, bias = (tensors[f"{name}.{kind}"] for kind in ("weight", "bias"))
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def linear(tensors, name, x):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def turn(x, positions):
    """Two-dimensional rotary positions on `[T, heads, head_dim]`, one half of a head each."""
    halves = []
    for half, position in zip(x.chunk(2, dim=-1), positions.T):
        size = half.shape[-1]
        frequency = (1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)).half().float()
        angle = torch.outer(position.float(), frequency).repeat(1, 2)[:, None]
        first, second = half.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        halves.append(half * angle.cos() + turned * angle.sin())
    return torch.cat(halves, dim=-1)


def reference_logits(tensors, model, row, past):
    """ChatGLM on one sequence with `past[layer] = (keys, values)` `[P, heads, head_dim]` before it.

    The reference's forward pass in the original names: a prefix is a past whose keys are not
    turned, which every query sees and which moves no position.
    """
    count, alpha = len(row.ids), (2 * 28) ** 0.5
    order, context = np.arange(count), np.asarray(row.context)
    seen = torch.from_numpy(context[None] | (order[None] <= order[:, None]))
    prefix = past[0][0].shape[0]
    seen = torch.cat([torch.ones(count, prefix, dtype=torch.bool), seen], dim=1)
    positions = torch.from_numpy(np.asarray(row.positions))
    x = tensors[chatglm.WORDS][torch.tensor(np.asarray(row.ids))]
    for number, (old_key, old_value) in enumerate(past):
        start = f"transformer.layers.{number}"
        x = norm(tensors, f"{start}.input_layernorm", x)
        qkv = linear(tensors, f"{start}.attention.query_key_value", x)
        query, key, value = qkv.view(count, model.heads, -1).chunk(3, dim=-1)
        query, key = turn(query, positions), turn(key, positions)
        key, value = torch.cat([old_key, key]), torch.cat([old_value, value])
        scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(~seen, -10000.0).softmax(dim=-1)
        mixed = torch.einsum("hqk,khd->qhd", scores, value).reshape(count, -1)
        x = x * alpha + linear(tensors, f"{start}.attention.dense", mixed)
        x = norm(tensors, f"{start}.post_attention_layernorm", x)
        inner = linear(tensors, f"{start}.mlp.dense_h_to_4h", x)
        inner = torch.nn.functional.gelu(inner, approximate="tanh")
        x = x * alpha + linear(tensors, f"{start}.mlp.dense_4h_to_h", inner)
    return norm(tensors, "transformer.final_layernorm", x) @ tensors[chatglm.WORDS].T


class PrefixEncoder(torch.nn.Module):
    """The reference's prefix encoder, `get_prompt` included."""

    def __init__(self, model, length, projection):
        super().__init__()
        outputs = model.depth * 2 * model.width
        self.embedding = torch.nn.Embedding(length, model.width if projection else outputs)
        if projection:
            self.trans = torch.nn.Sequential(
                torch.nn.Linear(model.width, model.width),
                torch.nn.Tanh(),
                torch.nn.Linear(model.width, outputs),
            )
        self.sizes = (length, model.depth * 2, model.heads, model.width // model.heads)

    def forward(self):
        x = self.embedding.weight[None]
        x = self.trans(x) if hasattr(self, "trans") else x
        states = x.view(1, *self.sizes).permute(2, 1, 0, 3, 4).split(2)
        return [(pair[0][:, 0], pair[1][:, 0]) for pair in states]


def prefix_file(model, projection, folder):
    """Writes what the training script saves; returns the past that the reference makes of it."""
    torch.manual_seed(1)
    encoder = PrefixEncoder(model, 5, projection)
    state = {f"{chatglm_prefix.ENCODER}{name}": t for name, t in encoder.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    config = chatglm.config_of(model, SPECIALS) | {"pre_seq_len": 5}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        return encoder()


def load_prefix(folder):
    """(network, parameters, plan)."""
    checkpoint = files.open_checkpoint(folder)
    assert chatglm_prefix.recognize(checkpoint)
    options = json.loads(json.dumps(chatglm_prefix.options(checkpoint, "")))
    plan = chatglm_prefix.plan(options)
    source = chatglm_prefix.prepare(checkpoint, options)
    tree, report = import_tree(plan.table, source, plan.shapes, drop=plan.drop)
    assert not report.fresh and not report.dropped
    sizes = {name: options[name] for name in ("length", "depth", "width", "heads")}
    return glm_prefix.Prefix(**sizes), tree[chatglm_prefix.PART], plan


@pytest.fixture(scope="module")
def llm():
    """(float32 model, its parameters, its tensors for torch)."""
    model = glm.ChatGLM(**SMALL)
    tensors = tensors_of(model)
    params, _ = import_tree(chatglm.rows(2, 2), tensors, sizes.shapes_of(model))
    return model, params, {name: torch.from_numpy(x.copy()) for name, x in tensors.items()}


@pytest.mark.parametrize("projection", [False, True])
def test_logits_behind_a_prefix(llm, projection, tmp_path):
    """Rows of different length, packed texts and padding, against torch one text at a time."""
    model, params, tensors = llm
    past = prefix_file(model, projection, tmp_path)
    network, states, _ = load_prefix(tmp_path)
    prompts = [[7, 8, 9, 91, 92, 20, 21], [10, 11, 91, 92, 22], [30, 31, 32, 90, 33, 92, 23]]
    rows = [glm_layout.sequence(prompt, SPECIALS) for prompt in prompts]
    packed = token_rows.pack([rows[:2], rows[2:]], 16, 16, SPECIALS.pad)

    @jax.jit
    def run(params, states, ids, *layout):
        variables = {"params": params}
        prefix = network.apply({"params": states})
        cache = model.apply(variables, 2, 16, prefix=prefix, method="init_cache")
        x = model.apply(variables, ids, method="embed")
        final, cache = model.apply(variables, x, *layout, cache)
        return model.apply(variables, final, method="logits"), cache["length"]

    layout = (packed.segments, packed.context, packed.positions)
    logits, lengths = run(params, states, packed.ids, *layout)
    np.testing.assert_array_equal(lengths, [5 + 12, 5 + 7])
    for row, place, start in ((rows[0], 0, 0), (rows[1], 0, 7), (rows[2], 1, 0)):
        with torch.no_grad():
            expected = reference_logits(tensors, model, row, past).numpy()
            plain = [(key[:0], value[:0]) for key, value in past]
            without = reference_logits(tensors, model, row, plain).numpy()
        ours = logits[place, start : start + len(row.ids)]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(ours, expected, atol=1e-5 * scale)
        assert np.abs(expected - without).max() > 0.05 * scale


def test_generation_behind_a_prefix(llm, tmp_path):
    """Beams continue behind prefix and prompt; their scores are those of torch."""
    model, params, tensors = llm
    past = prefix_file(model, False, tmp_path)
    network, states, _ = load_prefix(tmp_path)
    prompts = [[7, 8, 9, 12, 91, 92], [10, 11, 91, 92]]
    rows = [glm_layout.sequence(prompt, SPECIALS) for prompt in prompts]
    batch = decoding.prompt_batch(rows, SPECIALS.pad, (8,))
    xllm = XLLM({"llm": model, "llm_prefix": network})
    options = decoding.Decoding((93,), 3, (0, 1), max_new_tokens=4, beams=3)
    made = decoding.generate(xllm, {"llm": params, "llm_prefix": states}, batch, options)
    for number, prompt in enumerate(prompts):
        for answer, score in zip(made.tokens[number].tolist(), made.scores[number]):
            answer = answer[: answer.index(93) + 1] if 93 in answer else answer
            whole = [*prompt, *answer]
            row = glm_layout.sequence(whole, SPECIALS)
            with torch.no_grad():
                gains = reference_logits(tensors, model, row, past).log_softmax(-1)
            total = sum(float(gains[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
            length = len(whole) - (93 in answer)  # the end token is no part of the length
            np.testing.assert_allclose(score, total / length, atol=1e-4)


def test_a_prefix_file_comes_back_bit_by_bit(llm, tmp_path):
    model, _, _ = llm
    prefix_file(model, False, tmp_path)
    source = files.open_checkpoint(tmp_path)
    _, params, plan = load_prefix(tmp_path)
    back = export_tree(plan.table, {chatglm_prefix.PART: params})
    assert back.keys() == set(source) == {chatglm_prefix.TABLE}
    assert back[chatglm_prefix.TABLE].tobytes() == source[chatglm_prefix.TABLE].tobytes()
    tree = plan.shapes[chatglm_prefix.PART]
    rules.assign(glm_prefix.SHARDING, tree, what="glm_prefix.SHARDING")
    ours = chatglm_prefix.plan(chatglm_prefix.options(None, "real"))
    assert ours.shapes[chatglm_prefix.PART]["states"].shape == (28, 2, 128, 32, 128)


def test_the_command_takes_a_prefix_there_and_back(llm, tmp_path):
    """With a projection, what comes back is the plain table that torch makes of it."""
    (tmp_path / "tuned").mkdir()
    past = prefix_file(llm[0], True, tmp_path / "tuned")
    run_import.run_import("chatglm_prefix", tmp_path / "tuned", tmp_path / "base")
    run_export.run_export("chatglm_prefix", tmp_path / "base", tmp_path / "back")
    back = files.open_checkpoint(tmp_path / "back")
    assert set(back) == {chatglm_prefix.TABLE}
    expected = torch.stack([x for pair in past for x in pair], dim=1).reshape(5, -1)
    np.testing.assert_allclose(back[chatglm_prefix.TABLE], expected.numpy(), atol=1e-6)


FIRST = chatglm_prefix.PROJECTION[0]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: s.pop(FIRST), FIRST),
        (lambda s: s.update({FIRST: s[FIRST][:, 1:]}), FIRST),
        (lambda s: s.update({chatglm_prefix.TABLE: torch.zeros(5, 7)}), chatglm_prefix.TABLE),
    ],
)
def test_a_wrong_prefix_file_is_refused_by_name(change, name, llm, tmp_path):
    prefix_file(llm[0], True, tmp_path)
    file = tmp_path / "pytorch_model.bin"
    state = torch.load(file)
    change(state)
    torch.save(state, file)
    with pytest.raises(UserError) as caught:
        load_prefix(tmp_path)
    assert caught.value.field.endswith(name)


def test_a_prefix_of_another_llm_is_refused(llm, tmp_path):
    """Without the LLM's config.json the real sizes are taken, which this file does not have."""
    prefix_file(llm[0], False, tmp_path)
    checkpoint = files.open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="unknown size"):
        chatglm_prefix.options(checkpoint, "huge")
    with pytest.raises(UserError, match="28 layers"):
        chatglm_prefix.options(checkpoint, "real")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="28 layers") as caught:
        chatglm_prefix.options(checkpoint, "")
    assert caught.value.field.endswith(chatglm_prefix.TABLE)
