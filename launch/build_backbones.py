"""Converts the shipped backbones of the synthetic world into bases for `init`.

    xllm build-backbones --output=bases
    xllm build-backbones --output=bases --tokenizer    # maintainers: learn the tokenizer
    xllm build-backbones --output=bases --export=runs  # maintainers: ship what was trained

`make backbones` runs all of it in order, with the four trainings in between.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
from absl import flags

import xllm_jax
from xllm_jax.assembly import parameters
from xllm_jax.assembly.networks import model
from xllm_jax.assembly.system import System
from xllm_jax.configs import networks, world_bert, world_llm_slots, world_vision
from xllm_jax.convert.sources import world
from xllm_jax.core import mesh
from xllm_jax.data.synthetic_world import clip_vocabulary
from xllm_jax.data.synthetic_world.text_stream import text_examples
from xllm_jax.data.text.chatglm_tokenizer import train_tokenizer
from xllm_jax.data.text.prompt import TEMPLATES
from xllm_jax.launch import cli
from xllm_jax.models.bert import SIZES as BERT_SIZES
from xllm_jax.models.bert import BertEncoder

OUTPUT = flags.DEFINE_string("output", "bases", "Folder in which the bases are written.")
EXPORT = flags.DEFINE_string(
    "export", "", "Folder of runs whose results go into the package; without it, what ships stays."
)
TOKENIZER = flags.DEFINE_bool(
    "tokenizer",
    False,
    "Write only what pre-training needs: a newly learned tokenizer of the LLM, the vocabularies of "
    "BERT and of the text encoder.",
)

WORDS_AROUND = ("paper", "chatglm_zh", "plain")  # templates whose words the tokenizer knows
SHIPPED = Path(xllm_jax.__file__).parent / "data" / "synthetic_world" / "backbones"


def main(_: list[str]) -> None:
    output = Path(OUTPUT.value)
    if TOKENIZER.value:
        print(f"Tokenizer: {learn_tokenizer(output / 'llm')}")
        shutil.copy(SHIPPED / "bert" / world.VOCABULARY, output / world.VOCABULARY)
        clip_vocabulary.write(output / Path(networks.DECODER).name / "tokenizer")
        return
    if EXPORT.value:
        export(Path(EXPORT.value), output / "llm")
    world.import_llm(SHIPPED / "llm", output / "llm")
    vision = model(world_vision.get_config()).networks["vision_encoder"]
    world.import_vision(vision, SHIPPED / "vision_encoder", output / "vision_encoder")
    text_model = model(world_bert.get_config()).networks["text_model"]
    c_former = BertEncoder(**{**BERT_SIZES["tiny"], "vocabulary": 0})
    world.import_bert(text_model, c_former, SHIPPED / "bert", output)
    print(f"Bases: {', '.join(sorted(p.name for p in output.iterdir()))} in {output}")


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
        texts += [text.format(**words) for text in dataclasses.astuple(template)] * 100
    tags = [f"<{sign}{name.capitalize()}>" for name in networks.MODALITIES for sign in ("", "/")]
    return train_tokenizer([t for t in texts if t], folder, learned=200, longest=2, words=tags)


def export(runs: Path, tokenizer: Path) -> None:
    """Puts the results of the pre-training runs into the package, in the published forms."""
    for name, stage in (
        ("llm", world_llm_slots.get_config()),
        ("vision_encoder", world_vision.get_config()),
        ("text_model", world_bert.get_config()),
    ):
        if not (runs / stage.name).is_dir():
            print(f"No run {stage.name}: what ships stays")
            continue
        stage.init, stage.frozen = {name: str(runs / stage.name)}, "float32"
        system = System.build(stage, mesh.make({}, jax.devices()[:1]))
        xllm, params = system.model, parameters.parameters(system)[name]
        if name == "llm":
            world.export_llm(xllm.networks[name], params, tokenizer, SHIPPED / name)
        elif name == "text_model":
            vocabulary = SHIPPED / "bert" / world.VOCABULARY
            world.export_bert(xllm.networks[name], params, vocabulary, SHIPPED / "bert")
        else:
            world.export_vision(xllm.networks[name], params, SHIPPED / name)


if __name__ == "__main__":
    cli.run(main, "Bases that were finished are whole")
