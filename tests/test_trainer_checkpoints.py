"""What trainers write around a network's weights: settings, wrappers, other files of the folder."""

from __future__ import annotations

import argparse
import collections
import contextlib
import fractions
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import published
import pytest
import torch

from xllm_jax.convert import export_tree, files, inert, run_import
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError

CASE = "bert"


@pytest.fixture(scope="module")
def weights():
    """(PyTorch's state dict, leaves of ours that it must become)."""
    tensors, leaves = published.tensors_of(CASE)
    return {name: published.to_torch(tensor) for name, tensor in tensors.items()}, leaves


def check(path, leaves, source=CASE):
    """Examines a checkpoint, compares every leaf bit by bit, and returns what was found."""
    found = run_import.examine(source, path)
    flat = rules.flatten(found.tree())
    assert flat.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert np.asarray(flat[name]).tobytes() == np.asarray(leaf).tobytes(), name
    return found


class Ran(Exception):
    """Code of a checkpoint was run."""


@contextlib.contextmanager
def module_of(name: str, *classes: type):
    """Classes that can be pickled under a module that is not there when the file is read."""
    made = {cls.__name__: cls for cls in classes}
    parts = name.split(".")
    names = [".".join(parts[: n + 1]) for n in range(len(parts))]
    before = {one: sys.modules.get(one) for one in names}
    for one in names:
        sys.modules[one] = types.ModuleType(one)
    for cls_name, cls in made.items():
        cls.__module__ = name
        setattr(sys.modules[name], cls_name, cls)
    try:
        yield
    finally:
        for one, module in before.items():
            sys.modules.pop(one)
            if module is not None:
                sys.modules[one] = module


class DictConfig:
    def __init__(self, content):
        self._content = content

    def __getstate__(self):
        return {"_content": self._content}

    def __setstate__(self, state):
        raise Ran


class AttributeDict(dict):
    def __setitem__(self, key, value):
        if sys.modules.get("pytorch_lightning") is None:
            raise Ran
        super().__setitem__(key, value)


class AverageMeter:
    def __reduce__(self):
        return AverageMeter, ()


@pytest.mark.parametrize("zipped", [True, False])
def test_settings_of_trainers_are_read_and_never_run(weights, zipped, tmp_path):
    state, leaves = weights
    modules = (
        module_of("omegaconf.dictconfig", DictConfig),
        module_of("pytorch_lightning.utilities.parsing", AttributeDict),
        module_of("fairseq.logging.meters", AverageMeter),
    )
    with contextlib.ExitStack() as stack:
        for one in modules:
            stack.enter_context(one)
        hyper = AttributeDict()
        hyper["rate"] = 0.1
        content = {
            "args": None,
            "cfg": {"model": argparse.Namespace(arch="s2t", lr=[3e-4]), "task": DictConfig({})},
            "hyper_parameters": hyper,
            "model": state,
            "extra_state": {"best": np.float64(4.5), "when": collections.defaultdict(list)},
            "meters": [AverageMeter(), Path("x"), np.arange(3)],
        }
        path = tmp_path / "checkpoint_best.pt"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    check(path, leaves)


@pytest.mark.parametrize("kind", [int, str, range])
@pytest.mark.parametrize("zipped", [True, False])
def test_types_that_pickles_call_by_names_of_python_2_are_read(weights, kind, zipped, tmp_path):
    state, leaves = weights
    inside = {"seen": collections.defaultdict(kind), "args": argparse.Namespace(type=kind)}
    path = tmp_path / "x.pt"
    torch.save({**inside, "model": state}, path, _use_new_zipfile_serialization=zipped)
    check(path, leaves)


def test_the_arguments_of_fairseq_are_kept_with_the_tensors(tmp_path):
    settings = argparse.Namespace(encoder_attention_heads=3)
    content = {"cfg": {"model": settings}, "model": {"x": torch.ones(2)}}
    for place in ("cfg", "args"):
        content |= {"cfg": {"model": settings}} if place == "cfg" else {"cfg": None}
        torch.save(content | {"args": settings}, tmp_path / "x.pt")
        opened = files.open_checkpoint(tmp_path / "x.pt")
        assert list(opened) == ["x"] and opened.settings() == {"encoder_attention_heads": 3}


