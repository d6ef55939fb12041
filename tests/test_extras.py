"""The installed extras beside each other: every command's first step, and what they disagree about.

`make test` installs `convert` and `prepare`; `preflight` and `wandb` take part where they are.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import tomllib
from pathlib import Path

import forked
import pytest
import sentencepiece
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from xllm_jax.data.text.chatglm_tokenizer import train_tokenizer
from xllm_jax.launch import commands

ROOT = Path(__file__).parents[1]
# What the extras bring, as it is imported.
PACKAGES = ("torch", "apache_beam", "libtpu", "wandb", "gradio")
# In this order: some read what others wrote. With what a step says on standard output or error.
STEPS = {
    "world": ("--output=world --images=4", "World in world"),
    "build-backbones": ("--output=bases --learn_tokenizer", "Tokenizer: bases/llm"),
    "train": (
        "--config=world_llm:tiny --workdir=run --config.steps=1 --config.data.tokenizer=bases/llm",
        "Trained parts: run/final",
    ),
    "convert": ("--source=chatglm --input=chatglm --output=base", "written to base"),
    "ablation": ("--output=none", "holds no finished run"),
    "conformance": ("clip_vision --checks=shapes", "shapes  passed"),
    "quantize": ("--input=base --output=packed --weights=int8", "packed"),
    "adapter": ("--help", "PEFT's folder, or a file of weights"),
    "prepare": ("--source=coco --input=world/coco --output=prepared", "12 records in 1 shards"),
    "build-data": ("--recipe=questions --input=english --output=texts", "texts: 3"),
    "inspect": (
        "--config=world_llm:tiny --samples=1 --config.data.tokenizer=bases/llm",
        "With samples: ",
    ),
    "preflight": (
        "--config=world_llm:tiny --topology=h200:1 --nosearch --records=0"
        " --config.data.tokenizer=bases/llm",
        "Written: preflight",
    ),
    "generate": ("--checkpoint=run --prompt=红 --max_tokens=2", ""),
    "chat": ("--checkpoint=run --max_tokens=2", "> "),
    "serve": ("--help", "Folder of a finished run"),
    "demo": ("--help", "Folder in which the world, the runs"),
    # These need more than a first step can make, and say so once everything is imported.
    "cache": ("--config=stage2_image:tiny --output=cache --config.data.root=none", "no such file"),
    "evaluate": ("--runs=none --data=world", "has no videos"),
    "replay": ("--file=none.npz", "no such file"),
}
NEEDS_BEAM = ("prepare",)
WITHOUT_BEAM = "Apache Beam is not installed. pip install -e '.[prepare]'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the steps run one after another, as forks of a process that imported the extras."""
    made = tmp_path_factory.mktemp("steps")
    (made / "chatglm").symlink_to(ROOT / "tests/golden/chatglm/weights")
    talk = {"image_id": 7, "caption": "a circle", "dialog": [{"question": 0, "answer": 0}]}
    data = {"questions": ["what color"], "answers": ["red"], "dialogs": [talk]}
    (made / "english/images").mkdir(parents=True)
    (made / "english/visdial_1.0_train.json").write_text(json.dumps({"data": data}))
    picture = made / "english/images/COCO_train2014_000000000007.jpg"
    Image.new("RGB", (8, 8)).save(picture)
    with forked.imported(*(name for name in PACKAGES if importlib.util.find_spec(name))):
        yield made


def test_every_command_has_a_first_step():
    assert STEPS.keys() == commands.COMMANDS.keys()


@pytest.mark.parametrize("command", STEPS)
def test_the_first_step_with_all_extras_imported(command, folder):
    arguments, wanted = STEPS[command]
    if command in NEEDS_BEAM and not importlib.util.find_spec("apache_beam"):
        wanted = WITHOUT_BEAM
    module = f"xllm_jax.launch.{commands.COMMANDS[command]}"
    given = [sys.executable, "-m", module, *arguments.split()]
    done = forked.run(given, capture_output=True, text=True, cwd=folder, input="红\n")
    told = done.stdout + done.stderr
    refused = wanted in ("no such file", "has no videos", "holds no finished run", WITHOUT_BEAM)
    assert done.returncode == (2 if refused else 0) and wanted in told, told[-3000:]
    assert "Traceback" not in told


def test_a_tokenizer_is_trained_whatever_protobuf_another_extra_wants(tmp_path, monkeypatch):
    """What sentencepiece ships for that demands protobuf 7, and Apache Beam an older one."""
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    train_tokenizer(["红色的圆在左边", "a cat of 42"] * 3, tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "ice_text.model"))
    pieces = [model.id_to_piece(number) for number in range(len(model))]
    assert pieces[:5] == ["<unk>", "<s>", "</s>", "<pad>", "<n>"]
    assert pieces[-256:] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert len(set(pieces)) == len(pieces) and {"红", "色", "a"} <= set(pieces)


def test_installed_packages_agree():
    """Every requirement of ours and of what the extras bring is met by what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    asked = [line.partition("#")[0] for line in lines if line.partition("#")[0].strip()]
    todo = [(Requirement(line), "requirements.txt") for line in asked]
    extras = project["optional-dependencies"]
    for extra in extras.keys() - {"test"}:
        known = [(Requirement(line), extra) for line in extras[extra]]
        todo += [one for one in known if version(one[0].name)]
    seen, wrong = set(), []
    while todo:
        one, by = todo.pop()
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        if one.name == "setuptools":  # builds packages; none of ours imports it
            continue
        has = version(one.name)
        if has is None or not one.specifier.contains(has, prereleases=True):
            wrong.append(f"{by} wants {one}, found {has}")
        if has and canonicalize_name(one.name) not in seen:
            seen.add(canonicalize_name(one.name))
            todo += [
                (Requirement(line), one.name)
                for line in importlib.metadata.requires(one.name) or ()
            ]
    assert wrong == []


def version(name: str) -> str | None:
    """The installed version of a package, if there is one."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
