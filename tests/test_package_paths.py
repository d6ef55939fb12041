"""What derives a folder from its own place in the package, or names a module in a string."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax.numpy as jnp

import xllm_jax
from xllm_jax.convert import run_import
from xllm_jax.core import fingerprint
from xllm_jax.data.media import decode_workers
from xllm_jax.objectives import answer
from xllm_jax.training import nonfinite, startup

PACKAGE = Path(xllm_jax.__file__).parent


def test_hosts_compare_every_source_file(monkeypatch):
    compared = {}
    monkeypatch.setattr(
        startup.hosts, "agree", lambda store, what, own: compared.update({what: own})
    )
    for module, name in ((startup.fingerprint, "configuration"), (startup.manifest, "manifest")):
        monkeypatch.setattr(module, name, lambda *_: {})
    monkeypatch.setattr(startup.fingerprint, "tree", lambda _: {})
    pipeline = type("Pipeline", (), {"sources": {}})
    system = type("System", (), {"stage": type("Stage", (), {"data": None}), "parameters": {}})
    startup.compare(system, pipeline, store=object())  # type: ignore[arg-type]
    files = {str(file.relative_to(PACKAGE.parent)) for file in PACKAGE.rglob("*.py")}
    assert files <= compared["code"].keys()


def test_a_changed_file_anywhere_changes_the_code(tmp_path):
    package = tmp_path / "xllm_jax"
    for name in ("__init__.py", "core/rules.py", "data/media/image.py", "training/loop.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1\n")
    before = fingerprint.code(package)
    for file in package.rglob("*.py"):
        file.write_text("2\n")
        name = str(file.relative_to(tmp_path))
        assert {k for k, v in fingerprint.code(package).items() if v != before[k]} == {name}
        file.write_text("1\n")


def test_the_operation_that_makes_a_nan_is_named_by_its_file():
    def loss(logits):
        return answer.cross_entropy(logits, jnp.zeros((1,), jnp.int32)).sum()

    told = nonfinite.first(loss, jnp.full((1, 3), -jnp.inf))
    assert "(objectives/answer.py:" in told


def test_workers_import_the_package_and_start_a_module_that_exists():
    assert (Path(decode_workers.ROOT) / "xllm_jax" / "__init__.py").samefile(
        PACKAGE / "__init__.py"
    )
    spec = importlib.util.find_spec(decode_workers.MODULE)
    assert spec and spec.origin == decode_workers.__file__


def test_sources_are_tables_and_no_engine_files():
    files = {p.stem for p in (PACKAGE / "convert" / "sources").glob("[!_]*.py")}
    engine = {p.stem for p in (PACKAGE / "convert").glob("[!_]*.py")}
    found = run_import.sources().keys()
    assert found and found <= files and not found & engine
    helpers = {"blip2_hugging_face", "chatglm_quantized", "clip_text", "llama_config"}
    helpers |= {"nextgpt_projection", "peft_lora", "xllm_sizes"}
    assert files - found == helpers
