"""The least FLOPs of each stage, by formulas of its sizes alone, against those of its program.

A product of the forward pass needs 2 FLOPs per multiply-add. Where a factor depends on what trains,
its gradient needs as many again: a frozen layer on frozen inputs 2, a frozen layer that a gradient
passes through 4, a trained layer 6, and 4 where it is the first that trains.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from typing import Any

import pytest

from xllm_jax.assembly import networks
from xllm_jax.core import flops
from xllm_jax.core.stage import Stage
from xllm_jax.models.outputs import projection
from xllm_jax.preflight import forecast, targets

FROZEN, THROUGH, FIRST, TRAINED = 2, 4, 4, 6  # FLOPs per multiply-add
BINS = 80


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The networks of a stage and its batch."""

    parts: dict[str, Any]
    stage: Stage

    @property
    def frames(self) -> int:
        return (self.stage.data.frames[-1] - 1) // 2  # behind the strided convolution


def vision(sizes: Sizes, images: int) -> float:
    """The frozen vision encoder; no gradient passes through it."""
    net = sizes.parts["vision_encoder"]
    patches = (sizes.stage.data.image["size"] // net.patch) ** 2
    tokens = patches + 1
    layer = tokens * (4 * net.width**2 + 2 * net.width * net.hidden) + 2 * tokens**2 * net.width
    return FROZEN * images * (patches * 3 * net.patch**2 * net.width + net.depth * layer)


def patches(sizes: Sizes) -> int:
    """Features of an image, the class token among them."""
    return (sizes.stage.data.image["size"] // sizes.parts["vision_encoder"].patch) ** 2 + 1


def self_attention(net: Any, rows: int, tokens: int, keys: int) -> float:
    """Multiply-adds of one layer: four products by parameters, scores and mixtures."""
    return rows * (4 * tokens * net.width**2 + 2 * tokens * keys * net.width)


def feed_forward(net: Any, tokens: int) -> float:
    """Multiply-adds of one layer."""
    return 2 * tokens * net.width * net.hidden


def cross_attention(net: Any, rows: int, images: int, features: int) -> float:
    """Of all layers that look at the image; keys and values once for every image."""
    layer = rows * net.queries * 2 * (net.width + features) * net.width
    layer += images * features * 2 * net.encoder_width * net.width
    return math.ceil(net.depth / net.cross_attention_frequency) * layer


def q_former(sizes: Sizes, name: str, images: int) -> float:
    """Multiply-adds of the queries over images, without the adapter."""
    net = sizes.parts[name]
    own = self_attention(net, images, net.queries, net.queries)
    own += feed_forward(net, images * net.queries)
    return net.depth * own + cross_attention(net, images, images, patches(sizes))


def adapter(sizes: Sizes, name: str, embeddings: int) -> float:
    net = sizes.parts[name]
    return embeddings * net.width * net.llm_width


def llm(sizes: Sizes) -> float:
    """The frozen LLM, which the gradient passes through, and its head at the answers."""
    net, data = sizes.parts["llm"], sizes.stage.data
    tokens = data.rows * data.length
    by_parameters = net.depth * tokens * (4 * net.width**2 + 2 * net.width * net.hidden)
    scores = net.depth * 2 * tokens * data.length * net.width  # both factors depend
    head = data.rows * data.answers * net.width * net.vocab
    return THROUGH * (by_parameters + head) + TRAINED * scores


def conformer(sizes: Sizes, rows: int, trains: bool) -> float:
    """Front end, blocks between the pools, scores by relative position as accelerators have them:
    a query is projected back to the width of the position vectors, head by head."""
    net, frames = sizes.parts["speech_encoder"], sizes.frames
    first, other = (FIRST, TRAINED) if trains else (FROZEN, FROZEN)
    bands, width = (BINS - 1) // 2, net.width
    total = first * rows * frames * bands * 9 * net.channels
    total += other * rows * frames * (bands * net.channels + width) * width
    edges = [0, *net.pools, net.depth]
    for number, depth in enumerate(b - a for a, b in itertools.pairwise(edges)):
        here = frames >> number
        by_parameters = 8 * width**2 + 4 * width * net.hidden + net.kernel * width
        total += other * depth * rows * here * (by_parameters + 2 * here * width)
        total += first * depth * rows * here**2 * net.heads * width  # with the places of the keys
    return total


def cif(sizes: Sizes, rows: int, each: int) -> float:
    """Weights of frames, and the tokens that they make."""
    net, frames = sizes.parts["speech_interface"], sizes.frames >> 2
    width = net.encoder_width
    return each * rows * frames * (net.kernel * width**2 + width + net.max_tokens * width)


def c_former(sizes: Sizes, rows: int) -> tuple[float, float]:
    """Multiply-adds of the projection, and of the layers."""
    net = sizes.parts["speech_interface"]
    tokens = rows * net.max_tokens
    layer = self_attention(net, rows, net.max_tokens, net.max_tokens) + feed_forward(net, tokens)
    return tokens * net.encoder_width * net.width, net.depth * layer


def stage1_speech(sizes: Sizes) -> float:
    net, rows = sizes.parts["asr_decoder"], sizes.stage.data.examples
    tokens = sizes.stage.data.characters_length
    depth = net.self_blocks + net.visual_blocks + net.linguistic_blocks
    layer = self_attention(net, rows, tokens, tokens) + feed_forward(net, rows * tokens)
    cross = rows * tokens * (2 * net.width**2 + 2 * net.width)  # one context vector a row
    cross *= net.visual_blocks + net.linguistic_blocks
    contexts = net.visual_blocks * net.visual_width + net.linguistic_blocks * net.linguistic_width
    ends = rows * tokens * (4 * net.width + net.vocab) * net.width
    ctc = rows * (sizes.frames >> 2) * net.width * net.vocab
    total = conformer(sizes, rows, trains=True) + cif(sizes, rows, TRAINED)
    total += TRAINED * (depth * layer + cross + ends + ctc)
    return total + FIRST * rows * 2 * contexts * net.width


def stage1_image(sizes: Sizes) -> float:
    net, data = sizes.parts["image_interface"], sizes.stage.data
    pairs, queries, text = data.examples, net.queries, data.text_length
    both = queries + text
    alone = self_attention(net, pairs, text, text) + feed_forward(net, pairs * text)
    match = self_attention(net, 3 * pairs, both, both) + feed_forward(net, 3 * pairs * both)
    caption = self_attention(net, pairs, text, both) + feed_forward(net, pairs * text)
    trained = q_former(sizes, "image_interface", pairs) + net.depth * (alone + match + caption)
    trained += cross_attention(net, 3 * pairs, pairs, patches(sizes))
    trained += pairs * (queries + 1) * net.width * net.embed
    trained += 3 * pairs * queries * net.width * 2
    trained += pairs * text * (net.width + net.vocabulary) * net.width
    compared = 2 * pairs**2 * queries * net.embed  # one side at a time gets the gradient
    return vision(sizes, pairs) + TRAINED * trained + FIRST * compared


def media(sizes: Sizes, modality: str) -> int:
    return sizes.stage.data.rows * sizes.stage.data.items[modality]


def stage2_visual(sizes: Sizes, modality: str) -> float:
    images, name = media(sizes, modality), f"{modality}_interface"
    queries = sizes.parts[name].queries
    trained = q_former(sizes, name, images) + adapter(sizes, name, images * queries)
    return vision(sizes, images) + TRAINED * trained + llm(sizes)


def stage2_speech(sizes: Sizes) -> float:
    rows, net = media(sizes, "speech"), sizes.parts["speech_interface"]
    project, layers = c_former(sizes, rows)
    trained = layers + adapter(sizes, "speech_interface", rows * net.max_tokens)
    heard = conformer(sizes, rows, trains=False) + cif(sizes, rows, FROZEN)
    return heard + FIRST * project + TRAINED * trained + llm(sizes)


def stage3(sizes: Sizes) -> float:
    total = llm(sizes)
    for modality in ("image", "video"):
        images, name = media(sizes, modality), f"{modality}_interface"
        total += vision(sizes, images) + FROZEN * q_former(sizes, name, images)
        total += FIRST * adapter(sizes, name, images * sizes.parts[name].queries)
    rows, net = media(sizes, "speech"), sizes.parts["speech_interface"]
    total += conformer(sizes, rows, trains=False) + cif(sizes, rows, FROZEN)
    total += FROZEN * sum(c_former(sizes, rows))
    return total + FIRST * adapter(sizes, "speech_interface", rows * net.max_tokens)


def text_encoder(sizes: Sizes, texts: int) -> float:
    """The frozen text encoder; no gradient passes through it."""
    net, tokens = sizes.parts["text_encoder"], sizes.stage.data.caption_length
    layer = self_attention(net, texts, tokens, tokens) + feed_forward(net, texts * tokens)
    return FROZEN * net.depth * layer


def stage_output_image(sizes: Sizes) -> float:
    """Everything behind the signal tokens' embeddings depends on what trains."""
    net, data = sizes.parts["image_projection"], sizes.stage.data
    signals, width, queries = data.signals["image"], net.width, net.queries
    runs, depth = data.rows * signals.runs, 4

    def block(tokens: int) -> float:
        return runs * tokens * (4 * width**2 + 2 * tokens * width + 8 * width**2)

    trained = runs * (signals.count * net.llm_width + queries * net.output_width) * width
    if isinstance(net, projection.TransformerProjection):
        cross = 2 * (queries + signals.count) * width**2 + 2 * queries * signals.count * width
        trained += depth * (block(signals.count) + block(queries) + runs * cross)
    else:
        trained += runs * queries * signals.count * width + depth * block(queries)
    trained += data.rows * data.answers * signals.count * net.llm_width
    return text_encoder(sizes, runs) + TRAINED * trained + llm(sizes)


FORMULAS = {
    "stage1_speech": stage1_speech,
    "stage1_image": stage1_image,
    "stage2_image": lambda sizes: stage2_visual(sizes, "image"),
    "stage2_video": lambda sizes: stage2_visual(sizes, "video"),
    "stage2_speech": stage2_speech,
    "stage3_instruction": stage3,
    "stage_output_image": stage_output_image,
}


@pytest.mark.parametrize("name", [*FORMULAS, "stage_output_image, as in the paper"])
def test_what_a_stage_needs(name):
    name, _, paper = name.partition(", ")
    stage: Stage = importlib.import_module(f"xllm_jax.configs.{name}").get_config("tiny")
    if paper:  # the miniature has another projection
        part = stage.parts["image_projection"]
        stage.parts["image_projection"] = dataclasses.replace(
            part, network="outputs.projection.TransformerProjection"
        )
    formula = FORMULAS[name](Sizes(dict(networks.model(stage).networks), stage))
    made = forecast.prepare(stage, targets.parse("h200:1"), compiles=False)
    needed = flops.useful(made.trainer.loss, made.state.trainable, made.state.frozen, made.batch)
    # Beyond the formula the program projects every token of a text, of which ITC compares the first
    # (stage 1, image), and has the head at places that fill up its last chunk.
    assert formula * (1 - 1e-6) <= needed <= formula * 1.02
