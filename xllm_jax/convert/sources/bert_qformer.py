"""A published BERT with its language head to what BLIP-2's first stage starts its Q-Former from.

The base holds `qformer/…` without cross-attention and `language_head/…`, as configs/stage1_image.py
takes them. The queries' feed-forward starts as a copy of the words'. [DEC], which BERT's vocabulary
lacks, gets a row of its own behind the published ones: its word vector is drawn from a normal
distribution with the deviation that BERT itself starts from, and its bias in the head is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from xllm_jax.convert import ConversionPlan, Drop, Row, base_sizes, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint, Derived, View
from xllm_jax.convert.sources import bert, blip2
from xllm_jax.core import bounded, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.text_lines import split_lines
from xllm_jax.models.blip2_pretraining import SIZES, ContrastModel

HEAD = "cls.predictions"
WORDS, BIAS = "bert.embeddings.word_embeddings.weight", f"{HEAD}.bias"
POSITIONS = "bert.embeddings.position_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
DECODER = {f"{HEAD}.decoder.weight": WORDS, f"{HEAD}.decoder.bias": BIAS}
ADDED, SEED, DEVIATION = "[DEC]", 0, 0.02
DROP = (
    Drop(r"bert\.embeddings\.token_type_embeddings\.weight", "a Q-Former has no segments"),
    Drop(r"bert\.embeddings\.position_ids", "the numbers 0, 1, 2 …"),
    Drop(r"bert\.pooler\..*", "the pooled vector is not used"),
    Drop(r"cls\.seq_relationship\..*", "BERT's next-sentence head"),
    Drop(r"cls\.predictions\.decoder\.(weight|bias)", "tied to words and head, and equal to them"),
)


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of a BERT with its language head."""
    marks = (WORDS, BIAS, f"{HEAD}.transform.dense.weight", QUERY)
    return all(mark in checkpoint for mark in marks)


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """Layout and sizes.

    Returns:
      `interface`: fields of `ContrastModel`; `added`: rows behind the published vocabulary;
      `seed` of their word vectors; `gamma`: whether norms are named as in the published files.

    Raises:
      UserError: unknown size, or a file without the tensors that tell it.
    """
    if checkpoint is None:
        return dict(interface=sizes.row(SIZES, size), added=1, seed=SEED, gamma=False)
    words = sizes.axis(checkpoint, WORDS, 0)
    added = _added(checkpoint, words)
    known = dict(vocabulary=words + added, positions=sizes.axis(checkpoint, POSITIONS, 0))
    described = bert.described(
        checkpoint, "bert.", functools.partial(sizes.fitting, SIZES, size, checkpoint), decoder=True
    )
    sizes.check_named(SIZES, size, described)
    row = sizes.row(SIZES, size, width=described["width"]) | described | known
    gamma = "bert.embeddings.LayerNorm.gamma" in checkpoint
    return dict(interface=row, added=added, seed=SEED, gamma=gamma)