class Runs:
    """Pickles as a call of some function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (print, "code ran"),
        (eval, "print('code ran')"),
        (getattr, 1, "real"),
        (__import__, "os"),
        (sys.exit, 0),
    ],
    ids=["print", "eval", "getattr", "import", "exit"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_no_setting_is_refused(weights, call, zipped, tmp_path, capsys):
    content = {"args": argparse.Namespace(x=Runs(*call)), "model": weights[0]}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"x\.pt: .*carry code"):
        files.open_checkpoint(tmp_path / "x.pt")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.exec",
        "builtins.getattr",
        "copyreg.__newobj__",
        "functools.partial",
        "operator.attrgetter",
        "subprocess.Popen",
        "pathlib.os.system",
        "argparse.Namespace.__init__",
        "typing.sys.exit",
        "numpy.load",
        "torch.load",
        "types.FunctionType",
        "fairseqx.utils.Run",
    ],
)
def test_names_that_get_no_stand_in(name):
    assert inert.stand_ins({name}) == []


def test_a_stand_in_belongs_to_one_reading(tmp_path):
    """What one file may hold is not allowed to every later reader of the process."""
    torch.save({"x": torch.ones(1), "args": argparse.Namespace()}, tmp_path / "x.pt")
    assert list(files.open_checkpoint(tmp_path / "x.pt")) == ["x"]
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=True)


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def inside(state):
    """As FSDP with activation checkpointing names the layers."""
    word = "_fsdp_wrapped_module._checkpoint_wrapped_module."
    return {name.replace("layer.1.", f"layer.1.{word}"): x for name, x in state.items()}


def averaged(state):
    """A Lightning module with a moving average of its network."""
    return under("model.", state) | under("model_ema.", {n: x + 1 for n, x in state.items()})


WRAPPED = {
    "DDP": (lambda s: under("module.", s), {"module."}),
    "Lightning": (lambda s: {"state_dict": under("model.", s), "epoch": 3}, {"model."}),
    "compiled": (lambda s: under("_orig_mod.", s), {"_orig_mod."}),
    "compiled DDP of Lightning": (
        lambda s: {"state_dict": under("model._orig_mod.module.", s)},
        {"_orig_mod.", "module.", "model."},
    ),
    "twice": (lambda s: under("model.network.", s), {"model.", "network."}),
    "twice the same": (lambda s: under("model.model.", s), {"model.model."}),
    "dotted state": (lambda s: under("state.model.", s), {"state.", "model."}),
    "dotted state dict": (
        lambda s: {"state_dict": under("state_dict.model.", s)},
        {"state_dict.", "model."},
    ),
    "four deep": (
        lambda s: under("checkpoint.state_dict.model.model.", s),
        {"checkpoint.", "state_dict.", "model.model."},
    ),
    "FSDP": (inside, {"_fsdp_wrapped_module.", "_checkpoint_wrapped_module."}),
    "DeepSpeed": (lambda s: {"module": under("module.", s), "ds_version": "0"}, {"module."}),
    "wrapped twice": (lambda s: {"state": {"model": s}, "model": {"width": 3}}, set()),
    "average beside it": (lambda s: {"state_dict": averaged(s)}, {"model."}),
    "average alone": (lambda s: {"ema": s, "step": 1}, set()),
    "SWA": (lambda s: under("module.", s) | {"n_averaged": torch.tensor(3)}, {"module."}),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_are_left_out_of_names_and_told(case, weights, tmp_path):
    state, leaves = weights
    wrap, told = WRAPPED[case]
    torch.save(wrap(state), tmp_path / "x.pth")
    found = check(tmp_path / "x.pth", leaves)
    assert found.opened.renamed.keys() == told
    if told - {"_fsdp_wrapped_module.", "_checkpoint_wrapped_module."}:
        assert set(found.opened.renamed.values()) == {len(state)}


def test_the_command_tells_what_it_left_out(weights, tmp_path):
    torch.save(under("module.", weights[0]), tmp_path / "x.pth")
    done = run_import.run_import(CASE, tmp_path / "x.pth", tmp_path / "base")
    assert f"'module.' left out of {len(weights[0])} names" in done.line()
    record = json.loads((tmp_path / "base" / "conversion.json").read_text())
    assert record["renamed"] == {"module.": len(weights[0])}


def test_what_stands_there_twice_is_told_as_it_stands_there(weights, tmp_path):
    torch.save(under("model.model.", weights[0]), tmp_path / "x.pth")
    done = run_import.run_import(CASE, tmp_path / "x.pth", tmp_path / "base")
    assert f"'model.model.' left out of {len(weights[0])} names" in done.line()
    assert done.line().count("left out of") == 1


CONTAINERS = {
    "deque": lambda: collections.deque([1, {"a": [2]}, argparse.Namespace(b=3)], 5),
    "defaultdict": lambda: collections.defaultdict(
        collections.deque, {"a": collections.deque([1])}
    ),
    "OrderedDict": lambda: collections.OrderedDict(a=collections.OrderedDict(b=1)),
    "Counter": lambda: collections.Counter("aab"),
    "ChainMap": lambda: collections.ChainMap({"a": 1}, {"b": 2}),
    "set": lambda: [{1, 2}, frozenset([3]), complex(1, 2), bytearray(b"x")],
    "fraction": lambda: fractions.Fraction(1, 3),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_of_the_standard_library_are_read(kind, zipped, weights, tmp_path):
    content = {"model": weights[0], "seen": CONTAINERS[kind]()}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    check(tmp_path / "x.pt", weights[1])


def test_errors_name_the_tensor_as_the_file_does(weights, tmp_path):
    name = "bert.encoder.layer.1.output.dense.bias"
    state = dict(weights[0])
    state[name] = torch.full_like(state[name], torch.nan)
    torch.save(under("module.", state), tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"x\.pth: module\.{name}: .*NaN"):
        run_import.run_import(CASE, tmp_path / "x.pth", tmp_path / "base")
    torch.save(under("module.", state) | {name: state[name]}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=name):
        run_import.examine(CASE, tmp_path / "x.pth")
    torch.save(under("model.", state), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"looks like bert, not eva_vit"):
        run_import.examine("eva_vit", tmp_path / "x.pth")


BESIDE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth")


def trainer_folder(folder: Path) -> Path:
    """What transformers' Trainer leaves beside the weights, each of it poison to a reader."""
    folder.mkdir()
    for name in (*BESIDE, "._pytorch_model.bin", "random_states_0.pkl", "optimizer.bin"):
        (folder / name).write_bytes(pickle.dumps(Runs(print, "code ran")))
    return folder


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.safetensors", "mine.pth", "last.ckpt"]
)
def test_only_weights_of_a_trainers_folder_are_opened(name, weights, tmp_path, capsys):
    state, leaves = weights
    folder = trainer_folder(tmp_path / "checkpoint-3000")
    if name.endswith("safetensors"):
        tensors = {key: x.numpy() for key, x in state.items()}
        published.write_safetensors(tensors, folder / name)
        (folder / "pytorch_model.bin").write_bytes(b"an older form")
    else:
        torch.save({"state_dict": state}, folder / name)
    found = check(folder, leaves)
    assert found.opened.files == [folder / name]
    assert "ran" not in capsys.readouterr().out


