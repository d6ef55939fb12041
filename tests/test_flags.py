"""Flags: whatever is given to a command is taken, or refused in one line; nothing hangs."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import io
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from xllm_jax import configs, launch
from xllm_jax.configs import stage2_image
from xllm_jax.core import limits
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import NONE, Part, Stage
from xllm_jax.launch import cli, commands

# ml_collections reads configurations by a function of importlib that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
COMMANDS = "xllm_jax.launch"
ROOT = Path(__file__).parents[1]
CONFIG = "--config=stage2_image:tiny"
NEEDED = {  # flags without which a command with a stage refuses to start
    "train": ["--workdir=w"],
    "preflight": ["--topology=v5e:1x1"],
    "cache": ["--output=o"],
    "inspect_data": [],
}
VALUES = (
    *("", " ", "0", "-1", "-0.0", "1.5", "1e400", "nan", "inf", "-inf", "1_0", "0x10", "True"),
    *("9" * 20, "9" * 5000, "-" + "9" * 400, "None", "null", "{}", "[]", "()", "(1,2)", "(1,"),
    *("('a',1)", "{'a': nan}", "{1: 2}", "[[", "(?P<", "*", "a" * 3000, "(" * 400, "-" * 50),
    *(
        "'",
        '"',
        "\x00",
        "\u2028",
        "圖🙂",
        "\udcff",
        "a\nb",
        "--config",
        "=",
        "../..",
        "$HOME",
        "x,y",
    ),
    *("__import__('os')", "lambda: 0", "b'x'", "1j", "...", "{**{}}", "[0]*10**9", "9**9**9"),
)


def run(argv: list[str]) -> tuple[int, str]:
    """(exit code, 0 = taken; what was said) of a command's flags."""
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    for name in [name for name in flags.FLAGS if "." in name]:  # of an earlier configuration
        delattr(flags.FLAGS, name)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), fresh_stages():
            cli.parse(["command", *argv])
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    return 0, said.getvalue()


@contextlib.contextmanager
def fresh_stages():
    """Stages as a new process reads them; overrides set their fields in place."""
    modules = [name for name in sys.modules if name.startswith(f"{configs.__name__}.")]
    before = {name: put_away(configs, name) for name in modules}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith(f"{configs.__name__}.")]:
            put_away(configs, name)
        put_back(configs, before)


def put_away(package, name: str):
    """A module of a package, which forgets it; one of a folder in it goes with the folder."""
    folder, _, own = name.rpartition(".")
    if folder == package.__name__:
        delattr(package, own)
    return sys.modules.pop(name)


def put_back(package, modules) -> None:
    sys.modules.update(modules)
    for name, module in modules.items():
        folder, _, own = name.rpartition(".")
        if folder == package.__name__:
            setattr(package, own, module)


@contextlib.contextmanager
def command(name: str):
    """The flags of one command alone, whatever other tests have imported."""
    modules, known = taken_off()
    importlib.import_module(f"{COMMANDS}.{name}")
    try:
        yield sorted(flag.name for group in defined().values() for flag in group)
    finally:
        taken_off()
        put_back(launch, modules)
        for module, group in known.items():
            for flag in group:
                flags.FLAGS[flag.name] = flag
                flags.FLAGS.register_flag_by_module(module, flag)


def defined() -> dict[str, list[flags.Flag]]:
    """{module of launch/: its flags}."""
    known = flags.FLAGS.flags_by_module_dict().items()
    others = (COMMANDS, cli.__name__)
    return {m: list(group) for m, group in known if m.startswith(COMMANDS) and m not in others}


def taken_off() -> tuple[dict, dict]:
    """Modules that define flags, and these flags; neither is there any more."""
    known = defined()
    for flag in {flag.name for group in known.values() for flag in group}:
        delattr(flags.FLAGS, flag)
    return {name: put_away(launch, name) for name in known if name in sys.modules}, known


def paths(holder, path: str) -> list[str]:
    """Every field below a stage, dictionaries' names too."""
    found = [path]
    if isinstance(holder, dict):
        return found + [p for name, inner in holder.items() for p in paths(inner, f"{path}.{name}")]
    if dataclasses.is_dataclass(holder):
        names = (field.name for field in dataclasses.fields(holder))
        return found + [p for n in names for p in paths(getattr(holder, n), f"{path}.{n}")]
    return found


