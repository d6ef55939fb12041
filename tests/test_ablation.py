"""The ablation of the LLM: its numbers, its trainings, and answers with a packed base."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import small_cache
import test_flags
from absl import flags
from small_runs import TOKENIZER

from xllm_jax.configs import stage3_instruction
from xllm_jax.convert import quantize
from xllm_jax.convert.sources import world
from xllm_jax.core import checkpoint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.data.example import Example
from xllm_jax.evaluation import ablation, measure, scorers
from xllm_jax.inference import load_run
from xllm_jax.report import ablation as page
from xllm_jax.report import text

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablation_page

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
SAMPLES = 40


@pytest.fixture(scope="module")
def launcher():
    """The command's module, with its flags alone."""
    with test_flags.command("ablation"):
        from xllm_jax.launch import ablation as launched

        assert test_flags.run([])[0] == 0
        yield launched


def measured(**right: int) -> dict:
    """A run of which the first so many answers of each task are right."""
    found = {}
    for task, count in right.items():
        examples = tuple(Example(str(n), (), "?", "是") for n in range(SAMPLES))
        made = measure.Task(task, task, examples, scorers.short_answer)
        answers = ["是" if n < count else "否" for n in range(SAMPLES)]
        found[task] = measure.measure(made, lambda _, a=answers: a)
    return found


def test_a_row_has_means_over_seeds_and_both_intervals():
    """Student's t over runs by hand: 4.302653 is its 97.5 % point for three of them."""
    runs = {seed: measured(vqa=count) for seed, count in enumerate((20, 24, 28))}
    than = {seed: measured(vqa=count) for seed, count in enumerate((18, 24, 24))}
    row = ablation.row("LoRA", runs, than, "adapters")
    found = row["tasks"]["vqa"]
    assert row["than"] == "adapters" and row["tasks"].keys() == {"vqa"}
    np.testing.assert_allclose(found["runs"], [0.5, 0.6, 0.7])
    assert found["value"] == pytest.approx(0.6)
    half = 4.302653 * 0.1 / 3**0.5
    np.testing.assert_allclose(found["over_runs"], [0.6 - half, 0.6 + half], atol=1e-6)
    gains = np.array([2, 0, 4]) / SAMPLES
    less = found["difference"]
    np.testing.assert_allclose(less["runs"], gains)
    half = 4.302653 * gains.std(ddof=1) / 3**0.5
    np.testing.assert_allclose(
        less["over_runs"], [gains.mean() - half, gains.mean() + half], atol=1e-6
    )
    low, high = less["over_samples"]
    assert -0.05 < low <= gains.mean() <= high < 0.2


def test_one_run_knows_nothing_of_others():
    found = ablation.row("one", {0: measured(vqa=20, spoken=10)})["tasks"]
    assert found.keys() == {"vqa", "spoken"}
    assert found["spoken"]["over_runs"] is None and "difference" not in found["spoken"]
    low, high = found["vqa"]["over_samples"]
    assert low < 0.5 < high and (low, high) == pytest.approx((0.338, 0.662), abs=1e-3)


def test_other_samples_are_not_compared():
    other = measured(vqa=3)
    other["vqa"]["keys"] = other["vqa"]["keys"][::-1]
    with pytest.raises(ValueError, match="different samples of vqa"):
        ablation.row("x", {0: measured(vqa=3)}, {0: other}, "adapters")


def scored(launcher, seeds: range) -> dict:
    """What all who are asked score: more with LoRA, one sample less with an int8 base."""
    right = {"before": (10, 5), "adapters": (20, 16), "lora": (30, 20), "answers": (19, 16)}
    asked = [who.name for who in launcher.asked(["adapters", "lora"], seeds)]
    kinds = {name: right[name.partition("-")[0].partition("_")[0]] for name in asked}
    return {name: measured(vqa=vqa, spoken=spoken) for name, (vqa, spoken) in kinds.items()}


@pytest.mark.parametrize("count", [1, 2])
def test_a_table_has_a_row_for_each_way_and_each_base(count, launcher):
    seeds = range(count)
    found = launcher.rows(scored(launcher, seeds), ["adapters", "lora"], seeds)
    kept = json.loads(json.dumps({"rows": found, "seeds": list(seeds), "steps": 220}))
    made = page.table(kept)
    rows = {cells[0].text: [cell.text for cell in cells[1:]] for cells in made.rows}
    assert len(rows) == 7 == len(found)
    assert rows["before stage 3"][0].startswith("25.0 [") and rows["before stage 3"][1] == "—"
    assert rows["the interfaces' adapters (paper)"][1] == "—"
    assert rows["and LoRA of rank 16 on the LLM"][1].startswith("+25.0 [+")
    for kind in ("int8", "nf4"):
        cells = rows[f"adapters, answered with an {kind} base"]
        assert cells[1].startswith("-2.5 [") and cells[3].startswith("+0.0 [")
        assert rows[f"before stage 3, answered with an {kind} base"][1].startswith("+0.0 [")
    shown = text.table(made)
    assert "220 updates" in shown and ("Student" in shown) == (count > 1)
    assert f"difference [{'runs' if count > 1 else 'samples'}]" in shown


