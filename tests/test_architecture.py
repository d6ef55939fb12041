"""The house: imports go down the floors, each package has one home, functions fit a screen."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for d in ("xllm_jax", "configs", "launch") for p in (ROOT / d).rglob("*.py"))
TREES = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in FILES}

# Longest matching prefix wins.
FLOORS = {
    "launch": 4,
    "configs": 4,
    "xllm_jax": 3,
    "xllm_jax.convert": 3,
    "xllm_jax.objectives": 2,
    "xllm_jax.models.xllm": 2,
    "xllm_jax.models": 1,
    "xllm_jax.data": 1,
    "xllm_jax.core": 0,
}
HOMES = {
    "flax": ("xllm_jax/models/", "xllm_jax/objectives/", "xllm_jax/assembly/"),
    "optax": ("xllm_jax/core/optim.py", "xllm_jax/train.py"),
    "orbax": ("xllm_jax/core/checkpoint.py", "xllm_jax/core/streamed_leaf.py"),
    "grain": ("xllm_jax/data/",),
    "tensorflow_datasets": ("xllm_jax/data/",),
    # mBART exists for PyTorch alone; it translates texts while a data set is prepared.
    "transformers": ("xllm_jax/data/text/chatglm_tokenizer.py", "xllm_jax/prepare/translate.py"),
    "torch": ("xllm_jax/convert/", "xllm_jax/prepare/translate.py"),
    "safetensors": ("xllm_jax/convert/",),
    "ml_collections": ("launch/",),
    "apache_beam": ("xllm_jax/prepare/",),
    "tensorflow": (),
    "wandb": ("xllm_jax/core/log.py",),
}


def imported(tree: ast.AST) -> list[str]:
    """Every module that a file imports, wherever the import stands."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def floor(module: str) -> int | None:
    """Floor of a module of ours, None for other packages."""
    fits = [p for p in FLOORS if module == p or module.startswith(p + ".")]
    return FLOORS[max(fits, key=len)] if fits else None


@pytest.mark.parametrize("name", TREES)
def test_imports_go_down(name):
    own = name.removesuffix(".py").replace("/", ".")
    for module in imported(TREES[name]):
        if floor(module) is not None:
            assert floor(module) <= floor(own), f"{name} imports {module}"
        for one, other in (("models", "data"), ("data", "models")):
            if own.startswith(f"xllm_jax.{one}."):
                assert not module.startswith(f"xllm_jax.{other}"), f"{name} imports {module}"


@pytest.mark.parametrize("name", TREES)
def test_each_package_has_one_home(name):
    for module in imported(TREES[name]):
        homes = HOMES.get(module.split(".")[0])
        assert homes is None or name.startswith(homes), f"{name} imports {module}"
        if module == "absl.flags":
            assert name.startswith("launch/"), f"{name} defines flags"


@pytest.mark.parametrize("name", TREES)
def test_functions_fit_a_screen_and_files_a_room(name):
    nodes = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef)]
    long = [(n.name, n.end_lineno - n.lineno + 1) for n in nodes]
    assert [entry for entry in long if entry[1] > 60] == []
    assert (ROOT / name).read_text().count("\n") <= 450


@pytest.mark.parametrize("name", [n for n in TREES if n.startswith("xllm_jax/")])
def test_public_functions_say_what_they_do(name):
    for node in TREES[name].body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public:
            assert ast.get_docstring(node), f"{name}: {node.name} has no docstring"


def test_the_library_never_imports_torch_or_tensorflow():
    code = (
        "import sys\n"
        "import xllm_jax.loop, xllm_jax.inference.decoding\n"
        "import xllm_jax.evaluation.measure, xllm_jax.convert.files\n"
        "import xllm_jax.prepare.engine, xllm_jax.prepare.translate, xllm_jax.prepare.transforms\n"
        "print([m for m in ('torch', 'tensorflow', 'apache_beam') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
