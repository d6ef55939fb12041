"""Targets of alignment from the feature cache: the same losses, no text encoder, stale caches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import small_cache
import small_outputs
from small_stage import curve

from xllm_jax.assembly.system import System
from xllm_jax.core import mesh
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Validation
from xllm_jax.data import cached_features
from xllm_jax.feature_cache import cache_plan, check, write
from xllm_jax.training import loop


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a small stage of alignment, the folder of the cache of its captions)."""
    folder = tmp_path_factory.mktemp("captions")
    stage = small_outputs.stage(folder, steps=3)
    stage = small_cache.based(stage, folder)
    plan = cache_plan.make(stage, folder / "cache", "configs/small.py", 4)
    assert write.run(plan, 4) is not None
    return stage, folder / "cache"


def test_every_caption_is_kept_once(made):
    _, cache = made
    about = cached_features.manifest(cache)["modalities"]
    assert list(about) == ["image_captions"] and about["image_captions"]["steps"] == 1
    assert about["image_captions"]["media"] == len(set(small_outputs.CAPTIONS))
    assert about["image_captions"]["shape"] == [small_outputs.TOKENS, 12]
    assert {path.split("/")[0] for path in cached_features.manifest(cache)["base"]} == {
        "text_encoder"
    }


def test_losses_are_those_without_a_cache_and_no_text_encoder_is_there(made, tmp_path):
    stage, cache = made
    (cache.parent / "captions" / "val.tsv").write_text(
        "filepath\ttitle\n0.jpg\t红色的圆\n", "utf-8"
    )
    sources = {"said": dataclasses.replace(stage.data.sources["captions"], split="val")}
    held_out = Validation(sources, examples=4, every=3)  # computed: the cache is of training
    plain = dataclasses.replace(stage, validation=held_out)
    loop.fit(plain, tmp_path / "plain")
    cached = small_cache.changed(plain, cache=str(cache))
    assert not any(path.startswith("text_encoder") for path in System.build(cached).shapes)
    loop.fit(cached, tmp_path / "cached")
    for name in ("loss", "distance/image", "validation/distance/image"):
        without, with_it = (curve(tmp_path / run, name) for run in ("plain", "cached"))
        assert without and without.keys() == with_it.keys()
        np.testing.assert_allclose(list(with_it.values()), list(without.values()), rtol=1e-5)


def trained_text(stage):
    return dataclasses.replace(stage, trainable=(*stage.trainable, "text_encoder/.*"))


def shorter(stage):
    stage = small_cache.changed(stage, caption_length=6)
    fields = stage.parts["image_projection"].fields | {"queries": 6}
    part = dataclasses.replace(stage.parts["image_projection"], fields=fields)
    return dataclasses.replace(stage, parts=stage.parts | {"image_projection": part})


def other_base(stage):
    return dataclasses.replace(stage, init=stage.init | {"text_encoder": ""})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (trained_text, "trainable"),
        (shorter, "data.caption_length"),
        (other_base, "init.text_encoder"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(made, change, field):
    stage, cache = made
    stage = small_cache.changed(change(stage), cache=str(cache))
    with pytest.raises(UserError) as error:
        check.verified(System.build(stage, mesh.make({})))
    assert error.value.field == field and "cache" in str(error.value)


def test_another_tokenizer_is_named(made, tmp_path):
    stage, cache = made
    place = small_outputs.tokenizer(tmp_path / "tokenizer")
    moved = small_cache.changed(stage, cache=str(cache), caption_tokenizer=place)
    assert check.verified(System.build(moved, mesh.make({})))  # the same, elsewhere
    with open(f"{place}/merges.txt", "a") as file:
        file.write("r e\n")
    with pytest.raises(UserError) as error:
        check.verified(System.build(moved, mesh.make({})))
    assert error.value.field == "data.caption_tokenizer"
