"""config.json of transformers: what it says is in the numbers, or is refused by the field's name.

Every case is a configuration of transformers; its torch model is the reference.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import published
import pytest

from xllm_jax.assembly import parameters
from xllm_jax.convert import run_import
from xllm_jax.convert.sources import chatglm
from xllm_jax.core.errors import UserError
from xllm_jax.models import layers
from xllm_jax.models.bert import BertEncoder
from xllm_jax.models.clip import Clip
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.qformer import QFormer
from xllm_jax.models.speech_interface import SpeechInterface
from xllm_jax.models.vit import VisionTransformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BERT = dict(vocab_size=40, hidden_size=96, num_hidden_layers=2, num_attention_heads=6)
BERT |= dict(intermediate_size=64, max_position_embeddings=20, type_vocab_size=3)
VISION = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3)
VISION |= dict(image_size=32, patch_size=8)
QFORMER = dict(vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=3)
QFORMER |= dict(intermediate_size=40, max_position_embeddings=20, encoder_hidden_size=48)
TEXT = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
TEXT |= dict(num_attention_heads=4, max_position_embeddings=12, eos_token_id=39)
OPT = dict(model_type="opt", hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1)
OPT |= dict(num_attention_heads=2, ffn_dim=16, vocab_size=20, max_position_embeddings=20)
ONLY_NORMS = 1e-2  # an epsilon that shows


def shaken(model, folder):
    """The model with noise in every parameter, saved."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


def close(ours, expected):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


def converted(source, folder):
    """(options as conversion.json keeps them, {part: parameters})."""
    found = run_import.examine(source, folder)
    return json.loads(json.dumps(found.options)), found.tree()


def bert_numbers(folder, model):
    options, tree = converted("bert", folder)
    fields = {k: v for k, v in options.items() if k not in ("prefix", "gamma")}
    ids, types = np.arange(10).reshape(2, 5), np.array([[0, 0, 1, 1, 2]] * 2)
    ours = jax.jit(BertEncoder(**fields).apply)({"params": tree["bert"]}, ids, types=types)
    inputs = dict(input_ids=torch.tensor(ids), token_type_ids=torch.tensor(types))
    close(ours, getattr(model, "bert", model)(**inputs).last_hidden_state)


@pytest.mark.parametrize(
    "changed",
    [
        dict(num_attention_heads=6),
        dict(num_attention_heads=1, num_hidden_layers=3),
        dict(layer_norm_eps=ONLY_NORMS),
        dict(hidden_act="relu"),
        dict(hidden_act="gelu_new", hidden_size=60),
        dict(hidden_act="quick_gelu", type_vocab_size=5),
    ],
    ids=str,
)
def test_bert_of_any_size(changed, tmp_path):
    config = transformers.BertConfig(**BERT | changed)
    bert_numbers(tmp_path, shaken(transformers.BertModel(config), tmp_path))


def test_bert_with_a_head(tmp_path):
    config = transformers.BertConfig(**BERT, hidden_act="silu")
    bert_numbers(tmp_path, shaken(transformers.BertForMaskedLM(config), tmp_path))


def test_a_stage_of_another_activation_does_not_load_the_base(bert_folder, tmp_path):
    """Shapes do not show it, so the base says it; the network's own value is the same again."""
    change = lambda c: c.update(hidden_act="relu", layer_norm_eps=ONLY_NORMS)  # noqa: E731
    folder = changed_copy(bert_folder, tmp_path / "in", change)
    run_import.run_import("bert", folder, tmp_path / "base")
    source, prefix = f"{tmp_path / 'base'}:bert*", "speech_interface/c_former/bert"
    for fields in ({}, dict(activation="relu"), dict(epsilon=ONLY_NORMS)):
        networks = {"speech_interface": SpeechInterface(**fields)}
        with pytest.raises(UserError, match=r"--config\.parts\.speech_interface\.fields\."):
            parameters.check_fields(networks, source, prefix)
    networks["speech_interface"] = SpeechInterface(activation="relu", epsilon=ONLY_NORMS)
    parameters.check_fields(networks, source, prefix)
    run_import.run_import("bert", bert_folder, tmp_path / "base")
    parameters.check_fields({"speech_interface": SpeechInterface()}, source, prefix)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 2),
        ("hidden_size", 32),
        ("vocab_size", 41),
        ("inner_hidden_size", 25),
        ("num_attention_heads", 3),
        ("layernorm_epsilon", 0),
        ("model_type", "llama"),
    ],
)
def test_what_chatglm_cannot_be_is_refused_by_the_field(field, value, tmp_path):
    folder = published.write_shards(published.tensors_of("chatglm")[0], tmp_path / "in", "bin")
    (folder / "config.json").write_text(json.dumps(published.CONFIG | {field: value}))
    with pytest.raises(UserError, match=rf"config\.json: {field}: "):
        run_import.examine("chatglm", folder)


def test_chatglm_of_other_heads_and_epsilon(tmp_path):
    folder = published.write_shards(published.tensors_of("chatglm")[0], tmp_path / "in", "bin")
    changed = published.CONFIG | {"num_attention_heads": 4, "layernorm_epsilon": 1e-3}
    changed.pop("inner_hidden_size")  # the tensors show it
    (folder / "config.json").write_text(json.dumps(changed))
    found = run_import.examine("chatglm", folder)
    model = chatglm.network(found.options)
    assert (model.heads, model.norm_epsilon, model.hidden) == (4, 1e-3, 24)
    assert found.plan.fields["llm"]["norm_epsilon"] == 1e-3


@pytest.mark.parametrize(("field", "value"), [("pre_seq_len", 7), ("prefix_projection", True)])
def test_what_a_prefix_cannot_be_is_refused_by_the_field(field, value, tmp_path):
    table = np.zeros((6, 3 * 2 * 16), np.float32)
    tensors = {"transformer.prefix_encoder.embedding.weight": table}
    published.write_safetensors(tensors, tmp_path / "model.safetensors")
    config = published.CONFIG | {"pre_seq_len": 6, "prefix_projection": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_import.examine("chatglm_prefix", tmp_path).options["heads"] == 2
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=rf"config\.json: {field}: "):
        run_import.examine("chatglm_prefix", tmp_path)


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_every_activation_is_that_of_transformers(name):
    x = np.linspace(-12, 12, 97, dtype=np.float32)
    expected = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(layers.ACTIVATIONS[name](x), expected, rtol=2e-6, atol=2e-6)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    shaken(transformers.BertModel(transformers.BertConfig(**BERT)), folder)
    return folder


def changed_copy(folder, target, change):
    """A folder with the same weights and another config.json."""
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.name != "config.json":
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("hidden_act", "laplace"),
        ("hidden_act", None),
        ("position_embedding_type", "relative_key"),
        ("num_attention_heads", 7),
        ("num_attention_heads", 0),
        ("num_attention_heads", "6"),
        ("num_hidden_layers", 1),
        ("hidden_size", 48),
        ("intermediate_size", 63),
        ("max_position_embeddings", 21),
        ("type_vocab_size", 2),
        ("vocab_size", 41),
        ("layer_norm_eps", 0),
        ("layer_norm_eps", "small"),
        ("model_type", "roberta"),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_what_bert_cannot_be_is_refused_by_the_field(field, value, bert_folder, tmp_path):
    folder = changed_copy(bert_folder, tmp_path / "in", lambda c: c.update({field: value}))
    with pytest.raises(UserError, match=rf"config\.json: {field}: ") as caught:
        run_import.run_import("bert", folder, tmp_path / "base")
    assert caught.value.hint and not (tmp_path / "base").exists()


def test_a_field_that_is_left_out_has_the_default_of_transformers(bert_folder, tmp_path):
    """96 / 12 heads, as BertConfig supposes, though the model was saved with 6."""
    folder = changed_copy(bert_folder, tmp_path / "in", lambda c: c.pop("num_attention_heads"))
    bert_numbers(folder, transformers.BertModel.from_pretrained(folder).eval())


