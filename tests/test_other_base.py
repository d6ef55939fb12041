"""A finished run over another base: a packing of its own one, another LLM's, or none at all."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import small_cache
import small_stage
from test_adapter_commands import run as command
from test_lora_training import small

from xllm_jax.assembly import adapter_source, parameters
from xllm_jax.convert import adapters_out, quantize, run_export
from xllm_jax.core import atomic, base_description, checkpoint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.suite import Suite
from xllm_jax.inference import load_run
from xllm_jax.launch import suite_models
from xllm_jax.models import lora, quantized
from xllm_jax.training import loop

ATTENTION = "llm/layers/attention/.*"
QKV = "llm/layers/attention/qkv"


def write_base(folder, leaves):
    """A base of the LLM, with a tokenizer beside it."""
    checkpoint.save_base(folder, rules.unflatten(leaves), {})
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(small_stage.TOKENIZER / name, folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bases of an LLM in floats and packed, another LLM's, a run that trained an interface beside
    the first, and one that trained its adapters."""
    folder = tmp_path_factory.mktemp("other_base")
    small_cache.draw(folder / "pictures", 4)
    made = small_cache.based(small_cache.pictures(folder / "pictures"), folder)
    leaves = {p: np.asarray(x[...]) for p, x in checkpoint.open_leaves(made.init["llm"]).items()}
    leaves = {p: x for p, x in leaves.items() if p.startswith("llm/")}
    other = {p: x + 0.01 if p == f"{QKV}/kernel" else x for p, x in leaves.items()}
    for name, held in (("llm", leaves), ("another", other)):
        write_base(folder / "bases" / name, held)
        quantize.run(folder / "bases" / name, folder / "bases" / f"{name}_int8", "int8")
    base = str(folder / "bases" / "llm")
    made = dataclasses.replace(made, steps=1, init=made.init | {"llm": base})
    source = next(iter(made.data.sources.values()))
    sources = {"pictures": dataclasses.replace(source, path=str(folder / "pictures"))}
    made = small_cache.changed(made, tokenizer=base, root=str(folder), sources=sources)
    loop.fit(made, folder / "runs" / "image")
    made = small(targets=ATTENTION)
    made.init, made.steps, made.data.tokenizer = {"llm": base}, 1, base
    loop.fit(made, folder / "runs" / "lora")
    return folder


def params_of(*arguments, **more):
    return rules.flatten(load_run.load_run(*arguments, **more).params)


@pytest.mark.parametrize("name", ["image", "lora"])
def test_a_run_answers_on_a_packing_of_its_base(name, folder):
    """Kernels are the packed ones, and all that the run trained is the run's."""
    place, packed = folder / "runs" / name, folder / "bases" / "llm_int8"
    own, found = params_of(place), params_of(place, base=str(packed))
    held = {p: np.asarray(x[...]) for p, x in checkpoint.open_leaves(packed).items()}
    trained = checkpoint.open_leaves(place / "final").keys()
    assert found[f"{QKV}/kernel_int8"].dtype == np.int8 and f"{QKV}/kernel" not in found
    for path, x in found.items():
        np.testing.assert_array_equal(x, held[path] if path in held else own[path])
    assert trained <= found.keys() and not trained & held.keys()
    assert any(map(lora.is_adapter, trained)) == (name == "lora")
    again = load_run.load_run(place, base=str(folder / "bases" / "llm"))
    assert again.stage.parts["llm"].weights == ""


@pytest.mark.parametrize("name", ["image", "lora"])
def test_a_base_of_another_llm_is_refused(name, folder):
    place = folder / "runs" / name
    with pytest.raises(UserError, match=rf"^--base=.*another llm than .*: {QKV}/kernel has other"):
        load_run.load_run(place, base=str(folder / "bases" / "another_int8"))
    with pytest.raises(UserError, match=r"bases/another.*Bring|another llm than .*bases/another "):
        load_run.load_run(place, base=str(folder / "bases" / "another"))


def moved(folder, target, *names):
    """A copy of runs and bases elsewhere, whose stages name paths from there."""
    for name in names:
        shutil.copytree(folder / name, target / name)
    for file in target.rglob("about.json"):
        file.write_text(file.read_text().replace(f"{folder}/", ""))


def test_a_packed_base_alone_suffices(folder, tmp_path):
    """The floats and the tokenizer beside them need not be there: a run knows its kernels."""
    moved(folder, tmp_path, "runs/image", "runs/lora", "bases/llm_int8", "small_image_base")
    for name in ("image", "lora"):
        base = str(tmp_path / "bases" / "llm_int8")
        restored = load_run.load_run(tmp_path / "runs" / name, base=base)
        assert restored.stage.data.tokenizer == base
    about = tmp_path / "runs" / "image" / "final" / "about.json"
    said = json.loads(about.read_text())
    assert any(path.startswith("llm/") for path in said.pop("kernels"))
    atomic.write_json(about, said)  # as runs were written before
    with pytest.raises(UserError, match=r"^--base=.*: bases/llm is gone\. Bring it back"):
        load_run.load_run(tmp_path / "runs" / "image", base=base)


