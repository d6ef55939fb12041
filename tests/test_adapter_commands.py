"""The commands of adapters and packed bases: what they print, exit codes, and flags of train."""

from __future__ import annotations

import json
import sys

import forked
import numpy as np
import pytest
import small_stage
from safetensors.numpy import save_file
from test_convert_chatglm import tensors_of, write_folder

from xllm_jax.convert import run_import
from xllm_jax.core import checkpoint
from xllm_jax.core.errors import UserError
from xllm_jax.models import glm

START = "base_model.model.transformer.layers"


def run(name, *arguments):
    done = forked.run(
        [sys.executable, str(small_stage.ROOT / "launch" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=small_stage.ROOT,
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published ChatGLM and an adapter of its queries, keys and values, with the rank 0."""
    folder = tmp_path_factory.mktemp("commands")
    model = glm.ChatGLM(**small_stage.GLM)
    write_folder(folder / "published", model, tensors_of(model, np.float32), "safetensors")
    (folder / "adapter").mkdir()
    width, tensors = small_stage.GLM["width"], {}
    for layer in range(small_stage.GLM["depth"]):
        start = f"{START}.{layer}.attention.query_key_value"
        tensors[f"{start}.lora_A.weight"] = np.ones((2, width), np.float32)
        tensors[f"{start}.lora_B.weight"] = np.ones((3 * width, 2), np.float32)
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 0, "lora_alpha": 4}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    return folder


def test_in_packed_and_merged(folder):
    """Published files to a packed base with an adapter, which is merged at last."""
    base, adapter = folder / "base", folder / "adapter"
    assert (
        run("convert", "--source=chatglm", f"--input={folder}/published", f"--output={base}")[0]
        == 0
    )
    code, said, _ = run("quantize", f"--input={base}", f"--output={folder}/int8", "--weights=int8")
    assert code == 0 and "MB became" in said
    code, _, told = run(
        "convert", "--source=chatglm", f"--input={folder}/published", f"--output={base}"
    )
    assert code == 2 and "is there already. Choose another --output, or remove it first" in told
    arguments = (f"--input={adapter}", f"--base={folder}/int8", f"--output={folder}/ours")
    code, _, told = run("adapter", "--action=import", *arguments)
    assert code == 2 and told.endswith("adapter_config.json: r is 0. Give 1 or more")
    assert len(told.splitlines()) == 1 and not (folder / "ours").exists()
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 0', '"r": 2'))
    code, said, _ = run("adapter", "--action=import", *arguments)
    assert code == 0 and said.startswith("2 adapters of rank 2")
    arguments = (f"--input={folder}/ours", f"--base={folder}/int8", f"--output={folder}/merged")
    assert run("adapter", "--action=merge", *arguments)[0] == 0
    made = {
        name: np.float32(checkpoint.open_leaves(folder / name)[path].read().result())
        for name in ("base", "merged")
        if (path := "llm/layers/attention/qkv/kernel")
    }
    apart = made["merged"] - made["base"]
    np.testing.assert_allclose(apart, 4.0, atol=0.05)  # 4 / 2 times a sum of 2 ones, but for codes


def test_flags_of_train_say_what_they_cannot_find(tmp_path):
    config = "--config=stage2_image:tiny"
    targets = "--config.lora.targets=llm/layers/atention/.*"
    code, _, told = run("train", config, f"--workdir={tmp_path}", "--config.lora.rank=16", targets)
    assert code == 2 and len(told.splitlines()) == 1
    assert told.startswith("lora.targets: pattern 'llm/layers/atention/.*' matches no kernel")


@pytest.mark.parametrize("command", ["adapter", "adapter --action=import", "quantize", "convert"])
def test_a_required_flag_is_asked_for_in_one_line(command):
    name, *more = command.split()
    given = ["--input=somewhere", "--output=elsewhere"] if more else []
    code, _, told = run(name, *more, *given)
    assert code == 2 and "this flag is required. " in told and told.count("\n") == 0


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--action=export --alpha=3", "--alpha: has no effect with --action=export. Leave it out"),
        ("--action=merge --alpha=3", "--alpha: has no effect with --action=merge"),
        ("--action=import --base=b --name=x", "--name: has no effect with --action=import"),
    ],
)
def test_a_flag_of_another_action_is_refused(flags, told):
    code, _, said = run("adapter", *flags.split(), "--input=somewhere", "--output=elsewhere")
    assert code == 2 and told in said and said.count("\n") == 0


def test_nothing_that_is_read_is_written_over(tmp_path):
    for read in ("base", "runs/lora"):
        (tmp_path / read / "final").mkdir(parents=True)
        (tmp_path / read / "final" / "about.json").write_text("{}")
    base, run_folder = tmp_path / "base", tmp_path / "runs" / "lora"
    for output in (base, run_folder, run_folder / "final", tmp_path / "runs"):
        with pytest.raises(UserError, match=r"is the input|holds, or is a part of"):
            run_import.check_output(output, run_folder, base)
    run_import.check_output(run_folder / "merged", run_folder, base)
