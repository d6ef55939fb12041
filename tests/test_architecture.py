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
    "serve",
    "configs",
    "conformance",
    "launch",
)
# Folders at the top of the repository that the package reaches by a link.
LINKED = ("configs", "launch")
# Where going down is not allowed either: networks know no files, and files no networks.
STRANGERS = {"data": ("models", "objectives"), "report": ("models",), "audit": ("models",)}
HOMES = {
    "flax": ("xllm_jax/models/", "xllm_jax/objectives/", "xllm_jax/assembly/"),
    "optax": ("xllm_jax/core/optim.py", "xllm_jax/training/step.py"),
    "orbax": (
        "xllm_jax/core/checkpoint.py",
        "xllm_jax/core/kept_checkpoints.py",
        "xllm_jax/core/streamed_leaf.py",
    ),
    "grain": ("xllm_jax/data/",),
    "tensorflow_datasets": ("xllm_jax/data/",),
    # mBART exists for PyTorch alone; it translates texts while a data set is prepared.
    "transformers": ("xllm_jax/data/text/clip_tokenizer.py", "xllm_jax/prepare/translate.py"),
    "torch": ("xllm_jax/convert/", "xllm_jax/prepare/translate.py"),
    "safetensors": ("xllm_jax/convert/",),
    "ml_collections": ("launch/",),
    "apache_beam": ("xllm_jax/prepare/",),
    "tensorflow": (),
    "wandb": ("xllm_jax/core/log.py",),
    # The server is an extra: nothing below it may need its libraries.
    **dict.fromkeys(
        ("fastapi", "starlette", "uvicorn", "sse_starlette", "prometheus_client", "gradio"),
        ("xllm_jax/serve/",),
    ),
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


def home_of(module: str) -> tuple[str, ...] | str:
    """How the files start that may import a module; '' for all."""
    return "launch/" if module == "absl.flags" else HOMES.get(module.split(".")[0], "")


def test_each_package_has_one_home():
    strays = [
        f"{name} imports {module}"
        for name, tree in TREES.items()
        for module in imported(tree)
        if not name.startswith(home_of(module))
    ]
    assert strays == []


def test_functions_fit_a_screen():
    long = [
        f"{name}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert long == []


def test_files_are_rooms():
    lines = {name: (ROOT / name).read_text().count("\n") for name in TREES}
    assert {name: count for name, count in lines.items() if count > 450} == {}


def test_public_functions_say_what_they_do():
    silent = [
        f"{name}: {node.name} has no docstring"
        for name, tree in TREES.items()
        for node in tree.body
        if name.startswith("xllm_jax/")
        and isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


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