def test_what_lies_there_under_the_name_of_the_base_is_told(folder, tmp_path):
    """Packed otherwise, of another size, or with other values: the run is named, and no flag of a
    stage, which nobody who asks a run can give."""
    moved(folder, tmp_path, "runs/image", "runs/lora", "small_image_base")
    place, base = tmp_path / "runs" / "image", tmp_path / "bases" / "llm"
    shutil.copytree(folder / "bases" / "llm_int8", base)
    for name in ("image", "lora"):
        with pytest.raises(
            UserError, match=r"was trained on llm in floats, and .* holds int8\."
        ) as e:
            load_run.load_run(tmp_path / "runs" / name)
        assert e.value.field == str(tmp_path / "runs" / name) and "--config" not in str(e.value)
    shutil.rmtree(base)
    leaves = checkpoint.open_leaves(folder / "bases" / "llm")
    cut = {p: np.asarray(x[...]) for p, x in leaves.items()}
    cut["llm/embedding"] = cut["llm/embedding"][:-1]
    write_base(base, cut)
    with pytest.raises(UserError, match=r"is not over what it was trained on: .*has shape") as told:
        load_run.load_run(place)
    assert told.value.field == str(place) and "parts" not in told.value.hint
    shutil.rmtree(base)
    shutil.copytree(folder / "bases" / "another", base)
    with pytest.raises(UserError, match=rf"was trained on another llm than {base} "):
        load_run.load_run(place)
    with pytest.raises(UserError, match=rf"runs/lora: is not .*init\.llm: .* in {base}\."):
        load_run.load_run(tmp_path / "runs" / "lora")


def test_what_no_base_can_stand_in_for_is_one_line(folder, tmp_path):
    packed = str(folder / "bases" / "llm_int8")
    whole = small_stage.stage(steps=1)
    checkpoint.save_base(
        tmp_path / "whole" / "final",
        {"llm": {"embedding": np.zeros(1)}},
        {"stage": dataclasses.asdict(whole), "base": {}},
    )
    with pytest.raises(UserError, match=r"^--base=.*the run trained its own llm"):
        load_run.load_run(tmp_path / "whole", base=packed)
    for base, told in (("gone", "no base here"), ("small_image_base", None)):
        if told:
            with pytest.raises(UserError, match=rf"^--base=.*{told}"):
                load_run.load_run(folder / "runs" / "image", base=str(folder / base))
    with pytest.raises(UserError, match="no base or finished run here"):
        suite_models.of_run(str(folder / "runs" / "image"), Suite(), str(folder / "gone"))
    models = [
        suite_models.of_run(str(folder / "runs" / "image"), Suite(), base) for base in ("", packed)
    ]
    assert models[0].about != models[1].about  # so that no answers are mixed


def test_generate_takes_the_flag(folder):
    image = str(folder / "runs" / "image")
    arguments = (f"--checkpoint={image}", "--prompt=你好", "--max_tokens=3")
    code, _, told = command("generate", *arguments, f"--base={folder}/bases/llm_int8")
    assert code == 0, told
    code, _, told = command("generate", *arguments, f"--base={folder}/bases/another_int8")
    assert code == 2 and len(told.splitlines()) == 1 and "is of another llm" in told


def test_adapters_that_do_not_train_are_merged_too(folder, tmp_path):
    """Of `lora.init`, and of a run that the LLM was taken from: what the run answers with."""
    base, first = str(folder / "bases" / "llm"), str(folder / "runs" / "lora")
    adapters_out.merge(first, tmp_path / "merged")
    wanted = checkpoint.open_leaves(tmp_path / "merged")
    for number, (init, source) in enumerate((("", first), (first, base))):
        made = small(targets=ATTENTION, trains=False, init=init)
        made.trainable, made.steps, made.init = ("llm/final_norm/.*",), 1, {"llm": source}
        stage = {"stage": dataclasses.asdict(made)}
        final = tmp_path / f"run{number}" / "final"
        checkpoint.save_base(final, {"image_interface": {"x": np.zeros(1)}}, stage)
        assert adapter_source.holder(final, "llm") == folder / "runs" / "lora" / "final"
        said = adapters_out.merge(tmp_path / f"run{number}", tmp_path / f"merged{number}")
        assert said == "2 kernels of llm with their adapters in them"
        found = checkpoint.open_leaves(tmp_path / f"merged{number}")
        assert found.keys() == wanted.keys()
        for path, x in wanted.items():
            np.testing.assert_array_equal(found[path][...], x[...])
    with pytest.raises(UserError, match="holds no adapters of 'llm'"):
        adapters_out.merge(folder / "runs" / "image", tmp_path / "none")