def parsed(job) -> Stage:
    """The stage of a training, as the command parses it."""
    with test_flags.command("train"), test_flags.fresh_stages():
        code, said = test_flags.run(list(job.arguments))
        assert code == 0, said
        return copy.deepcopy(flags.FLAGS["config"].value)


def test_trainings_differ_in_what_is_compared_alone(launcher):
    """Steps, data, schedule and what an interface starts from are the demo's in every way."""
    made = launcher.jobs(list(launcher.WAYS), range(2))
    assert [job.command for job in made[:2]] == ["quantize", "quantize"] and len(made) == 2 + 12
    stages = {job.name: parsed(job) for job in made if job.command == "train"}
    packed = {job.name: job.arguments for job in made[:2]}
    first = stages["adapters-0"]
    for name, stage in stages.items():
        way, _, seed = name.rpartition("-")
        assert stage.seed == int(seed) and stage.steps == first.steps == launcher.steps()
        weights = launcher.WAYS[way].weights
        assert stage.parts["llm"].weights == weights
        assert bool(stage.lora.rank) == ("lora" in way or "dora" in way)
        assert stage.lora.dora == (way == "dora")
        if weights:
            assert f"--output={stage.init['llm']}" in packed[weights]
        same = dataclasses.replace(stage, seed=0, lora=first.lora, parts=first.parts)
        same = dataclasses.replace(same, init=stage.init | {"llm": first.init["llm"]})
        assert same == first


def test_without_a_demo_it_is_one_line(launcher, tmp_path):
    with pytest.raises(UserError, match=r"--output=.*holds no finished run stage1_speech.*demo"):
        launcher.prepare(tmp_path)
    for name in launcher.STAGE2:
        (tmp_path / "runs" / name / "final").mkdir(parents=True)
    (tmp_path / "world").mkdir()
    folder = launcher.prepare(tmp_path)
    assert (folder / "world").resolve() == tmp_path / "world"
    assert (folder / "runs" / "stage2_image" / "final").is_dir()
    assert not (folder / "world").readlink().is_absolute()
    stage = stage3_instruction.get_config("tiny")
    for seed, steps, known in ((4, 7, False), (5, stage.steps, True)):
        trained = dataclasses.replace(stage, seed=seed, steps=steps)
        about = {"stage": dataclasses.asdict(trained)}
        checkpoint.save_base(tmp_path / "runs" / "stage3" / "final", {"x": np.zeros(1)}, about)
        assert launcher.prepare(tmp_path) == folder
        job = launcher.training("adapters", seed)
        assert launcher.done(folder, job) == known == (folder / "runs" / job.name).is_symlink()


def test_runs_of_another_length_are_not_gone_on_from(launcher, tmp_path):
    """`xllm train` would: a finished run with fewer steps goes on under the longer schedule."""
    stage = dataclasses.replace(stage3_instruction.get_config("tiny"), steps=4)
    final = tmp_path / "runs" / "lora-0" / "final"
    checkpoint.save_base(final, {"x": np.zeros(1)}, {"stage": dataclasses.asdict(stage)})
    (tmp_path / "runs" / "stage2_image" / "final").mkdir(parents=True)
    wanted = launcher.steps()
    with pytest.raises(
        UserError, match=rf"^--steps: is {wanted}, and lora-0 .* 4 steps\. Say .*=4"
    ):
        launcher.check_steps(tmp_path)
    stage = dataclasses.replace(stage, steps=wanted)
    checkpoint.save_base(final, {"x": np.zeros(1)}, {"stage": dataclasses.asdict(stage)})
    launcher.check_steps(tmp_path)


