"""Small published checkpoints of every source, made of random numbers."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from xllm_jax.convert import export_tree, header, run_export, run_import
from xllm_jax.core import rules
from xllm_jax.models import bert, blip2_pretraining, interfaces, vit

LLM = dict(vocab=40, width=16, depth=3, heads=2, hidden=24, norm_epsilon=1e-5, alpha=None)
CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 3,
    "num_attention_heads": 2,
    "inner_hidden_size": 24,
}
SEEN = dict(vit.SIZES["tiny"])
QUERIES = dict(interfaces.SIZES["tiny"])
STAGE1 = dict(blip2_pretraining.SIZES["tiny"])
BERT = dict(bert.SIZES["tiny"])


def blip2(kind: str, text: bool, vision: bool) -> dict:
    """Options of BLIP-2 in one of its layouts."""
    return dict(
        kind=kind,
        text=text,
        adapter=not text,
        vision=SEEN if vision else None,
        interface=STAGE1 if text else QUERIES,
    )


CASES = {
    "chatglm": ("chatglm", LLM),
    "eva_vit": ("eva_vit", SEEN),
    "blip2 stage 1": ("blip2", blip2("lavis", True, False)),
    "blip2 stage 2": ("blip2", blip2("lavis", False, True)),
    "blip2 of Hugging Face": ("blip2", blip2("hf", False, True)),
    "blip2 stage 1 of Hugging Face": ("blip2", blip2("hf", True, False)),
    "bert": ("bert", BERT | dict(prefix="bert.", gamma=True)),
    "bert without prefix": ("bert", BERT | dict(prefix="", gamma=False)),
    "cif_asr": ("cif_asr", None),
    "llama": ("llama", None),
    "siglip": ("siglip", None),
    "llava": ("llava", None),
    "whisper": ("whisper", None),
}
"""{case: (source, options)}; None takes the source's own tiny size."""

LEFT_OUT = {
    "eva_vit": {"norm.weight": (96,), "blocks.4.mlp.fc1.bias": (384,), "head.bias": (7,)},
    "bert": {"bert.pooler.dense.bias": (96,), "cls.predictions.bias": (512,)},
    "llama": {"model.layers.1.self_attn.rotary_emb.inv_freq": (16,)},
    "siglip": {"vision_model.head.probe": (1, 1, 96), "text_model.head.bias": (7,)},
    "llava": {"model.layers.0.mlp.up_proj.weight": (24, 16), "lm_head.weight": (40, 16)},
    "whisper": {"model.decoder.layers.0.fc1.bias": (384,), "proj_out.weight": (40, 96)},
    "cif_asr": {"encoder.conformer_layers.0.conv_module.batch_norm.num_batches_tracked": ()},
}
"""{case: tensors that a published file holds and we drop}."""


@functools.cache
def _made(case: str, dtype) -> tuple[dict[str, np.ndarray], dict]:
    source, options = CASES[case]
    module = run_import.source_named(source)
    plan = module.plan(options or module.options(None, "tiny"))
    generator = np.random.default_rng(0)
    flat = rules.flatten(plan.shapes)
    filled = {row.target for row in plan.table}
    params = {p: draw(generator, x.shape, dtype) for p, x in flat.items() if p in filled}
    tensors = export_tree(plan.table, rules.unflatten(params))
    tensors |= {name: tensors[other] for name, other in plan.tied.items()}
    for name, shape in LEFT_OUT.get(case, {}).items():
        tensors[name] = draw(generator, shape, dtype)
    return tensors, params


def tensors_of(case: str, dtype=np.float16) -> tuple[dict[str, np.ndarray], dict]:
    """(tensors under the published names, leaves of ours they must become) of a case."""
    tensors, leaves = _made(case, dtype)
    return dict(tensors), dict(leaves)


def draw(generator, shape, dtype) -> np.ndarray:
    """Finite numbers of any sign and size."""
    bits = generator.integers(0, 1 << 16, math.prod(shape), np.uint16) & 0xBFFF
    return bits.view(ml_dtypes.bfloat16).astype(np.float32).clip(-9, 9).astype(dtype).reshape(shape)


def write_safetensors(tensors: dict[str, np.ndarray], path: Path) -> Path:
    """Writes one file."""
    headers = {name: header.Header(x.shape, x.dtype) for name, x in tensors.items()}
    run_export.write_file(tensors, headers, path)
    return path


def write_torch(tensors: dict[str, np.ndarray], path: Path, key: str = "") -> Path:
    """Writes one `.bin` or `.pth`."""
    state = {name: to_torch(tensor) for name, tensor in tensors.items()}
    torch.save({key: state} if key else state, path)
    return path


def to_torch(tensor: np.ndarray) -> torch.Tensor:
    """The same bits as a tensor of PyTorch."""
    if tensor.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(tensor.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(tensor))


def write_shards(tensors: dict[str, np.ndarray], folder: Path, end: str, count: int = 3) -> Path:
    """Writes a folder of shards with an index and ChatGLM's config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names, places = list(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.{end}"
        held = {name: tensors[name] for name in names[number::count]}
        write = write_torch if end == "bin" else write_safetensors
        write(held, folder / file)
        places |= dict.fromkeys(held, file)
    (folder / f"model.{end}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder
