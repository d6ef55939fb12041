"""The embedded world's backbones: small files in the published forms, and our bases from them.

`llm/` is a ChatGLM folder (config.json, model.safetensors, tokenizer), `vision_encoder/` an EVA
file, `blip2_stage2/` a LAVIS file of BLIP-2's second stage, `bert/` a BERT with its language head
and vocab.txt, `image_decoder/` a pipeline's folder of Stable Diffusion; all in float16 and
under the names of the real checkpoints, read by the same tables.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xllm_jax.convert import ConversionPlan, export_tree, files, import_tree, run_import, sizes
from xllm_jax.convert.sources import (
    bert,
    blip2,
    chatglm,
    clip_text,
    eva_vit,
    stable_diffusion,
)
from xllm_jax.core import atomic, bounded, checkpoint, disk, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.new_folder import new_folder
from xllm_jax.data.text.chatglm_tokenizer import ChatGLMTokenizer
from xllm_jax.models.bert import BertEncoder
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.glm import ChatGLM
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.vit import VisionTransformer

TOKENIZER = ("ice_text.model", "tokenizer_config.json")
CONFIG = "config.json"
WEIGHTS, VOCABULARY = "model.safetensors", "vocab.txt"
TYPES = "bert.embeddings.token_type_embeddings.weight"
KINDS = {"chatglm": chatglm, "eva_vit": eva_vit}
NO_FIELDS = {"parent", "name", "dtype", "attention", "implementation", "remat", "unroll"}
"""Fields of a network that say how it is computed, and not what it is."""
LARGEST = 1024
"""Widths from here on are the published models' own."""


def export_llm(model: ChatGLM, params: Mapping[str, Any], tokenizer: Path, folder: Path) -> None:
    """Writes a ChatGLM folder: configuration, float16 weights, tokenizer."""
    disk.make_folder(folder)
    config = chatglm.config_of(model, ChatGLMTokenizer(tokenizer).specials)
    atomic.write_json(folder / CONFIG, config)
    tensors = export_tree(chatglm.rows(model.depth, model.heads), params)
    _save(tensors | {chatglm.HEAD: tensors[chatglm.WORDS]}, folder / WEIGHTS)
    for name in TOKENIZER:
        if tokenizer != folder:
            copy_file(tokenizer / name, folder)


def export_vision(model: VisionTransformer, params: Mapping[str, Any], folder: Path) -> None:
    """Writes an EVA ViT file in float16."""
    disk.make_folder(folder)
    _save(export_tree(eva_vit.rows(model.depth, model.heads), params), folder / WEIGHTS)


def export_blip2(model: QFormerInterface, params: Mapping[str, Any], folder: Path) -> None:
    """Writes a Q-Former with its projection to another LLM in float16, in LAVIS' names."""
    disk.make_folder(folder)
    table = blip2.plan(_blip2_options(model)).table
    _save(export_tree(table, {"image_interface": params}), folder / WEIGHTS)


def _blip2_options(model: QFormerInterface) -> dict[str, Any]:
    """What `blip2.options` would say of this network."""
    names = {f.name for f in dataclasses.fields(model)} - NO_FIELDS
    fields = {name: getattr(model, name) for name in sorted(names)}
    return dict(kind="lavis", text=False, adapter=True, vision=None, interface=fields)


def export_bert(
    model: ContrastModel, params: Mapping[str, Any], vocabulary: Path, folder: Path
) -> None:
    """Writes a BERT folder from the text branch of a Q-Former: float16 weights and vocab.txt."""
    disk.make_folder(folder)
    flat = rules.flatten(params)
    tensors = export_tree(blip2.from_bert_rows(model), params)
    tensors |= {name: np.asarray(flat[path]) for path, name in blip2.FROM_BERT_WORDS}
    # BERT adds one of two rows to every word; a Q-Former has none, which is a row of zeros.
    tensors[TYPES] = np.zeros((2, model.width), np.float32)
    _save(tensors, folder / WEIGHTS)
    if vocabulary != folder / VOCABULARY:
        copy_file(vocabulary, folder)


def export_decoder(
    networks: Mapping[str, stable_diffusion.Network],
    params: Mapping[str, Any],
    schedule: Mapping[str, Any],
    side: int,
    tokenizer: Path,
    folder: Path,
) -> None:
    """Writes a pipeline's folder in float16; one that stands there is replaced.

    Args:
      networks, params: by part: unet, vae and text_encoder.
      schedule: the scheduler_config.json.
      side: of the latents that it learned to draw.
      tokenizer: folder of the text encoder's.
      folder: to write.
    """
    plan = stable_diffusion.plan(_decoder_options(networks))
    tensors = export_tree(plan.table, params)
    with new_folder(folder) as partial:
        shutil.copytree(tokenizer, partial / "tokenizer")
        for start, stem in plan.weight_files.items():
            disk.make_folder((partial / stem).parent)
            own = {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}
            _save(own, partial / f"{stem}.safetensors")
        disk.make_folder((partial / stable_diffusion.SCHEDULER).parent)
        atomic.write_json(partial / stable_diffusion.SCHEDULER, dict(schedule))
        for name, text in plan.written_files.items():
            if not (partial / name).exists():
                atomic.write_text(partial / name, text(partial))
        config = partial / "unet" / "config.json"
        atomic.write_json(config, bounded.read_json(config) | {"sample_size": side})


