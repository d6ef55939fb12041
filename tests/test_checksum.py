"""Checksums: every byte counts, wherever it lies; what older runs have written is still read."""

from __future__ import annotations

import hashlib
import json
import shutil

import host_runs
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_stage
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xllm_jax.core import checkpoint, checksum, older_checksum, rules
from xllm_jax.core.errors import UserError
from xllm_jax.feature_cache import check
from xllm_jax.inference.load_run import check_base
from xllm_jax.training import loop

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.uint16)


def some(rng: np.random.Generator) -> np.ndarray:
    """A leaf of up to three axes."""
    shape = tuple(int(n) for n in rng.integers(2, 9, rng.integers(1, 4)))
    return (rng.normal(size=shape) * 20).astype(DTYPES[rng.integers(len(DTYPES))])


def flip_a_bit(leaf, rng):
    bits = leaf.reshape(-1).view(np.uint8)
    bits[rng.integers(len(bits))] ^= np.uint8(1 << rng.integers(8))
    return leaf


def flip_two_signs(leaf, rng):
    """Two places apart: what two sums modulo 2^32 cannot see."""
    flat = leaf.reshape(-1)
    if len(flat) > 2:
        place = rng.integers(len(flat) - 2)
        flat[[place, place + 2]] = -flat[[place, place + 2]]
    return leaf


def swap(leaf, rng):
    flat = leaf.reshape(-1)
    one, other = rng.integers(len(flat), size=2)
    flat[[one, other]] = flat[[other, one]]
    return leaf


