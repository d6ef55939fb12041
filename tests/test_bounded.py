"""Configurations, states and annotations that are larger than any: refused before they are read."""

from __future__ import annotations

import json
import os
import resource

import pytest

from xllm_jax.convert import bounds, conversion_record
from xllm_jax.convert.verify import recording
from xllm_jax.core import base_description, bounded, damage, sharded_job
from xllm_jax.core.errors import UserError
from xllm_jax.data import cached_features
from xllm_jax.data.rows import json_text, verified
from xllm_jax.data.sources import layout
from xllm_jax.data.text import characters, chatglm_tokenizer, wordpiece
from xllm_jax.prepare import translators

HOLE = 6 << 30  # bytes
STATES = {
    "about.json": lambda file: base_description.base_about(file.parent),
    "conversion.json": lambda file: base_description.base_origin(file.parent),
    "conversion.json of the record": lambda file: conversion_record.read(file.parent),
    "metadata": damage.read_object,
    "plan.json": sharded_job.known,
    "shards/x-00000.json": lambda file: sharded_job.Shards(file.parents[1], "x", 1, 1).finished(0),
    "shards/y-00000.json": lambda file: sharded_job.Shards(file.parents[1], "y", 1, 1).notes(),
    "manifest.json": lambda file: verified.check(file.parent, "train"),
    cached_features.MANIFEST + " of a cache": lambda file: cached_features.manifest(file.parent),
    "config.json": bounds.read_json,
    "tokenizer_config.json": chatglm_tokenizer._read_json,
    "vocab.txt": wordpiece.WordPiece,
    "characters.txt": characters.CharacterVocabulary.load,
    "settings.json": recording.read_json,
    "kept/0.json": lambda file: translators.known(file.parent),
    "selection.json": layout.read_json,
    "captions.txt": layout.read_text,
}


@pytest.mark.parametrize("name", STATES)
def test_a_large_state_is_refused_by_its_size(name, tmp_path):
    file = tmp_path / name.partition(" ")[0]
    file.parent.mkdir(exist_ok=True)
    with file.open("wb") as opened:
        opened.truncate(HOLE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="bytes") as told:
        STATES[name](file)
    assert told.value.field == str(file)
    assert "\n" not in str(told.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # kB


def test_nobody_waits_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "about.json")
    with pytest.raises(UserError, match="no regular file"):
        damage.read_object(tmp_path / "about.json")


def test_many_values_are_no_state(tmp_path, monkeypatch):
    file = tmp_path / "about.json"
    file.write_text(json.dumps({"a": [{}] * 50}))
    assert len(damage.read_object(file)["a"]) == 50
    monkeypatch.setattr(bounded, "MOST_SIGNS", 50)
    with pytest.raises(UserError, match=r"about\.json: is damaged .*too many values"):
        damage.read_object(file)


def test_many_values_are_no_annotation(monkeypatch):
    text = json.dumps([[]] * 50)
    assert len(json_text.parsed(text, "x")) == 50
    monkeypatch.setattr(json_text, "MOST_SIGNS", 50)
    with pytest.raises(UserError, match=r"^x: has more than 50 values\. Cut it"):
        json_text.parsed(text, "x")
