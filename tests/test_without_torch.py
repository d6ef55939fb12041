"""Converting safetensors, training and generating work where torch is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]

CODE = """
import dataclasses, pathlib, sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "torchaudio"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
sys.path[:0] = ["tests", "."]
folder, shipped = map(pathlib.Path, sys.argv[1:])

from xllm_jax.convert import run_export, run_import

print(run_import.run_import("world", shipped, folder / "base").line())
print(run_export.run_export("world", folder / "base", folder / "out"))

import small_stage
from xllm_jax.configs import networks
from xllm_jax.training import loop

init = {"llm": str(folder / "base")}
stage = small_stage.stage(steps=1, init=init, trainable=("llm/final_norm/.*",))
stage.parts["llm"] = networks.llm("tiny")
loop.fit(stage, str(folder / "run"))

from absl import flags
from xllm_jax.launch import generate

flags.FLAGS(["x", f"--checkpoint={folder / 'run'}", "--prompt=红色的圆在哪里？"])
generate.main([])
from xllm_jax.convert import files
from xllm_jax.core.errors import UserError

try:
    list(files.open_checkpoint("tests/golden/vision/weights/eva_vit_g.pth"))
except UserError as error:
    print(error)
print("torch" in sys.modules)
"""


def test_everything_but_pytorch_files_works_without_torch(tmp_path):
    shipped = ROOT / "xllm_jax/data/synthetic_world/backbones/llm"
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path, shipped], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("world: 63 float16 tensors") and lines[-1] == "False"
    assert "needs PyTorch to be read. pip install -e '.[convert]'" in lines[-2]
    folders = (shipped, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert after.keys() == before.keys()
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)
    assert (tmp_path / "run" / "final" / "about.json").exists()