def test_heads_are_not_guessed_without_config(bert_folder, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((bert_folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"do not tell the number of heads.*config\.json"):
        run_import.examine("bert", file)
    with pytest.raises(UserError, match=r"--size: tiny has depth 4, the file 2"):
        run_import.examine("bert", file, "tiny")


def vision_numbers(part, interface, model, pixels):
    """Features behind the norm, which is the interface's here."""
    fields, params = part
    run = VisionTransformer(**fields).apply
    features, _ = jax.jit(run)({"params": params}, np.moveaxis(pixels.numpy(), 1, -1))
    epsilon = interface[0].get("norm_epsilon", QFormerInterface.norm_epsilon)
    norm = layers.LayerNorm(epsilon).apply({"params": interface[1]["norm"]}, features)
    close(norm, model(pixels).last_hidden_state)


VISION_CHANGES = [
    {},
    dict(num_attention_heads=6, layer_norm_eps=ONLY_NORMS),
    dict(hidden_act="quick_gelu", patch_size=16, num_hidden_layers=3),
]
QFORMER_CHANGES = [
    {},
    dict(num_attention_heads=2, layer_norm_eps=ONLY_NORMS, cross_attention_frequency=1),
    dict(hidden_act="relu", num_hidden_layers=5, cross_attention_frequency=3),
    dict(cross_attention_frequency=4, use_qformer_text_input=True),
]


@pytest.mark.parametrize("changed", VISION_CHANGES, ids=str)
def test_a_vision_model_of_blip2_alone(changed, tmp_path):
    config = transformers.Blip2VisionConfig(**VISION | changed)
    model = shaken(transformers.Blip2VisionModel(config), tmp_path)
    options, tree = converted("blip2", tmp_path)
    assert tree.keys() == {"vision_encoder", "image_interface"}
    assert tree["image_interface"].keys() == {"norm"}
    pixels = torch.randn(2, 3, 32, 32)
    interface = options["interface"], tree["image_interface"]
    vision_numbers((options["vision"], tree["vision_encoder"]), interface, model, pixels)


@pytest.mark.parametrize("changed", QFORMER_CHANGES, ids=str)
def test_a_qformer_of_blip2_alone(changed, tmp_path):
    config = transformers.Blip2QFormerConfig(**QFORMER | changed)
    model = shaken(transformers.Blip2QFormerModel(config), tmp_path)
    options, tree = converted("blip2", tmp_path)
    assert tree.keys() == {"image_interface"} and tree["image_interface"].keys() == {"qformer"}
    ours = QFormerInterface(**options["interface"])
    queries, features = torch.randn(2, 5, ours.width), torch.randn(2, 7, 48)
    network = QFormer(**ours.sizes(), cross_attention_frequency=ours.cross_attention_frequency)
    params = {"params": tree["image_interface"]["qformer"]}
    states, _ = jax.jit(network.apply)(params, queries.numpy(), features.numpy())
    expected = model(query_embeds=queries, encoder_hidden_states=features)
    close(states, expected.last_hidden_state)


@pytest.mark.parametrize("number", [1, 2])
def test_the_whole_of_blip2(number, tmp_path):
    config = transformers.Blip2Config(
        vision_config=VISION | VISION_CHANGES[number],
        qformer_config=QFORMER | QFORMER_CHANGES[number],
        text_config=OPT,
        num_query_tokens=5,
    )
    model = shaken(transformers.Blip2ForConditionalGeneration(config), tmp_path)
    options, tree = converted("blip2", tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    vision, interface = options["vision"], options["interface"]
    run = VisionTransformer(**vision).apply
    images = np.moveaxis(pixels.numpy(), 1, -1)
    features, lengths = jax.jit(run)({"params": tree["vision_encoder"]}, images)
    apply = jax.jit(QFormerInterface(**interface).apply)
    ours, _ = apply({"params": tree["image_interface"]}, features, lengths)
    seen = model.vision_model(pixels).last_hidden_state
    queries = model.query_tokens.expand(2, -1, -1)
    states = model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
    close(ours, model.language_projection(states))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_config", "qkv_bias", False),
        ("vision_config", "hidden_act", "xielu"),
        ("vision_config", "num_attention_heads", 5),
        ("vision_config", "image_size", [32, 16]),
        ("vision_config", "patch_size", 4),
        ("qformer_config", "num_attention_heads", 5),
        ("qformer_config", "cross_attention_frequency", 1),
        ("qformer_config", "hidden_size", 25),
    ],
)
def test_what_blip2_cannot_be_is_refused_by_the_field(section, field, value, tmp_path):
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=OPT, num_query_tokens=5
    )
    shaken(transformers.Blip2Model(config), tmp_path / "blip2")
    change = lambda c: c[section].update({field: value})  # noqa: E731
    folder = changed_copy(tmp_path / "blip2", tmp_path / "in", change)
    with pytest.raises(UserError, match=rf"config\.json: {section}\.{field}: "):
        run_import.run_import("blip2", folder, tmp_path / "base")


def test_a_key_bias_is_dropped_because_no_softmax_sees_it(tmp_path):
    """The numbers with it are the test above's, whose models have one; here, what is said."""
    model = shaken(
        transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**VISION)), tmp_path
    )
    name = "encoder.layers.{}.self_attn.qkv.bias"
    done = run_import.run_import("blip2", tmp_path, tmp_path / "base")
    told = {f"vision_model.{name.format(n)}, part 2 of 3" for n in range(2)}
    assert done.dropped.keys() == told
    assert all("softmax" in reason for reason in done.dropped.values())
    with torch.no_grad():
        model.encoder.layers[1].self_attn.qkv.bias[48:96] = 0
    model.save_pretrained(tmp_path)
    found = run_import.examine("blip2", tmp_path)
    assert found.report.dropped.keys() == {name for name in told if ".0." in name}
    with torch.no_grad():
        model.encoder.layers[1].self_attn.qkv.bias[50] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.qkv\.bias: holds NaN"):
        run_import.examine("blip2", tmp_path)