def test_an_index_of_another_framework_is_not_followed(weights, tmp_path):
    state, leaves = weights
    folder = trainer_folder(tmp_path / "in")
    (folder / "flax_model.msgpack.index.json").write_text('{"weight_map": {"x": "flax"}}')
    (folder / "optimizer.bin.index.json").write_text('{"weight_map": {"x": "optimizer.bin"}}')
    torch.save(state, folder / "pytorch_model.bin")
    torch.save({"x": torch.ones(1)}, folder / "more.bin")
    assert check(folder, leaves).opened.files == [folder / "pytorch_model.bin"]


def test_shards_without_an_index_are_read_when_all_are_there(weights, tmp_path):
    state, leaves = weights
    folder = trainer_folder(tmp_path / "in")
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for number, name in enumerate(names):
        torch.save(dict(list(state.items())[number::2]), folder / name)
    assert [file.name for file in check(folder, leaves).opened.files] == names
    (folder / names[0]).unlink()
    with pytest.raises(UserError, match=f"{names[0]}.*missing"):
        files.open_checkpoint(folder)


def test_a_folder_that_does_not_tell_its_weights_is_refused(weights, tmp_path):
    folder = trainer_folder(tmp_path / "in")
    with pytest.raises(UserError, match="in: no checkpoint here"):
        files.open_checkpoint(folder)
    for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
        torch.save(weights[0], folder / name)
    with pytest.raises(UserError, match=r"checkpoint_best\.pt, checkpoint_last\.pt.*--input"):
        files.open_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "../elsewhere.safetensors"}}'
    )
    with pytest.raises(UserError, match="no file of this folder"):
        files.open_checkpoint(folder)


