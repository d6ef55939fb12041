"""A run that was written before fields, objectives and files got their present names.

`older_run.tar.gz` holds three runs made at commit 6c8c0c7: `first`, whose result is the base of the
others; `half`, with the stage below, stopped at micro-batch 4 of 6; and `whole`, which went on from
there to the end.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import host_runs
import jax
import numpy as np
import pytest
import small_stage

from xllm_jax.core import checkpoint, kept_checkpoints, lookup
from xllm_jax.core.stage import Best, Stage
from xllm_jax.core.stage_record import parse_stage
from xllm_jax.inference.load_run import load_run
from xllm_jax.training import loop


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(Path(__file__).parent / "older_run.tar.gz") as packed:
        packed.extractall(folder, filter="data")
    return folder


def stage(folder: Path) -> Stage:
    measured = dataclasses.replace(host_runs.validation(), every=2)
    return host_runs.stage(
        validation=measured,
        best=Best("validation/loss", lowest=True),
        save_every=2,
        keep=2,
        init={"llm": str(folder / "first")},
    )


def test_an_older_checkpoint_resumes_and_ends_alike(older):
    loop.fit(stage(older), older / "half")
    found, wanted = (small_stage.curve(older / name) for name in ("half", "whole"))
    assert list(found) == list(wanted) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)
    ends = [checkpoint.open_leaves(older / name / "final") for name in ("half", "whole")]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 0


def test_the_metric_of_an_older_checkpoint_still_chooses_the_best():
    value = kept_checkpoints.value_of("validation/loss", lowest=True)
    assert value({"held_out/loss": 1.5}) == value({"validation/loss": 1.5}) == 1.5
    assert value({"held_out/cer": 1.5}) == np.inf


def test_an_older_result_is_loaded(older):
    restored = load_run(older / "whole")
    about = json.loads((older / "whole" / "final" / "about.json").read_text())
    assert "held_out" in about["stage"]
    assert restored.stage.validation.every == 2
    assert restored.stage.best.metric == "validation/loss"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))


def test_older_names_of_objective_and_network_are_read():
    record = dataclasses.asdict(host_runs.stage())
    record["objective"] = "contrast"
    record["parts"]["llm"]["network"] = "contrast.ContrastModel"
    record["held_out"] = record.pop("validation") | {"every": 7}
    record["best"] = {"metric": "held_out/cer", "lowest": True}
    made = parse_stage(record)
    assert made.objective == "blip2_pretraining"
    assert made.parts["llm"].network == "blip2_pretraining.ContrastModel"
    assert (made.validation.every, made.best.metric) == (7, "validation/cer")
    made = parse_stage(record | {"objective": "glm", "options": {"chunk": 8}})
    assert (made.objective, made.options) == ("answer", {"perplexity": True, "chunk": 8})


def test_real_is_the_published_size_of_every_network():
    for name in lookup.choices("xllm_jax.models"):
        sizes = getattr(lookup.module("xllm_jax.models", name), "SIZES", None)
        if sizes and list(sizes) != ["tiny"]:  # the miniature has a head of its own
            published, *others = sizes
            assert published not in ("real", "tiny") and "tiny" in others
            assert lookup.size_row(sizes, "real", "size") == sizes[published]
