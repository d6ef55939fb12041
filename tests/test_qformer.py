"""The Q-Former, its interfaces and its checkpoints, against recordings and against transformers."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recording import Recording
from vision_models import (
    config_of,
    contrast_model,
    contrast_table,
    float32,
    images,
    info_of,
    interface_model,
    interface_table,
    load_contrast,
    load_interface,
    load_vision,
    shapes_of,
    vision_shapes,
    vision_transformer,
)

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.sources import blip2, eva_vit
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import blip2_pretraining, interfaces, layers
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.qformer import QFormer, visible
from xllm_jax.objectives.blip2_pretraining import captioning, similarities, smoothed_cross_entropy


@pytest.fixture(scope="module")
def stage1(golden):
    """(model, {'params'}, jitted encoder, jitted methods with captured values)."""
    vision, vision_params = load_vision(golden)
    model, params, _ = load_contrast(golden)
    encode = jax.jit(lambda x: vision.apply({"params": vision_params}, images(x))[0])

    @functools.partial(jax.jit, static_argnames="method")
    def run(method, *inputs):
        variables = {"params": params}
        result, state = model.apply(
            variables, *inputs, method=method, capture_intermediates=True, mutable=["intermediates"]
        )
        return result, state["intermediates"].get("qformer")

    return model, params, encode, run


def hidden_states(state: dict, depth: int, frequency: int) -> list:
    """Captured output of every layer, in order."""
    whole = depth // frequency * frequency
    states = []
    for number in range(depth):
        group = state["groups" if number < whole else "tail"]
        place = number // frequency if number < whole else 0
        states.append(group[f"layer_{number % frequency}"]["__call__"][0][0][place])
    return states


@pytest.mark.golden
def test_every_mode_layer_by_layer(golden, stage1):
    model, params, encode, run = stage1
    recording = Recording(golden / "vision/cases_qformer.npz")
    features = encode(recording.input("pixels"))
    image, _ = run("normalize", features)
    recording.close("image_embeds", image)
    recording.close("query_tokens", params["queries"][None])
    layers_of = functools.partial(
        hidden_states, depth=model.depth, frequency=model.cross_attention_frequency
    )

    (states, _, cache), state = run("image", image)
    recording.close("query_embeddings", state["embeddings"]["__call__"][0])
    recording.close("query_last_hidden_state", states)
    first = state["groups"]["layer_0"]
    for name, part in {
        "self_attention": "attention_end",
        "cross_attention": "cross_attention_end",
        "ffn_query": "query_feed_forward_end",
    }.items():
        recording.close(f"query_layer_00_{name}", first[part]["__call__"][0][0])
    for number, value in enumerate(layers_of(state)):
        recording.close(f"query_layer_{number:02d}", value)
    _check_cache(recording, model, cache)
    ids, mask = recording.input("text_input_ids"), recording.input("text_attention_mask") > 0
    (text, _), state = run("text", ids, mask)
    recording.close("itc_text_embeddings", state["embeddings"]["__call__"][0])
    recording.close("itc_text_last_hidden_state", text)
    for number, value in enumerate(layers_of(state)):
        recording.close(f"itc_text_layer_{number:02d}", value)
    (rows, per_query), state = run("match", image, ids, mask)
    recording.close("itm_embeddings", state["embeddings"]["__call__"][0])
    recording.close("itm_last_hidden_state", rows)
    recording.close("itm_head", per_query)
    for number, value in enumerate(layers_of(state)):
        recording.close(f"itm_layer_{number:02d}", value)
    seen = np.asarray(visible(model.queries, mask))[:, 0, 0].astype(np.int64)
    recording.equal("itm_attention_mask", seen)
    _check_captions(recording, golden, model, run, layers_of, image, mask, cache)
    recording.assert_all_used()


def _check_cache(recording, model, cache):
    frequency = model.cross_attention_frequency
    whole = model.depth // frequency * frequency
    for number in range(model.depth):
        group = cache["groups" if number < whole else "tail"][number % frequency]
        place = number // frequency if number < whole else 0
        for name, value in zip("kv", group):
            value = np.moveaxis(value[place], 1, 2)  # ours keeps heads behind tokens
            recording.close(f"query_cache_{name}_{number:02d}", value)


def _check_captions(recording, golden, model, run, layers_of, image, mask, cache):
    start = json.loads((golden / "vision/cases_bert_init.json").read_text())["bos_token_id"]
    ids = recording.arrays["text_input_ids"].copy()
    ids[:, 0] = start
    recording.equal("itg_input_ids", ids)
    recording.equal("itg_labels", np.where(mask, ids, -100))
    (_, logits), state = run("caption", ids, mask, cache)
    recording.close("itg_embeddings", state["embeddings"]["__call__"][0])
    recording.close("itg_logits", logits)
    for number, value in enumerate(layers_of(state)):
        recording.close(f"itg_layer_{number:02d}", value)
    (_, jointly), _ = run("caption_jointly", image, ids, mask)
    recording.close("itg_unilm_logits", jointly)
    for name, value in (("itg", logits), ("itg_unilm", jointly)):
        recording.close(f"{name}_loss", captioning(value, ids, mask, 0.1)[0])
        seen = visible(model.queries, mask, causal=True, cached=name == "itg")
        recording.close(f"{name}_extended_attention_mask", np.where(seen, 0.0, -10000.0))
    losses = smoothed_cross_entropy(logits[:, :-1], jnp.asarray(ids)[:, 1:], 0.1)
    recording.close("itg_loss_none", (losses * mask[:, 1:]).sum(1))


@pytest.mark.golden
def test_features_for_retrieval(golden, stage1):
    model, _, encode, run = stage1
    recording = Recording(golden / "vision/cases_features.npz")
    pairs = Recording(golden / "vision/cases_stage1.npz")
    image, _ = run("normalize", encode(pairs.input("pixels")))
    (states, units, _), _ = run("image", image)
    recording.close("forward_image_hidden", states)
    recording.close("extract_image_image_embeds", states)
    recording.close("extract_image_image_embeds_proj", units)
    ids, mask = pairs.input("text_input_ids"), pairs.input("text_attention_mask") > 0
    (text, _), _ = run("text", ids, mask)
    recording.close("forward_text_cls", text[:, 0])
    (_, per_query), _ = run("match", image, ids, mask)
    recording.close("compute_itm", per_query[..., 1].mean(1))
    long_ids, long_mask = _tokenize(golden, info_of(golden)["features"]["captions"])
    (text, units), _ = run("text", long_ids, long_mask)
    recording.close("extract_text_text_embeds", text)
    recording.close("extract_text_text_embeds_proj", units)
    (rows, _), _ = run("match", image, long_ids, long_mask)
    recording.close("extract_multimodal_multimodal_embeds", rows[:, : model.queries])
    recording.assert_all_used()


def _tokenize(golden, captions):
    """Word pieces padded to the longest caption, not cut (`extract_features` does that)."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizer.from_pretrained(
        golden / "vision/weights/bert-base-uncased"
    )
    tokens = tokenizer(captions, padding=True, return_tensors="np")
    return tokens["input_ids"], tokens["attention_mask"] > 0