CIF = dict(
    encoder=dict(width=24, hidden=40, heads=3, kernel=5, depth=5, pools=[1, 3], channels=6),
    decoder=dict(vocab=13, width=24, hidden=40, heads=2, self_blocks=3),
    kernel=3,
)
ARGUMENTS = dict(
    encoder_attention_heads=3,
    decoder_attention_heads=2,
    encoder_embed_dim=24,
    encoder_layers=5,
    pooling_layer_ids="1,3",
    layer_downsampling=True,
    cif_threshold=0.99,
    activation_fn="relu",
)


@pytest.fixture(scope="module")
def recognizer():
    """(state dict, leaves) of a CIF ASR model of none of SIZES."""
    plan = run_import.source_named("cif_asr").plan(CIF)
    generator, filled = np.random.default_rng(0), {row.target for row in plan.table}
    flat = rules.flatten(plan.shapes).items()
    leaves = {p: generator.normal(size=x.shape).astype(np.float32) for p, x in flat if p in filled}
    tensors = export_tree(plan.table, rules.unflatten(leaves))
    return {name: torch.from_numpy(x.copy()) for name, x in tensors.items()}, leaves


def fairseq_file(path, state, **changed):
    """As fairseq's trainer saves a model."""
    arguments = argparse.Namespace(**ARGUMENTS | changed)
    torch.save({"args": None, "cfg": {"model": arguments}, "model": state}, path)
    return path


def test_heads_of_a_recognizer_are_those_of_its_arguments(recognizer, tmp_path):
    """The layout of a projection depends on them: a wrong number gives other leaves."""
    state, leaves = recognizer
    found = check(fairseq_file(tmp_path / "x.pt", state), leaves, "cif_asr")
    assert found.options["encoder"]["heads"] == 3 and not any(found.plan.fields.values())
    found = run_import.examine("cif_asr", fairseq_file(tmp_path / "x.pt", state, cif_threshold=0.9))
    assert found.plan.fields["speech_interface"] == {"threshold": 0.9}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_attention_heads", 5),
        ("decoder_attention_heads", 5),
        ("encoder_layers", 4),
        ("encoder_embed_dim", 32),
        ("activation_fn", "gelu"),
        ("conformer_attn_type", "fairseq"),
        ("add_cif_ctxt_layers", True),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(name, value, recognizer, tmp_path):
    path = fairseq_file(tmp_path / "x.pt", recognizer[0], **{name: value})
    with pytest.raises(UserError, match=rf"x\.pt: cfg\.model\.{name}: "):
        run_import.examine("cif_asr", path)
