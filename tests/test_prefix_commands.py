"""A converted P-Tuning prefix speaks in every command that answers, as PyTorch says it must."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import forked
import pytest
import small_stage

from xllm_jax.convert import import_tree, run_import, sizes
from xllm_jax.convert.sources import chatglm
from xllm_jax.core import checkpoint
from xllm_jax.core.stage import Part
from xllm_jax.data.text import glm_layout, llm_family
from xllm_jax.inference.load_run import load_run
from xllm_jax.models import glm

torch = pytest.importorskip("torch")
from test_glm_prefix import prefix_file, reference_logits, tensors_of  # noqa: E402  needs torch

SIZES = small_stage.GLM | {"alpha": (2 * 28) ** 0.5}
ASKED, TOKENS = "图中有什么？", 6
ROOT = Path(__file__).parents[1]
# In a process of its own, since commands define flags of the same names.
EVALUATE = """
import json, sys
from pathlib import Path
from absl import flags
from xllm_jax.data.example import Example
from xllm_jax.launch import evaluate
flags.FLAGS(["evaluate", "--rows=2"])
answer = evaluate.models(Path(sys.argv[1]))["after"]()
print(json.dumps(answer([Example(str(i), (), sys.argv[2], "红色", "vqa") for i in range(3)])))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run behind a converted prefix, the past that PyTorch makes of it)."""
    folder = tmp_path_factory.mktemp("prefixed")
    llm = glm.ChatGLM(**SIZES)
    (folder / "tuned").mkdir()
    # Far from what is drawn, as the residual stream is strong: answers change.
    past = prefix_file(llm, False, folder / "tuned")
    past = [(40 * key, 40 * value) for key, value in past]
    file = folder / "tuned" / "pytorch_model.bin"
    torch.save({name: 40 * x for name, x in torch.load(file).items()}, file)
    fields = {"length": 5, "depth": llm.depth, "width": llm.width, "heads": llm.heads}
    parts = {
        "llm": Part("glm.ChatGLM", "tiny", dict(SIZES)),
        "llm_prefix": Part("glm_prefix.Prefix", "tiny", fields),
    }
    run_import.run_import("chatglm_prefix", folder / "tuned", folder / "llm_prefix")
    init = {"llm_prefix": str(folder / "llm_prefix")}
    stage = small_stage.stage(parts=parts, init=init, trainable=("llm/.*",))
    tensors = tensors_of(llm)
    params, _ = import_tree(chatglm.rows(llm.depth, llm.heads), tensors, sizes.shapes_of(llm))
    run = folder / "runs" / "stage3"
    about = {"stage": dataclasses.asdict(stage), "base": {}}
    checkpoint.save_base(run / "final", {"llm": params}, about)
    return run, past


def told(run, past) -> str:
    """The greedy answer of PyTorch, one token after another."""
    llm = glm.ChatGLM(**SIZES)
    tensors = {name: torch.from_numpy(x.copy()) for name, x in tensors_of(llm).items()}
    family = llm_family.load(load_run(run).stage.data)
    ids, answer = family.tokenizer.encode(f"问：{ASKED}\n答：", special=True), []
    while len(answer) < TOKENS and not set(answer) & set(family.ends):
        row = glm_layout.sequence([*ids, *answer], family.tokenizer.specials)
        with torch.no_grad():
            answer.append(int(reference_logits(tensors, llm, row, past)[-1].argmax()))
    answer = [token for token in answer if token not in family.ends]
    return family.finish(family.tokenizer.decode(answer))


def command(name: str, *arguments: str, typed: str = "") -> list[str]:
    done = forked.run(
        [sys.executable, str(ROOT / "launch" / name), *arguments, f"--max_tokens={TOKENS}"],
        capture_output=True,
        input=typed.encode(),
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


def evaluated(runs: Path) -> list[str]:
    """What the model of `xllm evaluate` answers to the question, three times, two at a time."""
    done = forked.run(
        [sys.executable, "-c", EVALUATE, str(runs), ASKED],
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_generate_chat_and_evaluate_answer_behind_the_prefix(made):
    run, past = made
    expected = told(run, past)
    assert expected != told(run, [(key[:0], value[:0]) for key, value in past])
    assert command("generate.py", f"--checkpoint={run}", f"--prompt={ASKED}") == [expected]
    said = command("chat.py", f"--checkpoint={run}", typed=f"{ASKED}\n/quit\n")
    assert f"> {expected}" in said
    found = evaluated(run.parent)
    assert found[0] == found[2] and found[0].startswith(expected)