@pytest.mark.golden
def test_interfaces(golden):
    recording = Recording(golden / "vision/cases_interfaces.npz")
    vision, vision_params = load_vision(golden)
    model, params, report = load_interface(golden, "blip2_pretrained_opt_stage2.pth")
    assert not report.fresh
    _, ours, _ = load_interface(golden, "xllm_image_checkpoint_4.pth")
    jax.tree.map(np.testing.assert_array_equal, ours, params)
    encode = jax.jit(lambda x: vision.apply({"params": vision_params}, images(x)))

    @jax.jit
    def run(params, features, lengths):
        (embeddings, counts), state = model.apply(
            {"params": params}, features, lengths, capture_intermediates=True
        )
        state = state["intermediates"]
        return embeddings, counts, state["norm"]["__call__"][0], state["qformer"]["__call__"][0][0]

    features, lengths = encode(recording.input("image_pixels"))
    embeddings, counts, normed, states = run(params, features, lengths)
    np.testing.assert_array_equal(counts, [model.queries] * len(counts))
    recording.close("image_ln_vision", normed)
    recording.close("image_query_output", states)
    recording.close("image_quasi_linguistic", embeddings)
    prompt = _prompt(recording, "image")
    recording.close("image_lm_input_image", prompt(embeddings))
    _check_stub_gradient(recording, golden, model, params, features, lengths, prompt)

    video_params = _video_params(golden, params, "video")
    pixels = recording.input("video_pixels")
    clips, frames = pixels.shape[:2]
    features, lengths = encode(pixels.reshape(clips * frames, *pixels.shape[2:]))
    embeddings, _, _, states = run(video_params, features, lengths)
    recording.close("video_query_output", states)
    recording.close("video_proj", embeddings)
    embeddings = embeddings.reshape(clips, -1, model.llm_width)
    recording.close("video_quasi_linguistic", embeddings)
    prompt = _prompt(recording, "video")
    recording.close("video_lm_input_image", prompt(embeddings))
    recording.close("video_stub_loss", jnp.square(prompt(embeddings)).mean())
    features, lengths = encode(recording.arrays["image_pixels"])
    embeddings = run(_video_params(golden, params, "image"), features, lengths)[0]
    recording.close("video_model_image_quasi_linguistic", embeddings)
    # The LM's own ids and labels under a stand-in tokenizer are not of this model.
    recording.assert_all_used(["*_lm_input_ids", "*_lm_labels"])


