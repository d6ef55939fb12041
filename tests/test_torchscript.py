"""TorchScript archives, written by torch and read without it, and without running them."""

from __future__ import annotations

import pickle
import warnings
import zipfile

import numpy as np
import pytest

from xllm_jax.convert.header import Header
from xllm_jax.convert.torchscript import TorchScriptFile, is_torchscript
from xllm_jax.core.errors import UserError

torch = pytest.importorskip("torch")


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2)
        self.norm = torch.nn.BatchNorm1d(8)
        self.scale = torch.nn.Parameter(torch.tensor(2.5))
        # a view: strides that are not those of its shape, and an offset
        self.register_buffer("turned", torch.arange(24.0).view(4, 6).half()[1:, 2:].T)
        self.empty_list: list[int] = [1, 2, 3]

    def forward(self, x):
        return self.norm(x) * self.scale


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [torch.nn.Linear(8, 8).to(torch.bfloat16), Inner(), torch.nn.Embedding(5, 8)]
        self.visual = torch.nn.ModuleDict({"resblocks": torch.nn.ModuleList(blocks)})
        self.rate, self.name = 0.5, "tower"

    def forward(self, x):
        return self.visual["resblocks"][1](x)


@pytest.fixture
def archive(tmp_path):
    """(path, the module's state dict)."""
    torch.manual_seed(0)
    module = Outer().eval()
    path = tmp_path / "ViT-B-16.pt"
    with warnings.catch_warnings():  # the format is deprecated; published files have it
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(module, torch.randn(3, 8)), path)
    return path, module.state_dict()


def rewritten(path, change):
    """The archive with some of its entries changed."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, data)


def test_reads_what_torch_wrote(archive):
    path, state = archive
    assert is_torchscript(path)
    source = TorchScriptFile(path)
    assert set(source) == set(state) and len(source) == len(state)
    for name, tensor in state.items():
        ours = source[name]
        assert source.header(name) == Header(tuple(tensor.shape), ours.dtype)
        assert str(ours.dtype) == str(tensor.dtype).removeprefix("torch."), name
        np.testing.assert_array_equal(ours.astype(np.float64), tensor.double().numpy())


def test_an_ordinary_file_is_none(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth")
    (tmp_path / "b.pt").write_bytes(b"nothing")
    assert not is_torchscript(tmp_path / "a.pth") and not is_torchscript(tmp_path / "b.pt")


def test_a_pickle_that_calls_something_is_refused_and_not_run(archive, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    path, _ = archive
    data = pickle.dumps(Trap(), protocol=2)
    rewritten(path, lambda entries: entries.update({data_entry(entries): data}))
    with pytest.raises(UserError, match="neither module nor tensor"):
        TorchScriptFile(path)
    assert not (tmp_path / "run").exists()


def data_entry(entries) -> str:
    return next(name for name in entries if name.endswith("/data.pkl"))


def test_damaged_archives_are_told(archive):
    path, state = archive
    whole = path.read_bytes()

    def shorten(entries):
        name = max((n for n in entries if "/data/" in n), key=lambda n: len(entries[n]))
        entries[name] = entries[name][:-8]

    rewritten(path, shorten)
    source = TorchScriptFile(path)
    with pytest.raises(UserError, match="cannot be read") as caught:
        for name in source:
            source[name]
    assert caught.value.field in {f"{path}: {name}" for name in state}
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a TorchScript archive"):
        TorchScriptFile(path)
    path.write_bytes(whole)
    rewritten(path, lambda entries: entries.update({data_entry(entries): b"\x80\x02X"}))
    with pytest.raises(UserError, match="not a TorchScript archive"):
        TorchScriptFile(path)
