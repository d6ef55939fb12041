"""The conversion engine against hand-written transpositions, and every table both ways."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from xllm_jax.convert import Drop, Row, export_tree, files, import_tree
from xllm_jax.convert.sources import bert, blip2, chatglm, cif_asr, eva_vit
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import (
    asr,
    blip2_pretraining,
    conformer,
    glm,
    interfaces,
    speech_interface,
    vit,
)
from xllm_jax.models.bert import SIZES as BERT_SIZES
from xllm_jax.models.bert import BertEncoder

# pattern, axis lengths, shape of the source, the same rearrangement in plain NumPy
FORMS: tuple[tuple[str, tuple, tuple, Callable], ...] = (
    ("", (), (4, 3), lambda x: x),
    ("", (), (6,), lambda x: x),
    ("o i -> i o", (), (4, 3), lambda x: x.T),
    ("(h k) -> h k", (("h", 2),), (6,), lambda x: np.stack([x[:3], x[3:]])),
    (
        "(h k) d -> d h k",
        (("h", 2),),
        (6, 5),
        lambda x: np.stack([x[:3].T, x[3:].T], axis=1),
    ),
    (
        "d (h k) -> h k d",
        (("h", 2),),
        (4, 6),
        lambda x: np.stack([x[:, :3].T, x[:, 3:].T]),
    ),
    (
        "(h c k) d -> d c h k",
        (("h", 2), ("c", 3)),
        (12, 5),
        lambda x: x.reshape(2, 3, 2, 5).transpose(3, 1, 0, 2),
    ),
    ("d c p q -> p q c d", (), (4, 3, 2, 2), lambda x: x.transpose(2, 3, 1, 0)),
    ("o i 1 -> i o", (), (4, 3, 1), lambda x: x[..., 0].T),
    ("o 1 i j -> (i j) o", (("i", 2),), (4, 1, 2, 3), lambda x: x.reshape(4, 6).T),
)
DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)


def random_bits(generator, shape, dtype) -> np.ndarray:
    """Any bit pattern there is: NaNs, infinities, subnormals and negative zeros too."""
    data = generator.bytes(int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def same_bits(first, second) -> bool:
    first, second = np.asarray(first), np.asarray(second)
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and first.tobytes() == second.tobytes()


def draw_table(generator) -> tuple[list[Row], dict, dict]:
    """A random table with its source and the leaves that NumPy makes of it."""
    table, source, leaves = [], {}, {}
    for number in range(generator.integers(1, 7)):
        dtype = DTYPES[generator.integers(len(DTYPES))]
        pattern, sizes, shape, by_hand = FORMS[generator.integers(len(FORMS))]
        layers = tuple(int(n) for n in generator.permutation(6)[: generator.integers(1, 4)])
        layers = layers if generator.random() < 0.5 else None
        count = int(generator.integers(1, 4))
        zeros = tuple(p for p in range(count) if generator.random() < 0.3) if count > 1 else ()
        zeros = zeros[: count - 1]
        name = f"source.{{layer}}.{number}" if layers else f"source.{number}"
        parts = {}
        for layer in layers or (None,):
            for part in range(count):
                drawn = random_bits(generator, shape, dtype)
                parts[layer, part] = np.zeros(shape, dtype) if part in zeros else drawn
            whole = np.concatenate([parts[layer, part] for part in range(count)])
            source[name.replace("{layer}", str(layer))] = whole
        for part in sorted(set(range(count)) - set(zeros)):
            target = f"group/leaf_{number}/part_{part}"
            piece = (part, count) if count > 1 else None
            table.append(Row(name, target, pattern, layers, sizes, piece, zeros))
            made = [by_hand(parts[layer, part]) for layer in layers or (None,)]
            leaves[target] = np.stack(made) if layers else made[0]
    return table, source, leaves


@pytest.mark.parametrize("seed", range(25))
def test_a_random_table_equals_numpy_and_comes_back_bit_by_bit(seed):
    generator = np.random.default_rng(seed)
    table, source, leaves = draw_table(generator)
    generator.shuffle(table)
    shapes = rules.unflatten({p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in leaves.items()})
    tree, report = import_tree(table, source, shapes)
    flat = rules.flatten(tree)
    assert flat.keys() == leaves.keys()
    for path, leaf in leaves.items():
        assert same_bits(flat[path], leaf), path
    assert report.used.keys() == source.keys() and not report.dropped and not report.fresh
    back = export_tree(table, tree)
    assert back.keys() == source.keys()
    for name, tensor in source.items():
        assert same_bits(back[name], tensor), name


LAYERS = (0, 1, 2)
HEADS = (("h", 2),)
TABLE = (
    Row("words", "embedding"),
    Row("block.{layer}.up", "layers/up", "o i -> i o", LAYERS),
    Row("block.{layer}.bias", "layers/query", "(h k) -> h k", LAYERS, HEADS, (0, 3), (1,)),
    Row("block.{layer}.bias", "layers/value", "(h k) -> h k", LAYERS, HEADS, (2, 3), (1,)),
)


def good_source() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    source = {"words": generator.normal(size=(7, 4)).astype(np.float16)}
    for layer in LAYERS:
        source[f"block.{layer}.up"] = generator.normal(size=(5, 4)).astype(np.float16)
        bias = generator.normal(size=12).astype(np.float16)
        bias[4:8] = 0
        source[f"block.{layer}.bias"] = bias
    return source


def good_shapes() -> dict:
    shapes = {"embedding": (7, 4), "layers/up": (3, 4, 5)}
    shapes |= {"layers/query": (3, 2, 2), "layers/value": (3, 2, 2)}
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def nonzero_key(source):
    source["block.1.bias"][5] = 1e-4


# what is done to a source that fits, and the name that must be told
BROKEN = {
    "missing": (lambda s: s.pop("block.2.up"), "block.2.up"),
    "missing piece": (lambda s: s.pop("block.1.bias"), "block.1.bias"),
    "extra": (lambda s: s.update(surplus=np.zeros(3)), "surplus"),
    "larger": (lambda s: s.update(words=np.zeros((8, 4), np.float16)), "words"),
    "one layer larger": (
        lambda s: s.update({"block.1.up": np.zeros((6, 4), np.float16)}),
        "block.1.up",
    ),
    "too few axes": (lambda s: s.update({"block.0.up": np.zeros(5, np.float16)}), "block.0.up"),
    "scalar": (lambda s: s.update({"block.2.bias": np.float16(0)}), "block.2.bias"),
    "not in three": (
        lambda s: s.update({"block.2.bias": np.zeros(13, np.float16)}),
        "block.2.bias",
    ),
    "odd heads": (lambda s: s.update({"block.1.bias": np.zeros(9, np.float16)}), "block.1.bias"),
    "key bias": (nonzero_key, "block.1.bias"),
    "other dtype": (
        lambda s: s.update({"block.2.up": s["block.2.up"].astype(ml_dtypes.bfloat16)}),
        "block.2.up",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_source_that_does_not_fit_is_refused_by_name(case):
    change, name = BROKEN[case]
    source, shapes = good_source(), rules.unflatten(good_shapes())
    import_tree(TABLE, source, shapes)
    change(source)
    with pytest.raises(UserError) as caught:
        import_tree(TABLE, source, shapes)
    assert caught.value.field == name and str(caught.value).startswith(f"{name}: ")
    assert caught.value.hint


def test_a_leaf_that_nothing_fills_is_refused_unless_it_is_fresh():
    flat = good_shapes() | {"adapter/kernel": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    shapes = rules.unflatten(flat)
    with pytest.raises(UserError, match="adapter/kernel"):
        import_tree(TABLE, good_source(), shapes)
    with pytest.raises(UserError, match="adapter/kernel"):
        import_tree(TABLE, good_source(), shapes, fresh=("adapter",))  # patterns are whole paths
    tree, report = import_tree(TABLE, good_source(), shapes, fresh=("adapter/.*",))
    assert report.fresh == ("adapter/kernel",)
    assert "adapter" not in tree and rules.flatten(tree).keys() == good_shapes().keys()


def test_a_dropped_tensor_is_reported_with_its_reason():
    source, shapes = good_source(), rules.unflatten(good_shapes())
    source |= {"head.weight": np.zeros(3), "head.bias": np.zeros(3)}
    drops = (Drop(r"head\.weight", "tied"), Drop(r"head\..*", "not used"), Drop("words", "never"))
    tree, report = import_tree(TABLE, source, shapes, drop=drops)
    assert report.dropped == {"head.weight": "tied", "head.bias": "not used"}
    assert same_bits(tree["embedding"], source["words"])  # a row comes before a drop
    with pytest.raises(UserError, match=r"^head\.bias: "):
        import_tree(TABLE, source, shapes, drop=drops[:1])


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ((Row("a", "x"), Row("b", "x")), "x"),
        ((Row("a", "x"), Row("a", "y")), "a"),
        ((Row("a", "x", piece=(0, 2)), Row("a", "y")), "a"),
        ((Row("a", "x", piece=(0, 2)), Row("a", "y", piece=(0, 2))), "a"),
        ((Row("a", "x", piece=(0, 2)), Row("a", "y", piece=(1, 3))), "a"),
        ((Row("a", "x", piece=(0, 3)), Row("a", "y", piece=(2, 3))), "a"),
        ((Row("a", "x", piece=(0, 2), zero_pieces=(0, 1)),), "a"),
    ],
)
def test_a_table_that_uses_a_tensor_twice_or_in_part_is_a_defect(rows, name):
    source = {"a": np.zeros(6), "b": np.zeros(6)}
    shapes = {row.target: np.zeros(6 // (row.piece or (0, 1))[1]) for row in rows}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        import_tree(rows, source, shapes)


def shapes_of(model, *inputs) -> dict:
    arguments = inputs or model.example()
    return jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]


def without(tree: dict, *names: str) -> dict:
    return {name: leaf for name, leaf in tree.items() if name not in names}


def chatglm_case():
    model = glm.ChatGLM(**glm.SIZES["tiny"])
    return chatglm.rows(model.depth, model.heads), shapes_of(model)


def vision_case(rows=eva_vit.rows, **names):
    model = vit.VisionTransformer(**vit.SIZES["tiny"])
    return rows(model.depth, model.heads, **names), shapes_of(model)


def bert_case(**options):
    model = BertEncoder(**BERT_SIZES["tiny"], pooler=True)
    shapes = shapes_of(model, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    return bert.rows(model.depth, model.heads, pooler=True, **options), shapes


def interface_case(kind: str):
    adapter = {"hf": "language_projection", "lavis": "opt_proj"}[kind]
    model = interfaces.QFormerInterface(**interfaces.SIZES["tiny"])
    sizes = model.depth, model.heads, model.cross_attention_frequency
    table = blip2.rows(*sizes, kind, text=False)
    return (*table, *bert.linear(adapter, "adapter")), shapes_of(model)


def uneven_case():
    """Five layers, cross-attention in every second one: the last layer stands alone."""
    model = interfaces.QFormerInterface(**interfaces.SIZES["tiny"] | {"depth": 5})
    table = blip2.rows(5, model.heads, model.cross_attention_frequency, "lavis", text=False)
    return table, without(shapes_of(model), "adapter")


def contrast_case(kind: str):
    model = blip2_pretraining.ContrastModel(**blip2_pretraining.SIZES["tiny"])
    sizes = model.depth, model.heads, model.cross_attention_frequency
    table = (*blip2.rows(*sizes, kind, text=True), *blip2.head_rows(kind))
    left = ("language_head", "temperature") if kind == "hf" else ()
    return table, without(shapes_of(model), *left)


def speech_case():
    sizes, decoder = conformer.SIZES["tiny"], asr.SIZES["tiny"]
    names = ("vocab", "width", "hidden", "heads", "self_blocks")
    spoken = asr.ASRDecoder(**{name: decoder[name] for name in names})
    encoder = conformer.SpeechEncoder(**sizes)
    interface = speech_interface.SpeechInterface(**speech_interface.SIZES["tiny"])
    table = cif_asr.rows(
        encoder.heads,
        encoder.depth,
        encoder.pools,
        encoder.channels,
        spoken.heads,
        spoken.self_blocks,
    )
    return table, {
        "speech_encoder": shapes_of(encoder),
        "speech_interface": {"cif": shapes_of(interface)["cif"]},
        "asr_decoder": shapes_of(spoken),
    }


def c_former_case():
    model = speech_interface.SpeechInterface(**speech_interface.SIZES["tiny"])
    return cif_asr.interface_rows(model.depth, model.heads), without(shapes_of(model), "cif")


CASES = {
    "chatglm": chatglm_case,
    "eva_vit": vision_case,
    "eva_vit in LAVIS": lambda: vision_case(source="visual_encoder."),
    "eva_vit of Hugging Face": lambda: vision_case(eva_vit.hf_rows),
    "bert": bert_case,
    "bert without prefix": lambda: bert_case(source=""),
    "image interface of LAVIS": lambda: interface_case("lavis"),
    "image interface of Hugging Face": lambda: interface_case("hf"),
    "image interface of five layers": uneven_case,
    "stage 1 of LAVIS": lambda: contrast_case("lavis"),
    "stage 1 of Hugging Face": lambda: contrast_case("hf"),
    "speech model": speech_case,
    "C-Former": c_former_case,
}


@functools.cache
def made(case: str) -> tuple[tuple[Row, ...], dict]:
    return CASES[case]()


@pytest.mark.parametrize("case", CASES)
def test_every_table_gives_the_parameters_back_bit_by_bit(case):
    table, shapes = made(case)
    generator = np.random.default_rng(0)
    params = {
        path: random_bits(generator, leaf.shape, ml_dtypes.bfloat16)
        for path, leaf in rules.flatten(shapes).items()
    }
    tensors = export_tree(table, rules.unflatten(params))
    again, report = import_tree(table, tensors, shapes)
    again = rules.flatten(again)
    assert again.keys() == params.keys() and not report.fresh and not report.dropped
    assert all(same_bits(again[path], params[path]) for path in params)
    split = {name for row in table if row.zero_pieces for name in row.names()}
    zeros = sum(tensors[name].size // 3 for name in split)  # EVA's key bias, a third of q, k and v
    held = sum(tensor.size for tensor in tensors.values())
    assert held == sum(leaf.size for leaf in params.values()) + zeros


@pytest.mark.parametrize("case", CASES)
def test_every_table_refuses_the_loss_of_any_row(case):
    """No row is idle: without one of them, a parameter is left or a tensor is over."""
    table, shapes = made(case)
    tree = rules.unflatten({p: np.zeros(x.shape) for p, x in rules.flatten(shapes).items()})
    tensors = export_tree(table, tree)
    for number in {0, len(table) // 2, len(table) - 1}:
        rest = table[:number] + table[number + 1 :]
        with pytest.raises((UserError, ValueError)) as caught:
            import_tree(rest, tensors, shapes)
        lost = table[number]
        told = str(caught.value)
        assert lost.target in told or any(name in told for name in lost.names())


def test_a_row_reads_the_layers_it_names_in_their_order():
    row = dataclasses.replace(TABLE[1], layers=(2, 0))
    source = {name: good_source()[name] for name in ("block.0.up", "block.2.up")}
    tree, _ = import_tree([row], source, {"layers": {"up": np.zeros((2, 4, 5))}})
    assert same_bits(tree["layers"]["up"][0], source["block.2.up"].T)
    assert same_bits(tree["layers"]["up"][1], source["block.0.up"].T)


def test_a_large_torch_file_is_mapped_anew_and_not_for_every_tensor(tmp_path, monkeypatch):
    """Arrays stay what they were when the mapping under them is replaced, in any order."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    state = {str(n): torch.randn(n % 7 + 1, 16, generator=generator) for n in range(40)}
    state["half"] = state["3"].to(torch.bfloat16)
    torch.save(state, tmp_path / "many.pth")
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(files, "KEPT", 1000)
    source = files.TorchFile(tmp_path / "many.pth")
    held = {name: source[name] for name in (*state, *reversed(state))}
    for name, tensor in state.items():
        np.testing.assert_array_equal(held[name].astype(np.float32), tensor.float().numpy())
    total = 2 * sum(tensor.nbytes for tensor in state.values())
    assert total / 1000 <= len(loads) < 2 * total / 1000 < 2 * len(state)