def options_of(base: Base) -> dict[str, Any]:
    """Layout and sizes from a base's parameters; the usual names."""
    interface = base_sizes.qformer(base, "qformer")
    return dict(interface=interface, added=1, seed=SEED, gamma=False)


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The subtrees 'qformer' and 'language_head' of the stage-1 model, without cross-attention."""
    model = ContrastModel(**options["interface"])
    shapes = {
        path: leaf
        for path, leaf in rules.flatten(sizes.shapes_of(model)).items()
        if path.startswith(("qformer/", "language_head/")) and "cross_attention" not in path
    }
    return ConversionPlan(
        table=_table(options),
        shapes=rules.unflatten(shapes),
        drop=DROP,
        extra_files=("vocab.txt",),
        fields=dict.fromkeys(("qformer", "language_head"), bert.told(options["interface"])),
    )


def prepare(checkpoint: Checkpoint, options: Mapping[str, Any]) -> View:
    """The file with the queries' feed-forward and the added rows in it.

    Raises:
      UserError: a tensor is missing, or the head's decoder is not the word table.
    """
    from xllm_jax.convert import run_import

    for name, other in DECODER.items():
        if name in checkpoint and other in checkpoint:
            run_import.check_tied(checkpoint, name, other)
    derived = {}
    for query, words in _copies(options).items():
        if words not in checkpoint:
            continue  # the table misses it by its name
        header = checkpoint.header(words)
        for name in (words, query):
            derived[name] = Derived((words,), header.shape, header.dtype, lambda x: x)
    for name in (WORDS, BIAS):
        shape, dtype = checkpoint.header(name).shape, checkpoint.header(name).dtype
        longer = (shape[0] + options["added"], *shape[1:])
        derived[name] = Derived(
            (name,), longer, dtype, lambda x, seed=options["seed"], n=longer[0]: _grown(x, n, seed)
        )
    return View(checkpoint, derived)


def restore(tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> View:
    """Exported tensors without what a BERT has no place for.

    Raises:
      UserError: on reading, where the queries' feed-forward is no copy of the words' any more.
    """
    derived = {}
    for query, words in _copies(options).items():
        header = tensors.header(words)
        make = lambda x, copy, name=query: _same(x, copy, name)  # noqa: E731
        derived[words] = Derived((words, query), header.shape, header.dtype, make)
    for name in (WORDS, BIAS):
        shape, dtype = tensors.header(name).shape, tensors.header(name).dtype
        rows = shape[0] - options["added"]
        derived[name] = Derived((name,), (rows, *shape[1:]), dtype, lambda x, n=rows: x[:n])
    return View(tensors, derived)


def _table(options: Mapping[str, Any]) -> tuple[Row, ...]:
    fields = options["interface"]
    frequency = ContrastModel(**fields).cross_attention_frequency
    layers = blip2.layer_rows(
        fields["depth"], fields["heads"], frequency, source="bert.", text=True
    )
    table = (
        *(row for row in layers if "cross_attention" not in row.target),
        Row(WORDS, "qformer/embeddings/words"),
        Row(POSITIONS, "qformer/embeddings/positions"),
        *bert.norm("bert.embeddings.LayerNorm", "qformer/embeddings/norm"),
        Row(BIAS, "language_head/bias"),
        *bert.linear(f"{HEAD}.transform.dense", "language_head/dense"),
        *bert.norm(f"{HEAD}.transform.LayerNorm", "language_head/norm"),
    )
    return bert.named_as(table, ["LayerNorm.gamma"] if options["gamma"] else [])


def _copies(options: Mapping[str, Any]) -> dict[str, str]:
    """{name of a tensor of the queries' feed-forward: the words' tensor that it starts as}."""
    rows = [row for row in _table(options) if "query_feed_forward" in row.target]
    return {name: name.replace("_query", "") for row in rows for name in row.names()}


def _added(checkpoint: Checkpoint, words: int) -> int:
    """Rows that [DEC] needs: one, unless the word table has room behind vocab.txt already."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    file = folder / "vocab.txt"
    listed = split_lines(bounded.read_text(file)) if file.is_file() else [""] * words
    return max(0, len(listed) + (ADDED not in listed) - words)


def _grown(tensor: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """The tensor with further rows: drawn ones for word vectors, zeros for biases."""
    shape = (rows - len(tensor), *tensor.shape[1:])
    drawn = np.random.default_rng(seed).normal(0, DEVIATION, shape)
    fresh = drawn if tensor.ndim > 1 else np.zeros(shape)
    return np.concatenate([tensor, fresh.astype(tensor.dtype)])


def _same(tensor: np.ndarray, copy: np.ndarray, name: str) -> np.ndarray:
    if tensor.tobytes() != copy.tobytes():
        raise UserError(
            "differs from the words' feed-forward, and a BERT has no place for it",
            field=name,
            hint="Export a trained Q-Former with --source=blip2",
        )
    return tensor