def _prompt(recording, name):
    """The reference's prompt around the embeddings: words before, media, words after."""
    words = recording.input("lm_word_embeddings")
    before, after = (
        words[recording.input(f"{name}_prompt_ids_{end}")] for end in ("before", "after")
    )

    def wrap(embeddings):
        rows = [jnp.broadcast_to(x, (len(embeddings), *x.shape)) for x in (before, after)]
        return jnp.concatenate([rows[0], embeddings, rows[1]], axis=1)

    return wrap


def _video_params(golden, image_params, modality):
    """Queries and adapter of a video run on the stage-2 Q-Former."""
    _, params, report = load_interface(golden, "xllm_video_checkpoint_4.pth", modality=modality)
    kept = {
        path: leaf for path, leaf in rules.flatten(image_params).items() if path in report.fresh
    }
    return rules.unflatten(rules.flatten(params) | kept)


def _check_stub_gradient(recording, golden, model, params, features, lengths, prompt):
    def loss(params):
        embeddings, _ = model.apply({"params": params}, features, lengths)
        return jnp.square(prompt(embeddings)).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    recording.close("image_stub_loss", value)
    order = info_of(golden)["interfaces"]["image_stub_grad_norm order"]
    tensors = export_tree(interface_table(model), gradient)
    assert tensors.keys() == set(order)
    recording.close("image_stub_grad_norm", [np.linalg.norm(tensors[name]) for name in order])


@pytest.mark.golden
def test_hugging_face_folders(golden):
    recording = Recording(golden / "vision/cases_hf.npz")
    config = config_of(golden)
    pixels = Recording(golden / "vision/cases_interfaces.npz").input("image_pixels")
    source = open_checkpoint(golden / "vision/weights/hf_blip2_stage2")
    vision = vision_transformer(config)
    table = eva_vit.hf_rows(vision.depth, vision.heads)
    drop = [eva_vit.Drop(r"(?!vision_model\.).*|vision_model\.post_layernorm\..*", "interface")]
    tree, _ = import_tree(table, source, vision_shapes(vision), drop=drop)
    for name, tensor in export_tree(table, tree).items():
        np.testing.assert_array_equal(tensor, source[name])
    run = jax.jit(lambda x: vision.apply({"params": tree}, images(x), capture_intermediates=True))
    (features, lengths), state = run(pixels)
    state = state["intermediates"]
    recording.close("stage2_vision_hidden_00", state["embeddings"]["__call__"][0])
    for number in range(vision.depth):
        value = state["layers"]["__call__"][0][0][number]
        recording.close(f"stage2_vision_hidden_{number + 1:02d}", value)
    # Hugging Face runs this norm with eps 1e-6 where LAVIS has 1e-5.
    model = interface_model(config, norm_epsilon=config["vit"]["norm_eps"])
    params, report = blip2.interface(source, model, shapes_of(model))
    assert not report.fresh
    run = jax.jit(functools.partial(model.apply, capture_intermediates=True))
    (embeddings, _), state = run({"params": params}, features, lengths)
    state = state["intermediates"]
    normed = state["norm"]["__call__"][0]
    recording.close("stage2_vision_last_hidden_state", normed)
    norm = layers.LayerNorm(model.norm_epsilon)
    recording.close(
        "stage2_vision_pooler_output", norm.apply({"params": params["norm"]}, normed[:, 0])
    )
    recording.close("stage2_qformer_last_hidden_state", state["qformer"]["__call__"][0][0])
    recording.close("stage2_language_projection", embeddings)
    _check_hf_stage1(recording, golden, config, vision)
    recording.assert_all_used(["stage2_input_ids", "stage2_logits"])  # of OPT, another LLM