def mangled(path: str, rng: random.Random) -> str:
    """A name, most often a good one."""
    wrong = (".", "..x", ".0", ".\u2028", "[0]", ".__class__", ".steps", "=", "'", " ")
    return path + (rng.choice(wrong) if rng.random() < 0.15 else "")


def is_sane(value) -> bool:
    """Whether what a stage holds can be counted with."""
    if isinstance(value, dict):
        return all(isinstance(n, str) and n and is_sane(inner) for n, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_sane, value))
    if dataclasses.is_dataclass(value):
        return all(is_sane(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, int):
        return abs(value) < 2**31
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("name", NEEDED)
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(name):
    rng = random.Random(name)
    stage = stage2_image.get_config("tiny")
    known = [path for path in paths(stage, "config") if ".options" not in path]
    codes, wrong = [], []
    with command(name):
        for _ in range(120):
            given = f"--{mangled(rng.choice(known), rng)}={rng.choice(VALUES)}"
            code, said = run([CONFIG, given, *NEEDED[name]])
            one_line = code == 2 and said.count("\n") == 1 and len(said) < 1500
            taken = code == 0 and not said and is_sane(plain(flags.FLAGS["config"].value))
            wrong += [] if one_line or taken else [(given[:80], code, said[:200])]
            codes.append(code)
    assert wrong == []
    assert codes.count(2) > 60 and codes.count(0) > 3


def plain(stage: Stage) -> Stage:
    """Without what a network, a reader or an objective makes of its options."""
    parts = {n: dataclasses.replace(part, fields={}) for n, part in stage.parts.items()}
    data = dataclasses.replace(stage.data, image={}, video={}, speech={})
    return dataclasses.replace(stage, parts=parts, options={}, data=data, compiler={})


OTHERS = sorted(set(commands.COMMANDS.values()) - set(NEEDED))


@pytest.mark.parametrize("name", OTHERS)
def test_any_value_of_any_flag_is_taken_or_refused_in_one_line(name):
    rng, wrong = random.Random(name), []
    with command(name) as own:
        for _ in range(60):
            given = f"--{mangled(rng.choice(own), rng)}={rng.choice(VALUES)}"
            code, said = run([given])
            if code != 0 and not (code == 2 and said.count("\n") == 1):
                wrong.append((given[:80], code, said[:200]))
    assert wrong == []


NUMBERS = [
    *(("generate", "temperature=nan"), ("generate", "top_p=nan"), ("generate", "guidance=nan")),
    *(("generate", "seed=99999999999999999999"), ("generate", "max_tokens=2000000")),
    *(("generate", "beams=2000"), ("generate", "steps=0"), ("generate", "guidance=inf")),
    *(("chat", "rounds=99999999999999999999"), ("chat", "steps=1001"), ("chat", "max_tokens=1")),
    *(("prepare", "deadline=nan"), ("prepare", "memory=inf"), ("prepare", "workers=1000000")),
    *(("cache", "most_gib=nan"), ("cache", "batch=99999999999999999999")),
    *(("build_data", "timeout=nan"), ("build_data", "threshold=inf"), ("build_data", "seed=-1")),
    *(("evaluate", "limit=99999999999999999999"), ("evaluate", "rows=0")),
    *(("demo", "slots=-1"), ("world", "images=99999999999999999999"), ("preflight", "records=-1")),
]


@pytest.mark.parametrize("name, given", NUMBERS)
def test_a_number_of_a_flag_is_one_and_within_its_range(name, given):
    with command(name) as own:
        needed = ["--checkpoint=run"] if "checkpoint" in own else []
        code, said = run([f"--{given}", *needed])
    assert (code, said.count("\n")) == (2, 1), said
    assert given.partition("=")[0] in said and given.partition("=")[2][:20] in said


def test_a_long_line_is_cut(capsys):
    with pytest.raises(SystemExit):
        cli.fail("a word " * 10_000)
    assert len(capsys.readouterr().err) < 2010


NAMED = {
    "keep.=3": "keep",
    "data.rows.0=0": "data.rows.0",
    "trainable=(1,2)": "trainable",
    "trainable=('(',)": "no regular expression",
    "offload=(3.5,)": "offload",
    "compute={}": "compute",
    "frozen=float8": "frozen",
    "data.rows=99999999999999999999": "data.rows",
    "data.rows=0": "data.rows",
    "data.deadline=-1": "data.deadline",
    "data.memory=nan": "data.memory",
    "stall=inf": "stall",
    "stall=-1": "stall",
    "data.mix.captions=-1": "data.mix.captions",
    "data.mix.captions=nan": "data.mix.captions",
    "optimizer.accumulation=100000000000000000000": "optimizer.accumulation",
    "optimizer.accumulation=0": "optimizer.accumulation",
    "optimizer.averaging=words": "Choices: 'tokens', 'micro_batches'",
    "optimizer.schedule=cosin": "Did you mean 'cosine'?",
    "optimizer.peak=-1e-4": "optimizer.peak",
    "optimizer.b2=1.5": "optimizer.b2",
    "data.max_bad_share=2": "data.max_bad_share",
    "data.threads=0": "data.threads",
    "log_every=0": "log_every",
    "keep=0": "keep",
    "steps=-5": "steps",
    "seed=-1": "seed",
    "profile=(12,10)": "no range of micro-batches",
    "mesh.fsdp=-2": "mesh.fsdp",
    "remat=some": "remat",
    "divergence.spike=warn": "divergence.spike",
    "validation.every=-1": "validation.every",
    "data.frames=(200,100)": "ascending",
    "data.items.image=-1": "data.items.image",
    "init.=x": "a name is ''",
}


@pytest.fixture(scope="module")
def train():
    with command("train"):
        yield


@pytest.mark.parametrize("given", NAMED)
def test_a_value_out_of_its_range_is_refused_by_the_field(given, train):
    code, said = run([CONFIG, f"--config.{given}", "--workdir=w"])
    assert (code, said.count("\n")) == (2, 1), said
    assert NAMED[given] in said


def test_packaged_stages_are_within_their_limits():
    for name in cli.packaged_stages():
        module = importlib.import_module(f"xllm_jax.configs.{name}")
        for size in ("real", "tiny") if name.startswith("stage") else ("",):
            limits.check(module.get_config(*filter(None, [size])))
    with pytest.raises(UserError, match=r"steps: cannot be True"):
        limits.check(dataclasses.replace(Stage(), steps=True))


def test_a_mistake_is_found_before_jax_is_imported():
    """Where it cannot be imported at all."""
    code = (
        "import runpy, sys; sys.modules['jax'] = None; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for name in NEEDED:
        command_line = [f"launch/{name}.py", CONFIG, "--config.stall=inf", *NEEDED[name]]
        done = subprocess.run(
            [sys.executable, "-c", code, *command_line], capture_output=True, text=True, cwd=ROOT
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith("stall: cannot be inf")


ENTRIES = [
    f"data.image.size={value}" for value in ("0", "-5", "1000000000", "2.5", "nan", "True", "x")
]
ENTRIES += ["data.image.scale=(0,1)", "data.image.scale=(0.9,0.5)", "data.image.scale=(1,2,3)"]
ENTRIES += ["data.image.flip=3", "data.image.orientation=up"]


@pytest.mark.parametrize("given", ENTRIES)
def test_an_entry_out_of_its_range_is_refused_by_its_name(given, train):
    code, said = run([CONFIG, f"--config.{given}", "--workdir=w"])
    assert (code, said.count("\n")) == (2, 1), said
    assert given.partition("=")[0] in said


@pytest.mark.parametrize(
    "path, value",
    [("video.frames", 0), ("video.sampling", "any"), ("video.size", 10**9), ("image.patch", 0)]
    + [("speech.bins", 0), ("speech.bins", 10**6), ("speech.specaugment", "yes")],
)
def test_entries_of_every_medium_have_limits(path, value):
    stage = Stage()
    medium, _, name = path.partition(".")
    getattr(stage.data, medium)[name] = value
    with pytest.raises(UserError, match=rf"data\.{medium}\.{name}"):
        limits.check(stage)


@pytest.mark.parametrize("value", [-5, 10**12, float("nan"), (4, -2)])
def test_numbers_of_a_network_have_limits(value):
    stage = dataclasses.replace(Stage(), parts={"vit": Part("vit.Vit", fields={"width": value})})
    with pytest.raises(UserError, match=r"parts\.vit\.fields\.width"):
        limits.check(stage)


@pytest.mark.parametrize("value", [0, -1, 1.5, "wide", True, (4, 0), 10**12])
@pytest.mark.parametrize("name", ["width", "heads", "depth", "channels", "llm_width", "queries"])
def test_a_size_is_one_at_least(name, value):
    stage = dataclasses.replace(Stage(), parts={"vit": Part("vit.Vit", fields={name: value})})
    with pytest.raises(UserError, match=rf"^parts\.vit\.fields\.{name}: cannot be .*Give "):
        limits.check(stage)


def of_networks() -> dict[str, list[str]]:
    """{field that holds integers: networks that have it}."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "xllm_jax/models").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            network = isinstance(node, ast.ClassDef) and node.bases and not node.decorator_list
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign)] if network else ()
            for field in fields:
                if re.search(r"\bint\b", ast.unparse(field.annotation)):
                    found.setdefault(ast.unparse(field.target), []).append(node.name)
    return found


# Of inner modules, which no stage names, or pairs and names that the code makes.
INNER = {"cells", "end", "inputs", "padding", "registry", "scanned", "size", "split", "tensor_axis"}
INNER |= {"number"}


def test_every_integer_of_a_network_has_its_least_value():
    known = dataclasses.fields(Part)[2].metadata["known"]
    named = of_networks()
    assert len(named) > 30
    assert set(named) - INNER == {name for name in known if known[name].kind is int}
    zero = {name for name in known if known[name].least <= 0 and known[name].kind is int}
    assert zero == {*NONE.split(), "llm_layers"}
    for name in zero:
        part = Part("vit.Vit", fields={name: int(known[name].least)})
        limits.check(dataclasses.replace(Stage(), parts={"vit": part}))


STAGES = {
    "words.py": b"root:x:0:0:root:/root:/bin/bash\n",
    "binary.py": bytes(range(256)),
    "nothing.py": b"",
    "value.py": b"get_config = 3\n",
    "raises.py": b"def get_config():\n    return 1 / 0\n",
    "raises_at_once.py": b"raise RuntimeError('two\\nlines')\n",
    "leaves.py": b"import sys\nsys.exit(0)\n",
    "no_stage.py": b"def get_config():\n    return {}\n",
    "other_call.py": b"def get_config(a, b):\n    return {}\n",
    "imports.py": b"import no_such_module_anywhere\n",
    "deep.py": b"x = " + b"(" * 5000,
    "large.py": b"#" * (2 << 20),
}


@pytest.mark.parametrize(
    "name", [*STAGES, "folder", "/etc/passwd", "/dev/null", "a" * 300, "b/" * 300]
)
def test_what_is_no_stage_file_is_refused_in_one_line(name, train, tmp_path):
    (tmp_path / "folder").mkdir()
    for file, content in STAGES.items():
        (tmp_path / file).write_bytes(content)
    code, said = run([f"--config={tmp_path / name}", "--workdir=w"])
    assert (code, said.count("\n")) == (2, 1), said
    assert "--config" in said


UNUSED = [
    ("preflight", "--steps=5", "--steps: has no effect without --draw"),
    ("preflight", "--draw --write=x", "--write: has no effect with --draw"),
    ("preflight", "--draw --records=3", "--records: has no effect with --draw"),
    ("preflight", "--again", "--again: has no effect without --write"),
    ("evaluate", "--seed=1", "--seed: has no effect without --draw"),
    ("evaluate", "--size=64", "--size: has no effect without --draw"),
    ("evaluate", "--outputs=x", "--outputs: has no effect here"),
    ("chat", "--checkpoint=x --seed=1", "--seed: has no effect without --draw"),
    ("chat", "--checkpoint=x --steps=1", "--steps: has no effect without --draw"),
    ("generate", "--checkpoint=x --prompt=a --guidance=2", "--guidance: has no effect without"),
    ("generate", "--checkpoint=x --prompt=a --beams=2", "--beams: has no effect with --decode=gr"),
]


@pytest.mark.parametrize(("name", "given", "message"), UNUSED)
def test_a_flag_that_changes_nothing_is_refused(name, given, message):
    """What is typed and does nothing would be taken for done."""
    with command(name):
        launched = sys.modules[f"{COMMANDS}.{name}"]
        code, told = run(given.split())
        assert code == 0, told
        with pytest.raises(UserError) as error:
            launched.main([])
        assert str(error.value).startswith(message)
