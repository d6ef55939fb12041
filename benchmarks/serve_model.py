"""A small LLaMA for the measurements of the server: a folder as transformers writes it, and a run.

Its weights are random: what is measured depends on shapes alone. Rows of the head whose tokens are
no whole characters are zero, and so are those of tokens that end an answer: greedy answers are
readable, and have as many tokens as they may.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.convert import run_import
from xllm_jax.core import checkpoint, mesh
from xllm_jax.core.stage import Data, Part, Stage
from xllm_jax.data.synthetic_world.text_stream import text_examples

SPECIALS = ["<s>", "</s>", "<pad>"]
TEMPLATE = "paper"
SPREAD = 0.06  # of the weights: scores far enough from each other that no rounding changes a token


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the LLM: see `models/causal.py`."""

    vocab: int = 2048
    width: int = 384
    depth: int = 8
    heads: int = 8
    hidden: int = 1024


@dataclasses.dataclass(frozen=True)
class Made:
    """The same LLM twice.

    Attributes:
      published: folder as transformers writes it, the tokenizer included.
      run: folder of a run that `xllm serve` takes.
      parameters: their number.
    """

    published: Path
    run: Path
    parameters: int


def make(folder: Path, sizes: Sizes = Sizes(), seed: int = 0) -> Made:
    """Writes both, the run's parameters through our converter."""
    published = folder / "published"
    published.mkdir(parents=True)
    words = tokenizer()
    model = network(sizes, words, seed)
    model.save_pretrained(published)
    words.save(str(published / "tokenizer.json"))
    run_import.run_import("llama", published, folder / "bases" / "llm")
    return Made(published, write_run(folder, sizes), model.num_parameters())


def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level pieces of the world's sentences, in the form that LLaMA 3's are published in."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator((one.answer for one in text_examples(0, 2000)), trainer)
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return made


def network(sizes: Sizes, words: tokenizers.Tokenizer, seed: int) -> transformers.LlamaForCausalLM:
    """The LLM in transformers."""
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    whole = [number for number in range(3, words.get_vocab_size()) if readable(words, number)]
    with torch.no_grad():
        for leaf in model.parameters():
            if leaf.ndim > 1:
                leaf.normal_(std=SPREAD)
        kept = torch.zeros(sizes.vocab, 1)
        kept[whole] = 1.0
        model.lm_head.weight.mul_(kept)
    return model.eval()


def readable(words: tokenizers.Tokenizer, number: int) -> bool:
    """Whether a piece is Chinese characters."""
    text = words.decode([number])
    return bool(text) and all("\u4e00" <= sign <= "\u9fff" for sign in text)


def write_run(folder: Path, sizes: Sizes) -> Path:
    """A run whose LLM is the base of the folder, and which takes text alone."""
    fields = dataclasses.asdict(sizes) | {"norm_epsilon": 1e-6}
    stage = Stage(
        name="served",
        parts={"llm": Part("causal.Causal", "tiny", fields | {"key_heads": None})},
        init={"llm": "bases/llm"},
        data=Data(llm_family="causal", template=TEMPLATE, tokenizer="published"),
        compute="float32",
        frozen="float32",
    )
    here = dataclasses.replace(stage, init={"llm": str(folder / "bases" / "llm")})
    params = parameters.parameters(System.build(here, mesh.make(stage.mesh, jax.devices()[:1])))
    about = {"stage": dataclasses.asdict(stage)}
    checkpoint.save_base(folder / "run" / "final", {"llm": params["llm"]}, about)
    return folder / "run"


def questions(count: int) -> list[str]:
    """Questions of several lengths."""
    texts = (one.answer for one in text_examples(1, 20 * count) if one.answer)
    return ["".join(itertools.islice(texts, 1 + number % 4)) for number in range(count)]