@pytest.mark.parametrize("way", ["init", "lora.init"])
def test_the_alpha_of_adapters_is_the_one_that_a_run_states(way, folder, tmp_path):
    first = str(folder / "runs" / "lora")
    base = first if way == "init" else str(folder / "bases" / "llm")
    made = small(targets=ATTENTION, alpha=8, init=first if way == "lora.init" else "")
    made.init, made.steps = {"llm": base}, 1
    with pytest.raises(UserError, match=r"^lora\.alpha: is 8, and .* have 16\. Say --config\.lora"):
        loop.fit(made, tmp_path / "run")
    made.lora.alpha = 16
    loop.fit(made, tmp_path / "run")
    about = base_description.base_about(tmp_path / "run" / "final")
    scale = params_of(tmp_path / "run")[f"{QKV}/{lora.SCALE}"]
    np.testing.assert_allclose(scale, about["stage"]["lora"]["alpha"] / made.lora.rank)
    made.lora.rank, made.lora.alpha = 2, 16
    with pytest.raises(UserError, match=r"^lora\.rank: is 2, and .* have 4\. Say --config\.lora"):
        loop.fit(made, tmp_path / "next")


def test_scales_of_a_pattern_are_told_by_the_most_common(folder):
    """As `xllm adapter --action=export` states them; the scales themselves stay."""
    made = small(targets=ATTENTION, alpha=16)
    leaves = {f"{QKV}/{lora.SCALE}": np.float32([4, 2]), f"{QKV}/{lora.A}": np.zeros((2, 3, 4))}
    leaves |= {f"x/{lora.SCALE}": np.float32([2, 2]), f"x/{lora.A}": np.zeros((2, 3, 4))}
    with pytest.raises(UserError, match=r"is 16, and .* have 8 for most kernels"):
        adapter_source.check_alpha(made, {}, rules.unflatten(leaves))
    made.lora.alpha = 8
    adapter_source.check_alpha(made, {}, rules.unflatten(leaves))


@pytest.mark.parametrize(
    "source, told",
    [
        ("bases/llm_int8", r"is packed in int8: .*kernel.*made of \(int8 of llm\)"),
        ("runs/lora/final", r"holds adapters without their base: .*--action=merge"),
    ],
)
def test_what_cannot_be_exported_says_what_it_is(source, told, folder, tmp_path):
    with pytest.raises(UserError, match=told) as error:
        run_export.run_export("chatglm", folder / source, tmp_path / "out")
    assert error.value.field == str(folder / source) and not (tmp_path / "out").exists()


def test_adapters_beside_kernels_are_not_lost_in_an_export(folder, tmp_path):
    both = {p: np.asarray(x) for p, x in params_of(folder / "runs" / "lora").items()}
    checkpoint.save_base(tmp_path / "both", rules.unflatten(both), {})
    with pytest.raises(UserError, match=r"has adapters beside its kernels: .*--action=merge"):
        run_export.run_export("chatglm", tmp_path / "both", tmp_path / "out")


def test_an_older_base_is_not_replaced(folder, tmp_path):
    """Neither by `quantize` nor by what `adapter` writes."""
    base, there = folder / "bases" / "llm", tmp_path / "there"
    quantize.run(base, there, "nf4")
    before = (there / "about.json").read_bytes()
    with pytest.raises(UserError, match=r"there: is there already\. Choose another --output"):
        quantize.run(base, there, "int8")
    with pytest.raises(UserError, match="is there already"):
        adapters_out.merge(folder / "runs" / "lora", there)
    assert (there / "about.json").read_bytes() == before
    assert quantized.KINDS["nf4"].leaf in str(checkpoint.open_leaves(there).keys())


def test_a_stage_is_told_the_kind_that_its_source_is_packed_in(folder):
    """Two kinds of 4 bits have leaves of the same names."""
    shapes = {"llm/a/kernel_int4": ((2, 64, 8), "int8"), "llm/a/kernel_scale": ((2, 1, 8), "f4")}
    from xllm_jax.assembly import packed_weights

    assert packed_weights.kind_of(shapes, "llm") == "int4_channel"
    shapes["llm/a/kernel_scale"] = ((2, 2, 8), "f4")
    assert packed_weights.kind_of(shapes, "llm") == "int4"
    assert packed_weights.kind_of(shapes, "other") == ""
    place = folder / "bases" / "llm_int8"
    shapes = base_description.base_about(place)["shapes"]
    assert packed_weights.kind_of(shapes, "llm") == "int8"
    assert parameters.held(str(place), "llm").keys() == shapes.keys()