CHANGES = {
    "negated": lambda leaf, rng: -leaf,
    "a bit flipped": flip_a_bit,
    "two signs flipped": flip_two_signs,
    "doubled": lambda leaf, rng: leaf * leaf.dtype.type(2),
    "sixteen-fold": lambda leaf, rng: leaf * leaf.dtype.type(16),
    "halved": lambda leaf, rng: leaf / leaf.dtype.type(2),
    "two values swapped": swap,
    "transposed": lambda leaf, rng: leaf.T.reshape(leaf.shape),
    "shifted": lambda leaf, rng: np.roll(leaf, int(rng.integers(1, 4))),
    "rows shifted": lambda leaf, rng: np.roll(leaf, 1, axis=0),
    "reversed": lambda leaf, rng: leaf[::-1],
    "of another shape": lambda leaf, rng: leaf[None],
    "zeroed": lambda leaf, rng: leaf * leaf.dtype.type(0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen_and_no_other(change, monkeypatch):
    """Identities differ exactly where bytes, shape or dtype do; blocks of a few rows."""
    monkeypatch.setattr(checksum, "BLOCK", 24)
    rng = np.random.default_rng(0)
    compared = missed = 0
    for _ in range(60):
        leaf = some(rng)
        with np.errstate(over="ignore"):
            after = np.ascontiguousarray(CHANGES[change](leaf.copy(), rng).astype(leaf.dtype))
        same = (leaf.shape, leaf.tobytes()) == (after.shape, after.tobytes())
        texts = [checksum.of_leaves({"a": x})["a"] for x in (leaf, after)]
        compared += not same
        missed += (texts[0] == texts[1]) != same
    assert missed == 0 and compared > 20


def test_the_older_sums_miss_a_negated_leaf():
    """Why they are not used any more."""
    leaf = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    older = [older_checksum.of_leaves({"a": x})["a"] for x in (leaf, -leaf)]
    assert older[0] == older[1]


def test_the_text_is_sha256_of_the_bytes_of_the_rows(monkeypatch):
    """By hashlib alone; the same on a device, whole, in parts, and beyond this process's reach."""
    monkeypatch.setattr(checksum, "BLOCK", 40)
    leaf = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    rows = [hashlib.sha256(leaf[start : start + 2].tobytes()).digest() for start in range(0, 7, 2)]
    wanted = f"(7, 5) float32 sha256:{hashlib.sha256(b''.join(rows)).hexdigest()}"
    device_mesh = Mesh(np.asarray(jax.devices()[:1]), ("x",))
    placed = [
        leaf,
        jnp.asarray(leaf),
        jax.device_put(leaf, NamedSharding(device_mesh, PartitionSpec(None, "x"))),
    ]
    for reads_directly in (True, False):
        monkeypatch.setattr(checksum, "_on_this_cpu", lambda _, reads=reads_directly: reads)
        assert {checksum.of_leaves({"a": x})["a"] for x in placed} == {wanted}
    scalars = {"b": jnp.asarray(True), "i": jnp.int32(3), "none": jnp.zeros((0, 4))}
    assert checksum.of_leaves(scalars)["i"].endswith(
        hashlib.sha256(hashlib.sha256(np.int32(3).tobytes()).digest()).hexdigest()
    )
    assert len(set(checksum.of_leaves(scalars).values())) == 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base, and a run of one micro-batch on it."""
    folder = tmp_path_factory.mktemp("trained")
    loop.fit(host_runs.stage(steps=1, trainable=("llm/.*",)), folder / "first")
    loop.fit(host_runs.stage(init={"llm": str(folder / "first")}), folder / "run", stop_after=1)
    return folder


def test_a_base_with_negated_leaves_is_refused(trained, tmp_path):
    """Every frozen leaf's signs turned: two sums agree, the model does not."""
    params = {
        path: np.asarray(store.read().result())
        for path, store in checkpoint.open_leaves(trained / "first" / "final").items()
    }
    frozen = {path: -leaf for path, leaf in params.items() if path.startswith("llm/embedding")}
    assert frozen and older_checksum.of_leaves(frozen) == older_checksum.of_leaves(
        {path: params[path] for path in frozen}
    )
    checkpoint.save_base(tmp_path / "other", rules.unflatten(params | frozen), {})
    shutil.copytree(trained / "run", tmp_path / "run")
    with pytest.raises(UserError, match="another llm"):
        loop.fit(host_runs.stage(init={"llm": str(tmp_path / "other")}), tmp_path / "run")


def age(folder, params) -> None:
    """Writes a checkpoint's checksums as they were before."""
    file = folder / "checkpoints" / "1" / "about" / "metadata"
    about = json.loads(file.read_text())
    about.pop("hash")
    about["base"] = {"llm": checksum.identity(params, older=True)}
    for path, store in checkpoint._stores(
        folder / "checkpoints/1/state", about["checksums"]
    ).items():
        about["checksums"][path] = checksum.of_store(store, store.dtype.numpy_dtype, older=True)
    file.write_text(json.dumps(about | {"hash": checksum.of_json(about)}))


def test_an_older_checkpoint_goes_on_with_one_warning(trained, tmp_path, capfd):
    """Its next checkpoint knows the base by SHA-256; a base that the sums tell apart is refused."""
    shutil.copytree(trained / "run", tmp_path / "run")
    stores = checkpoint.open_leaves(trained / "first" / "final")
    frozen = {"embedding": np.asarray(stores["llm/embedding"].read().result())}
    age(tmp_path / "run", frozen)
    made = host_runs.stage(init={"llm": str(trained / "first")})
    loop.fit(made, tmp_path / "run", stop_after=2)
    assert capfd.readouterr().err.count("checksums that miss some changes") == 1
    about = checkpoint.Checkpoints(tmp_path / "run").about(2)
    texts = [*about["base"].values(), *about["checksums"].values()]
    assert texts and all("sha256:" in text for text in texts)
    loop.fit(made, tmp_path / "run", stop_after=3)
    assert "checksums that miss" not in capfd.readouterr().err
    shutil.copytree(trained / "run", tmp_path / "changed")
    age(tmp_path / "changed", {"embedding": frozen["embedding"] + 1})
    with pytest.raises(UserError, match="another llm"):
        loop.fit(made, tmp_path / "changed")


def test_an_older_result_is_compared_by_its_own_sums(capfd):
    tree = {"llm": {"a": np.arange(6, dtype=np.float32)}}
    known = {"llm": checksum.identity(tree["llm"], older=True)}
    assert known == check.base(tree, {}, older=True)
    check_base(tree, ["llm"], known, "run", {})
    assert capfd.readouterr().err.count("run has checksums that miss") == 1
    with pytest.raises(UserError, match="another llm"):
        check_base({"llm": {"a": np.ones(6, np.float32)}}, ["llm"], known, "run", {})


def test_a_damaged_checkpoint_of_either_kind_is_found(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    checkpoints = checkpoint.Checkpoints(tmp_path / "run")
    assert checkpoints.damage(1) == ""
    file = tmp_path / "run/checkpoints/1/about/metadata"
    about = json.loads(file.read_text())
    about.pop("hash")
    name = next(path for path in about["checksums"] if path.startswith("trainable"))
    about["checksums"][name] = about["checksums"][name][:-1] + "x"
    file.write_text(json.dumps(about))
    assert name in checkpoints.damage(1)
    checkpoints.close()
    assert small_stage.curve(trained / "run").keys() == {1}