def test_a_base_is_packed_once_and_only_of_the_demo_s_llm(launcher, tmp_path):
    """What needs it does not wait for a job that is done."""
    made = small_cache.based(small_cache.pictures(tmp_path), tmp_path)
    leaves = {p: np.asarray(x[...]) for p, x in checkpoint.open_leaves(made.init["llm"]).items()}
    leaves = {p: x for p, x in leaves.items() if p.startswith("llm/")}
    checkpoint.save_base(tmp_path / "bases" / "llm", rules.unflatten(leaves), {})
    (tmp_path / "runs").mkdir()
    jobs = launcher.jobs(["int8", "nf4"], range(1))
    assert launcher.waiting(tmp_path, jobs) == jobs
    quantize.run(tmp_path / "bases" / "llm", tmp_path / launcher.base("int8"), "int8")
    waiting = {job.name: job.needs for job in launcher.waiting(tmp_path, jobs)}
    assert waiting == {"nf4": (), "int8-0": (), "nf4-0": ("nf4",)}
    other = {path: x + 1 for path, x in leaves.items()}
    checkpoint.save_base(tmp_path / "bases" / "llm", rules.unflatten(other), {})
    with pytest.raises(
        UserError, match=r"packed/llm_int8: was made of another LLM than the demo's"
    ):
        launcher.waiting(tmp_path, jobs)


def test_commands_are_shown_with_their_folder(launcher, tmp_path, monkeypatch):
    from xllm_jax.launch import jobs

    monkeypatch.chdir(tmp_path)
    shown = jobs.typed(launcher.training("lora", 0), tmp_path / "a demo" / "ablation")
    assert shown.startswith("cd 'a demo/ablation' && xllm train --config=")
    assert jobs.typed(launcher.training("lora", 0), tmp_path).startswith("xllm train")


def test_what_is_measured_is_kept_until_a_run_changes(launcher, tmp_path, monkeypatch):
    for name in (*(f"runs/{run}/final" for run in ("adapters-0", *launcher.STAGE2)), "packed"):
        (tmp_path / name).mkdir(parents=True)
    task = measure.Task("vqa", "vqa", (Example("0", (), "?", "是"),), scorers.short_answer)
    loads = []
    monkeypatch.setattr(
        launcher.Examiner, "_load", lambda *_: loads.append(1) or (lambda asked: ["是"])
    )
    who = next(one for one in launcher.asked(["adapters"], range(1)) if one.name == "adapters-0")
    for _ in range(2):
        found = launcher.Examiner(tmp_path, {"vqa": task})(who)
        assert ablation.value(found, "vqa") == 1 and len(loads) == 1
    (tmp_path / "runs" / "adapters-0" / "final" / "params").write_text("other")
    launcher.Examiner(tmp_path, {"vqa": task})(who)
    assert len(loads) == 2


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_finished_run_takes_a_packed_base(kind, tmp_path):
    """Its kernels stay packed, and unpacked they are close to the run's own."""
    stage = small_cache.based(small_cache.pictures(tmp_path), tmp_path)
    source = stage.init["llm"]
    leaves = {p: np.asarray(x[...]) for p, x in checkpoint.open_leaves(source).items()}
    trained = {p: x for p, x in leaves.items() if p.startswith("image_interface/")}
    about = {"stage": dataclasses.asdict(stage), "base": {}}
    checkpoint.save_base(tmp_path / "run" / "final", rules.unflatten(trained), about)
    quantize.run(source, tmp_path / "packed", kind, source="chatglm")
    restored = load_run.load_run(tmp_path / "run", {"llm": str(tmp_path / "packed")})
    assert restored.stage.parts["llm"].weights == kind
    found, own = (rules.flatten({"llm": one}) for one in (restored.params["llm"], _llm(leaves)))
    packed = {path for path in found if path.endswith(f"kernel_{kind}")}
    assert packed and not any(p.endswith("/kernel") and "/layers/" in p for p in found)
    for path in found.keys() & own.keys():
        np.testing.assert_array_equal(found[path], own[path])
    again = load_run.load_run(tmp_path / "run")
    assert again.stage.parts["llm"].weights == ""


def _llm(leaves: dict[str, np.ndarray]) -> dict:
    return rules.unflatten(leaves)["llm"]


def test_the_page_s_figures_are_of_the_llm_that_ships(launcher, tmp_path):
    """Or there are none yet; the table that the command writes takes their place."""
    page = ablation_page.PAGE.read_text("utf-8")
    (stated,) = ablation_page.stated(page)
    results = json.loads(json.dumps({"rows": {}, "seeds": [0, 1], "steps": 220, "llm": "abc"}))
    results["rows"] = launcher.rows(scored(launcher, range(2)), ["adapters", "lora"], range(2))
    changed = ablation_page.placed(page, results)
    assert ablation_page.stated(changed) == ["abc"]
    assert "| adapters, answered with an nf4 base |" in changed
    if stated != "none":
        world.import_llm(TOKENIZER, tmp_path / "llm")
        assert launcher.identity(tmp_path / "llm") == stated


def test_an_unknown_way_is_one_line(launcher):
    with test_flags.command("ablation"):
        assert test_flags.run(["--only=lor"])[0] == 0
        from xllm_jax.launch import ablation as launched

        with pytest.raises(UserError, match=r"--only: unknown way 'lor'.*lora"):
            launched.main([])