def _check_hf_stage1(recording, golden, config, vision):
    pairs = Recording(golden / "vision/cases_stage1.npz")
    source = open_checkpoint(golden / "vision/weights/hf_blip2_itm_stage1")
    vocabulary = source["embeddings.word_embeddings.weight"].shape[0]
    model = contrast_model(config, vocabulary, norm_epsilon=config["vit"]["norm_eps"])
    params, report = blip2.contrast(source, model, shapes_of(model))
    assert {path.split("/")[0] for path in report.fresh} == {"language_head", "temperature"}
    table = eva_vit.hf_rows(vision.depth, vision.heads)
    drop = [eva_vit.Drop(r"(?!vision_model\.).*|vision_model\.post_layernorm\..*", "interface")]
    tree, _ = import_tree(table, source, vision_shapes(vision), drop=drop)
    features, _ = jax.jit(vision.apply)({"params": tree}, images(pairs.input("pixels")))
    ids, mask = pairs.input("text_input_ids"), pairs.input("text_attention_mask") > 0
    units, text_units, per_query = _pairs(model, params, features, ids, mask)
    recording.close("stage1_itc_image_embeds", units)
    recording.close("stage1_itc_text_embeds", text_units)
    to_text, _ = similarities(units, text_units, 1.0)
    recording.close("stage1_itc_logits_per_image", to_text)
    recording.close("stage1_itm_logits", per_query.mean(1))


def _pairs(model, params, features, ids, mask):
    """Unit vectors of images and texts, and the matching logits of the pairs."""

    @jax.jit
    def run(params):
        variables = {"params": params | {"temperature": jnp.float32(0.07)}}
        image = model.apply(variables, features, method="normalize")
        _, units, _ = model.apply(variables, image, method="image")
        _, text_units = model.apply(variables, ids, mask, method="text")
        _, per_query = model.apply(variables, image, ids, mask, method="match")
        return units, text_units[:, 0], per_query

    return run(params)


@pytest.mark.golden
def test_files_come_back_as_they_were(golden):
    folder = golden / "vision/weights"
    model, params, source = load_contrast(golden)
    back = export_tree(contrast_table(model), params)
    assert source.keys() - back.keys() == {
        "Qformer.bert.embeddings.position_ids",
        "Qformer.cls.predictions.decoder.weight",
        "Qformer.cls.predictions.decoder.bias",
    }
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, source[name], err_msg=name)
    _, same, whole = load_contrast(golden, "blip2_pretrained_with_vit.pth")
    jax.tree.map(np.testing.assert_array_equal, same, params)
    vision, vision_params = load_vision(golden)
    table = eva_vit.rows(vision.depth, vision.heads, source="visual_encoder.")
    drop = [eva_vit.Drop(r"(?!visual_encoder\.).*", "the interface")]
    tree, _ = import_tree(table, whole, vision_shapes(vision), drop=drop)
    jax.tree.map(np.testing.assert_array_equal, float32(tree), vision_params)
    interface, params, _ = load_interface(golden, "blip2_pretrained_opt_stage2.pth")
    source = open_checkpoint(folder / "blip2_pretrained_opt_stage2.pth")
    back = export_tree(interface_table(interface), params)
    assert source.keys() - back.keys() == {"Qformer.bert.embeddings.position_ids"}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, source[name], err_msg=name)
    _, start, report = load_interface(golden, "blip2_pretrained.pth")
    assert report.fresh == ("adapter/bias", "adapter/kernel")
    kept = blip2_pretraining.without_text(load_contrast(golden)[1])
    jax.tree.map(np.testing.assert_array_equal, start, kept)