def _decoder_options(networks: Mapping[str, stable_diffusion.Network]) -> dict[str, Any]:
    """What `stable_diffusion.options` would say of these networks."""
    told = {"unet": {"linear_projection": False}, "vae": {"old_names": False}}
    found: dict[str, Any] = {"alone": False, "index": {}}
    for part, network in networks.items():
        names = {f.name for f in dataclasses.fields(network)} - NO_FIELDS
        fields = {name: getattr(network, name) for name in sorted(names)}
        found[part] = {"fields": fields} | told.get(part, {"prefix": clip_text.PREFIXES[0]})
    return found


def import_decoder(folder: Path, output: Path) -> None:
    """Writes the base 'image_decoder', which draws.

    The tokenizer alone, which pre-training needed there, gives way.
    """
    if output.is_dir() and [path.name for path in output.iterdir()] == ["tokenizer"]:
        shutil.rmtree(output)
    run_import.run_import("stable_diffusion", folder, output)


def import_bert(model: ContrastModel, encoder: BertEncoder, folder: Path, output: Path) -> None:
    """Writes what starts from a BERT: the bases 'bert' (C-Former) and 'bert_qformer'.

    Args:
      model: the Q-Former with its text branch.
      encoder: the C-Former's encoder, which has no word table.
      folder: the BERT folder.
      output: where 'bert', 'bert_qformer' and the vocabulary go.
    """
    source = files.open_checkpoint(folder)
    # As one program: one by one, its operations take longer to compile.
    drawn = jax.jit(lambda key: model.init(key, *model.example())["params"])(jax.random.key(0))
    whole = rules.flatten(blip2.from_bert(source, model, drawn))
    taken = {
        path: leaf
        for path, leaf in whole.items()
        if path.startswith(("qformer/", "language_head/")) and "cross_attention" not in path
    }
    _write(rules.unflatten(taken), folder, output / "bert_qformer")
    shapes = jax.eval_shape(
        lambda: encoder.init(jax.random.key(0), embeddings=np.zeros((1, 2, encoder.width)))
    )["params"]
    table = bert.rows(encoder.depth, encoder.heads, words=False)
    params, _ = import_tree(table, source, shapes, drop=bert.DROP)
    _write({"bert": params}, folder, output / "bert")
    copy_file(folder / VOCABULARY, output)


def import_llm(folder: Path, output: Path) -> None:
    """Writes the base 'llm' with the tokenizer and its configuration beside it."""
    _write(run_import.examine("chatglm", folder).tree(), folder, output)
    for name in (*TOKENIZER, CONFIG):  # which tells the ids that are spare
        copy_file(folder / name, output)


def import_blip2(model: QFormerInterface, folder: Path, output: Path) -> None:
    """Writes the base 'blip2_stage2'."""
    found = run_import.examine("blip2", folder, options=_blip2_options(model))
    _write(found.tree(), folder, output)


def import_vision(model: VisionTransformer, folder: Path, output: Path) -> None:
    """Writes the base 'vision_encoder'."""
    shapes = sizes.shapes_of(model)
    source = files.open_checkpoint(folder)
    params, _ = import_tree(eva_vit.rows(model.depth, model.heads), source, shapes)
    _write({"vision_encoder": params}, folder, output)


def _write(parts: dict[str, Any], source: Path, output: Path) -> None:
    parts = jax.tree.map(lambda x: np.asarray(x, np.float32), parts)
    checkpoint.save_base(output, parts, {"source": source.name})


def copy_file(file: Path, folder: Path) -> None:
    """Copies a file into a folder, whole or not at all; what a killed copy has left goes."""
    with atomic.whole(folder / file.name) as partial:
        shutil.copy(file, partial)
    atomic.remove_partial(folder, {file.name})


def _save(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    halved = {name: np.asarray(x, np.float16, order="C") for name, x in tensors.items()}
    with atomic.whole(path) as partial, disk.writing(path, also=(SafetensorError,)):
        save_file(halved, str(partial))
    atomic.remove_partial(path.parent, {path.name})


def recognize(checkpoint: files.Checkpoint) -> bool:
    """Whether the tensors are those of the world's mini LLM or mini ViT."""
    return any(_is(kind, checkpoint) for kind in KINDS)


def options(checkpoint: files.Checkpoint | None, size: str) -> dict[str, Any]:
    """The `kind` of backbone and the options of that kind's own source.

    Raises:
      UserError: there is nothing to tell the kind by.
    """
    if checkpoint is None:
        raise UserError(
            "an export needs the base's conversion.json",
            field="--source=world",
            hint="Say --source=chatglm or --source=eva_vit",
        )
    kind = next(kind for kind in KINDS if _is(kind, checkpoint))
    return {"kind": kind, **KINDS[kind].options(checkpoint, size)}


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """Part 'llm' or 'vision_encoder'."""
    rest = {name: value for name, value in options.items() if name != "kind"}
    return KINDS[options["kind"]].plan(rest)


def _is(kind: str, checkpoint: files.Checkpoint) -> bool:
    if not KINDS[kind].recognize(checkpoint):
        return False
    name = {"chatglm": chatglm.WORDS, "eva_vit": "cls_token"}[kind]
    return checkpoint.header(name).shape[-1:] < (LARGEST,)