def test_a_network_that_stands_alone_comes_back_under_its_names(tmp_path):
    from xllm_jax.convert import files, run_export

    config = transformers.Blip2VisionConfig(**VISION)
    model = shaken(transformers.Blip2VisionModel(config), tmp_path / "in")
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.self_attn.qkv.bias[48:96] = 0
    model.save_pretrained(tmp_path / "in")
    run_import.run_import("blip2", tmp_path / "in", tmp_path / "base")
    run_export.run_export("blip2", tmp_path / "base", tmp_path / "out")
    old, new = (files.open_checkpoint(tmp_path / name) for name in ("in", "out"))
    assert set(old) == set(new)
    assert all(old[name].tobytes() == new[name].tobytes() for name in old)


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        (dict(layer_norm_eps=ONLY_NORMS), dict(layer_norm_eps=2 * ONLY_NORMS)),
        (dict(num_attention_heads=2, eos_token_id=2), dict(num_attention_heads=6)),
    ],
)
def test_clip(text, vision, tmp_path):
    config = transformers.CLIPConfig(
        text_config=TEXT | text, vision_config=VISION | vision, projection_dim=16
    )
    model = shaken(transformers.CLIPModel(config), tmp_path)
    options, tree = converted("clip", tmp_path)
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(3, 39, (2, 12))
    ids[:, 7] = 39
    images = np.moveaxis(pixels.numpy(), 1, -1)
    ours = jax.jit(Clip(**options["sizes"]).apply)({"params": tree["clip"]}, images, ids.numpy())
    found = model(input_ids=ids, pixel_values=pixels)
    close(ours, (found.image_embeds * found.text_embeds).sum(-1))
    alone, _ = converted("clip_vision", tmp_path)
    assert alone["sizes"] == options["sizes"]["vision_fields"]


def test_the_older_sections_of_clip_win_as_in_transformers(tmp_path):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    shaken(transformers.CLIPModel(config), tmp_path / "clip")
    older = VISION | dict(num_attention_heads=6, layer_norm_eps=ONLY_NORMS)
    change = lambda c: c.update(vision_config_dict=older)  # noqa: E731
    folder = changed_copy(tmp_path / "clip", tmp_path / "in", change)
    told = transformers.CLIPConfig.from_pretrained(folder).vision_config
    found, _ = converted("clip_vision", folder)
    assert found["sizes"]["heads"] == told.num_attention_heads == 6
    assert found["sizes"]["epsilon"] == told.layer_norm_eps == ONLY_NORMS


@pytest.mark.parametrize("source", ["clip", "clip_vision"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_act", "gelu"), ("num_attention_heads", 7), ("num_channels", 1), ("hidden_size", 40)],
)
def test_what_clip_cannot_be_is_refused_by_the_field(source, field, value, tmp_path):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    shaken(transformers.CLIPModel(config), tmp_path / "clip")
    change = lambda c: c["vision_config"].update({field: value})  # noqa: E731
    folder = changed_copy(tmp_path / "clip", tmp_path / "in", change)
    with pytest.raises(UserError, match=rf"config\.json: vision_config\.{field}: "):
        run_import.examine(source, folder)


def published_by(name, folder):
    """A small model of transformers, of no size that we name."""
    vision, qformer = dict(VISION), dict(QFORMER)
    if name == "blip2":
        config = transformers.Blip2Config(
            vision_config=vision, qformer_config=qformer, text_config=OPT, num_query_tokens=5
        )
        return shaken(transformers.Blip2Model(config), folder)
    if name == "vision alone":
        return shaken(
            transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**vision)), folder
        )
    if name == "qformer alone":
        config = transformers.Blip2QFormerConfig(**qformer)
        return shaken(transformers.Blip2QFormerModel(config), folder)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16)
    return shaken(transformers.CLIPModel(config), folder)


SIZED = {
    "blip2": "blip2",
    "vision alone": "blip2",
    "qformer alone": "blip2",
    "clip": "clip",
    "clip_vision": "clip_vision",
}


@pytest.mark.parametrize("name", SIZED)
def test_a_size_that_config_contradicts_is_refused(name, tmp_path):
    published_by(name, tmp_path)
    run_import.examine(SIZED[name], tmp_path)
    with pytest.raises(UserError, match=r"^--size: tiny has [\w/]+ \d+, the checkpoint \d+"):
        run_import.examine(SIZED[name], tmp_path, "tiny")