@pytest.mark.golden
def test_initialization_from_bert(golden):
    expected = json.loads((golden / "vision/cases_bert_init.json").read_text())
    source = open_checkpoint(golden / "vision/weights/bert-base-uncased")
    model = contrast_model(config_of(golden), expected["tokenizer_len"])
    fresh = float32(jax.jit(model.init)(jax.random.key(0), *model.example())["params"])
    tensors = export_tree(contrast_table(model), blip2.from_bert(source, model, fresh))
    published = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): source[name]
        for name in source
    }
    again = export_tree(contrast_table(model), blip2.from_bert(published, model, fresh))
    jax.tree.map(np.testing.assert_array_equal, again, tensors)
    before = export_tree(contrast_table(model), fresh)
    bert = lambda name: source[name.removeprefix("Qformer.")]  # noqa: E731
    for name in expected["from_bert"]:
        np.testing.assert_array_equal(tensors[name], bert(name), err_msg=name)
    for name in expected["copied_from_text_ffn"]:
        np.testing.assert_array_equal(tensors[name], bert(name.replace("_query", "")))
    tied = "Qformer.cls.predictions.decoder."
    resized = [n for n in expected["resized_first_rows_from_bert"] if not n.startswith(tied)]
    for name in resized:
        rows = len(bert(name))
        np.testing.assert_array_equal(tensors[name][:rows], bert(name))
        np.testing.assert_array_equal(tensors[name][rows:], before[name][rows:])
    random = [name for name in expected["random_or_zero"] if name in tensors]
    named = {*expected["from_bert"], *expected["copied_from_text_ffn"], *resized, *random}
    for name in tensors.keys() - named | set(random):
        np.testing.assert_array_equal(tensors[name], before[name], err_msg=name)
    assert {name.split(".")[0] for name in tensors.keys() - named} == {
        *("query_tokens", "ln_vision", "vision_proj", "text_proj", "itm_head", "temp")
    }


@pytest.mark.golden
def test_wrong_files_are_told(golden):
    source = dict(open_checkpoint(golden / "vision/weights/blip2_pretrained.pth"))
    model, _, _ = load_contrast(golden)
    source["Qformer.cls.predictions.decoder.weight"] = source[blip2.WORDS] + 1
    with pytest.raises(UserError, match="tied"):
        blip2.contrast(source, model, shapes_of(model))
    with pytest.raises(UserError, match="not a BLIP-2"):
        blip2.kind_of({"x": 0})
    other = ContrastModel(**blip2_pretraining.SIZES["tiny"])
    good = open_checkpoint(golden / "vision/weights/blip2_pretrained.pth")
    with pytest.raises(UserError, match=r"another size|no such tensor"):
        blip2.contrast(good, other, shapes_of(other))


def test_equals_transformers_with_random_weights():
    """BLIP-2's retrieval model of transformers, weights perturbed, at depth 3 (a tail group)."""
    torch = pytest.importorskip("torch")
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=dict(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4,
            intermediate_size=40,
        ),
        qformer_config=dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
            encoder_hidden_size=24, cross_attention_frequency=2, vocab_size=50,
            max_position_embeddings=20, use_qformer_text_input=True,
        ),
        num_query_tokens=5,
        image_text_hidden_size=16,
    )  # fmt: skip
    peer = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("qkv.bias"):
                parameter[24:48] = 0
    source = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    vision = vision_transformer(
        {"vit": dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_hidden=40,
                     norm_eps=1e-6)}
    )  # fmt: skip
    model = ContrastModel(
        queries=5, width=32, depth=3, heads=4, hidden=48, vocabulary=50, positions=20, embed=16,
        encoder_width=24, norm_epsilon=1e-6,
    )  # fmt: skip
    params, _ = blip2.contrast(source, model, shapes_of(model))
    drop = [eva_vit.Drop(r"(?!vision_model\.).*|vision_model\.post_layernorm\..*", "interface")]
    table = eva_vit.hf_rows(2, 3)
    vision_params, _ = import_tree(table, source, vision_shapes(vision), drop=drop)
    pixels = torch.randn(3, 3, 16, 16)
    ids, mask = torch.randint(1, 50, (3, 7)), torch.arange(7)[None] < torch.tensor([[7], [4], [2]])
    inputs = dict(pixel_values=pixels, input_ids=ids, attention_mask=mask.long())
    with torch.no_grad():
        match = peer(**inputs, use_image_text_matching_head=True).logits_per_image
        align = peer(**inputs, use_image_text_matching_head=False).logits_per_image
    ids, mask = ids.numpy(), mask.numpy()
    features, _ = jax.jit(vision.apply)({"params": vision_params}, images(pixels.numpy()))
    units, text_units, per_query = _pairs(model, params, features, ids, mask)
    to_text, _ = similarities(units, text_units, 1.0)
    np.testing.assert_allclose(to_text, align.numpy(), atol=2e-5)
    np.testing.assert_allclose(per_query.mean(1), match.numpy(), atol=5e-5)


