"""Converts the shipped backbones of the synthetic world into bases for `init`.

    xllm build-backbones --output=bases
    xllm build-backbones --output=bases --tokenizer    # maintainers: what pre-training begins with
    xllm build-backbones --output=bases --latents=runs # maintainers: what the mini UNet learns from
    xllm build-backbones --output=bases --export=runs  # maintainers: ship what was trained

`make backbones` runs all of it in order, with the trainings in between. The tokenizer is shipped,
too: ids of configs/networks.py are its. --learn_tokenizer learns another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import jax
from absl import flags

import xllm_jax
from xllm_jax.assembly import parameters
from xllm_jax.assembly.networks import model
from xllm_jax.assembly.system import System
from xllm_jax.configs import (
    networks,
    sources,
    world_autoencoder,
    world_bert,
    world_blip2,
    world_diffusion,
    world_llm_requests,
    world_text_places,
    world_vision,
)
from xllm_jax.convert.sources import stable_diffusion, world
from xllm_jax.core import bounded, mesh
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params
from xllm_jax.data.batching import scene_latents as latents_format
from xllm_jax.data.sources import world_scenes
from xllm_jax.data.synthetic_world import clip_vocabulary
from xllm_jax.data.synthetic_world.text_stream import text_examples
from xllm_jax.data.text.chatglm_tokenizer import train_tokenizer
from xllm_jax.data.text.templates import TEMPLATES
from xllm_jax.feature_cache import scene_latents
from xllm_jax.launch import cli
from xllm_jax.models.bert import SIZES as BERT_SIZES
from xllm_jax.models.bert import BertEncoder
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.xllm import LLM, XLLM

OUTPUT = flags.DEFINE_string("output", "bases", "Folder in which the bases are written.")
EXPORT = flags.DEFINE_string(
    "export", "", "Folder of runs whose results go into the package; without it, what ships stays."
)
TOKENIZER = flags.DEFINE_bool(
    "tokenizer",
    False,
    "Write only what pre-training needs: the tokenizer of the LLM, the vocabularies of BERT and of "
    "the text encoder.",
)
LEARN = flags.DEFINE_bool(
    "learn_tokenizer",
    False,
    "As --tokenizer, but learn the LLM's anew: pieces and their ids change with the text.",
)
LATENTS = flags.DEFINE_string(
    "latents",
    "",
    "Folder of runs: write only the latents that its world_autoencoder gives to drawn pictures.",
)

WORDS_AROUND = ("paper", "chatglm_zh", "plain")  # templates whose words the tokenizer knows
SHIPPED = Path(xllm_jax.__file__).parent / "data" / "synthetic_world" / "backbones"
DECODER = SHIPPED / Path(networks.DECODER).name
BLIP2 = "blip2_stage2"
LATENTS_NAME = sources.LATENTS


def main(_: list[str]) -> None:
    output = Path(OUTPUT.value)
    if TOKENIZER.value or LEARN.value:
        made = learn_tokenizer(output / "llm") if LEARN.value else copy_tokenizer(output / "llm")
        print(f"Tokenizer: {made}")
        world.copy_file(SHIPPED / "bert" / world.VOCABULARY, output)
        clip_vocabulary.write(output / Path(networks.DECODER).name / "tokenizer")
        return
    if LATENTS.value:
        scaling = write_latents(Path(LATENTS.value), output / LATENTS_NAME)
        print(f"Latents, times {scaling:.4f}: {output / LATENTS_NAME}")
        return
    if EXPORT.value:
        export(Path(EXPORT.value), output)
    world.import_llm(SHIPPED / LLM, output / LLM)
    vision = model(world_vision.get_config()).networks["vision_encoder"]
    world.import_vision(vision, SHIPPED / "vision_encoder", output / "vision_encoder")
    interface = model(world_blip2.get_config()).networks["image_interface"]
    world.import_blip2(interface, SHIPPED / BLIP2, output / BLIP2)
    text_model = model(world_bert.get_config()).networks["text_model"]
    c_former = BertEncoder(**{**BERT_SIZES["tiny"], "vocabulary": 0})
    world.import_bert(text_model, c_former, SHIPPED / "bert", output)
    if DECODER.is_dir():
        world.import_decoder(DECODER, output / DECODER.name)
    print(f"Bases: {', '.join(sorted(p.name for p in output.iterdir()))} in {output}")


def copy_tokenizer(folder: Path) -> Path:
    """Writes the shipped tokenizer of the LLM; returns its folder."""
    for name in world.TOKENIZER:
        world.copy_file(SHIPPED / "llm" / name, folder)
    return folder


def learn_tokenizer(folder: Path) -> Path:
    """Learns pieces from the world's text.

    Pieces have at most two characters: longer ones would swallow size, color and shape together,
    and a pair never seen would be a word never seen. Each tag is one piece.
    """
    texts = []
    for example in text_examples(0, 4000):
        rounds = [text for earlier in example.history for text in earlier]
        media = [text for _, text in example.media]
        texts += [text for text in (*media, *rounds, example.instruction, example.answer) if text]
    for template in (TEMPLATES[name] for name in WORDS_AROUND):
        words = dict(round=0, question="", answer="")
        forms = (template.question, template.earlier, template.last, template.system)
        texts += [text.format(**words) for text in forms] * 100
    tags = [f"<{sign}{name.capitalize()}>" for name in networks.MODALITIES for sign in ("", "/")]
    return train_tokenizer([t for t in texts if t], folder, learned=200, longest=2, words=tags)


def write_latents(runs: Path, folder: Path) -> float:
    """Writes the latents of as many drawn pictures as world_diffusion reads; returns the scaling.

    Args:
      runs: folder of the run world_autoencoder.
      folder: of the latents.
    """
    data = world_diffusion.get_config().data
    (stream,) = data.sources.values()
    first = world_scenes.examples("", stream.split, **stream.options)[0].key
    xllm, params = trained(world_autoencoder.get_config(), runs, ("vae",))
    network, seed = cast(Autoencoder, xllm.networks["vae"]), int(first.split("-")[0])
    count, side = stream.options["count"], data.image["size"]
    return scene_latents.write(network, params["vae"], seed, count, side, folder)


def export(runs: Path, bases: Path) -> None:
    """Puts the results of the pre-training runs into the package, in the published forms.

    Args:
      runs: folder of the runs; what it lacks stays as it ships.
      bases: with the tokenizers and the latents' scaling.
    """
    for name, stage in (
        (LLM, world_llm_requests.get_config()),
        ("vision_encoder", world_vision.get_config()),
        ("image_interface", world_blip2.get_config()),
        ("text_model", world_bert.get_config()),
        ("unet", world_diffusion.get_config()),
    ):
        if not (runs / stage.name).is_dir():
            print(f"No run {stage.name}: what ships stays")
            continue
        if name == "unet":
            export_decoder(runs, bases)
            continue
        xllm, params = trained(stage, runs, (name,))
        if name == LLM:
            world.export_llm(xllm.networks[name], params[name], bases / LLM, SHIPPED / LLM)
        elif name == "image_interface":
            world.export_blip2(xllm.networks[name], params[name], SHIPPED / BLIP2)
        elif name == "text_model":
            vocabulary = SHIPPED / "bert" / world.VOCABULARY
            world.export_bert(xllm.networks[name], params[name], vocabulary, SHIPPED / "bert")
        else:
            world.export_vision(xllm.networks[name], params[name], SHIPPED / name)


def export_decoder(runs: Path, bases: Path) -> None:
    """Ships the mini Stable Diffusion: its UNet, text encoder and autoencoder."""
    stage = world_diffusion.get_config()
    first, vae = trained(world_autoencoder.get_config(), runs, ("vae",))
    then, unet = trained(stage, runs, ("unet",))
    _, text = trained(world_text_places.get_config(), runs, ("text_encoder",))
    about = bounded.read_json(bases / LATENTS_NAME / latents_format.ABOUT)
    made: dict[str, Any] = {**first.networks, **then.networks}
    made["vae"] = made["vae"].clone(scaling=about["scaling"])
    schedule = stable_diffusion.DEFAULT_SCHEDULER | {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": stage.options["prediction"],
    }
    tokenizer, side = bases / DECODER.name / "tokenizer", about["side"]
    world.export_decoder(made, vae | unet | text, schedule, side, tokenizer, DECODER)


def trained(stage: Stage, runs: Path, parts: tuple[str, ...]) -> tuple[XLLM, Params]:
    """The networks of a stage and the parameters of some parts of its finished run, in float32."""
    stage.init = {part: str(runs / stage.name) for part in parts}
    stage.frozen = "float32"
    system = System.build(stage, mesh.make({}, jax.devices()[:1]))
    params = parameters.parameters(system)
    return system.model, {part: params[part] for part in parts}


if __name__ == "__main__":
    cli.run(main, "Bases that were finished are whole")
