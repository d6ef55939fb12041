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

# Every folder of the package has a floor of its own, from the ground up; imports go down.
FLOORS = (
    "core",
    "models",
    "objectives",
    "data",
    "assembly",
    "report",
    "audit",
    "inference",
    "convert",
    "evaluation",
    "feature_cache",
    "prepare",
    "training",
    "preflight",
    "configs",
    "launch",
)
# Folders at the top of the repository that the package reaches by a link.
LINKED = ("configs", "launch")
# Where going down is not allowed either: networks know no files, and files no networks.
STRANGERS = {"data": ("models", "objectives"), "report": ("models",), "audit": ("models",)}
HOMES = {
    "flax": ("xllm_jax/models/", "xllm_jax/objectives/", "xllm_jax/assembly/"),
    "optax": ("xllm_jax/core/optim.py", "xllm_jax/training/step.py"),
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


def folder(module: str) -> str | None:
    """The folder of xllm_jax that a module lies in; None for others."""
    first, *rest = module.split(".")
    return rest[0] if first == "xllm_jax" and rest else None


def neighbors(trees: dict[str, ast.AST]) -> dict[str, dict[str, str]]:
    """{folder: {folder it imports: one file that does}}."""
    found: dict[str, dict[str, str]] = {}
    for name, tree in trees.items():
        module = name.removesuffix(".py").replace("/", ".")
        own = folder(f"xllm_jax.{module}" if module.startswith(LINKED) else module)
        for target in imported(tree) if own else ():
            other = folder(target)
            if other and other != own:
                found.setdefault(own, {})[other] = name
    return found


def climbing(edges: dict[str, dict[str, str]]) -> list[str]:
    """Imports between folders that do not go down, or meet a stranger."""
    order = {name: floor for floor, name in enumerate(FLOORS)}
    return [
        f"{file} imports {other}"
        for own, others in edges.items()
        for other, file in others.items()
        if order[other] >= order[own] or other in STRANGERS.get(own, ())
    ]


def circle(edges: dict[str, dict[str, str]]) -> list[str]:
    """Folders that reach themselves over others."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            fresh = set(edges.get(todo.pop(), ())) - seen
            seen |= fresh
            todo += fresh
        return seen

    return [name for name in edges if name in reached(name)]


def test_every_folder_has_a_floor():
    folders = {p.parent.name for p in (ROOT / "xllm_jax").glob("*/__init__.py")}
    assert folders == set(FLOORS)
    assert [p.name for p in (ROOT / "xllm_jax").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_folder_is_one_folder(name):
    """Imports, editors and the wheel follow the link: there is one file and one module of each."""
    assert (ROOT / "xllm_jax" / name).resolve() == (ROOT / name).resolve()
    for file in (*(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *FILES):
        names = imported(ast.parse(file.read_text()))
        assert not [n for n in names if n.split(".")[0] in LINKED], file


def test_imports_between_folders_go_down():
    assert climbing(neighbors(TREES)) == []


def test_no_folder_reaches_itself():
    assert circle(neighbors(TREES)) == []


def test_a_mutual_import_is_seen():
    """The feature cache and the preparation of data once imported each other unseen."""
    trees = {
        "xllm_jax/prepare/plan.py": ast.parse("from xllm_jax.feature_cache import write"),
        "xllm_jax/feature_cache/write.py": ast.parse("def f():\n    import xllm_jax.prepare.plan"),
    }
    edges = neighbors(trees)
    assert climbing(edges) == ["xllm_jax/feature_cache/write.py imports prepare"]
    assert circle(edges) == ["prepare", "feature_cache"]


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
        "import xllm_jax.training.loop, xllm_jax.inference.decoding\n"
        "import xllm_jax.evaluation.measure, xllm_jax.convert.files\n"
        "import xllm_jax.prepare.engine, xllm_jax.prepare.translate, xllm_jax.prepare.transforms\n"
        "print([m for m in ('torch', 'tensorflow', 'apache_beam') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