def test_cached_captions_equal_joint_ones_and_do_not_look_ahead():
    model = ContrastModel(**blip2_pretraining.SIZES["tiny"] | {"depth": 3})
    variables = jax.jit(model.init)(jax.random.key(0), *model.example())
    image = jax.random.normal(jax.random.key(1), (2, 5, model.encoder_width))
    ids = np.arange(14).reshape(2, 7)
    mask = np.arange(7) < np.array([[7], [4]])
    caption = jax.jit(functools.partial(model.apply, method="caption"))
    _, _, cache = jax.jit(functools.partial(model.apply, method="image"))(variables, image)
    _, cached = caption(variables, ids, mask, cache)
    jointly = jax.jit(functools.partial(model.apply, method="caption_jointly"))
    _, joint = jointly(variables, image, ids, mask)
    np.testing.assert_allclose(cached, joint, atol=1e-5)
    changed = ids.copy()
    changed[:, 3:] += 30
    _, other = caption(variables, changed, mask, cache)
    np.testing.assert_allclose(other[:, :3], cached[:, :3], atol=1e-6)
    assert np.abs(other[:, 3:] - cached[:, 3:]).max() > 1e-3


def test_interface_masks_scan_dropout_and_half_precision():
    sizes = interfaces.SIZES["tiny"] | {"llm_width": 48}
    model = QFormerInterface(**sizes)
    features = jax.random.normal(jax.random.key(1), (3, 9, model.encoder_width))
    variables = jax.jit(model.init)(jax.random.key(0), features, jnp.array([9, 9, 9]))
    run = jax.jit(model.apply)
    value, counts = run(variables, features, jnp.array([9, 4, 0]))
    queries = sizes["queries"]
    np.testing.assert_array_equal(counts, [queries, queries, 0])
    assert value.shape == (3, queries, 48) and np.all(np.isfinite(value))
    short, _ = run(variables, features[1:2, :4], jnp.array([4]))
    np.testing.assert_allclose(value[1:2], short, atol=1e-5)
    other = QFormerInterface(**sizes, remat="all", unroll=2)
    same, _ = jax.jit(other.apply)(variables, features, jnp.array([9, 4, 0]))
    np.testing.assert_allclose(same, value, atol=1e-5)
    dropping = QFormerInterface(**sizes | {"dropout": 0.1})
    train = jax.jit(functools.partial(dropping.apply, train=True))
    rngs = {"dropout": jax.random.key(3)}
    noisy, _ = train(variables, features, jnp.array([9, 4, 0]), rngs=rngs)
    assert np.abs(noisy - value).max() > 1e-2
    half = QFormerInterface(**sizes, dtype=jnp.bfloat16)
    near, _ = jax.jit(half.apply)(variables, features, jnp.array([9, 9, 9]))
    full, _ = run(variables, features, jnp.array([9, 9, 9]))
    assert near.dtype == jnp.bfloat16
    distance = np.linalg.norm(near - full) / np.linalg.norm(full)
    print(f"Q-Former tiny, bfloat16 against float32: relative distance {distance:.2e}")
    assert distance < 2e-2


def test_every_leaf_has_a_sharding_row_and_the_real_sizes_are_published_ones():
    for module, model in (
        (blip2_pretraining, ContrastModel(**blip2_pretraining.SIZES["tiny"] | {"depth": 3})),
        (interfaces, QFormerInterface(**interfaces.SIZES["tiny"])),
    ):
        shapes = shapes_of(model)
        specs = rules.flatten(rules.assign(module.SHARDING, shapes, total=False))
        for path, leaf in rules.flatten(shapes).items():
            assert len(specs[path]) <= len(leaf.shape), path
            if leaf.size > 1e4:
                assert any(specs[path]), f"{path} is large and not sharded"
    real = QFormerInterface(**interfaces.SIZES["blip2"])
    count = {path: leaf.size for path, leaf in rules.flatten(shapes_of(real)).items()}
    # transformers' Blip2QFormerModel at its default sizes, its own 'layernorm' included.
    qformer = sum(size for path, size in count.items() if path.startswith("qformer/"))
    assert qformer == _published_qformer()
    assert sum(count.values()) == qformer + 32 * 768 + 2 * 1408 + 769 * 4096


def _published_qformer() -> int:
    torch = pytest.importorskip("torch")
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    with torch.device("meta"):
        peer = Blip2QFormerModel(Blip2QFormerConfig())
    return sum(parameter.numel() for parameter in peer.parameters())


def test_text_needs_a_text_branch():
    with pytest.raises(ValueError, match="vocabulary"):
        QFormer(width=8, depth=2, heads=2, hidden=8).init(
            jax.random.key(0), ids=jnp.zeros((1, 2), jnp.int32), text_mask=jnp.ones((1, 2), bool)
        )
