"""Mistakes on the command line of training: one line that names the hint, exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import forked
import pytest

from xllm_jax.configs import stage2_image, stage2_speech
from xllm_jax.core.errors import UserError
from xllm_jax.data import mixture
from xllm_jax.launch import dict_overrides

ROOT = Path(__file__).parents[1]
CONFIG = "--config=configs/stage2_image.py:tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/stage2_imag.py"], ["Did you mean configs/stage2_image.py?"]),
        (["--config=stage2_imag:tiny"], ["no such stage", "Did you mean stage2_image?"]),
        (["--config=configs/stage2_image.py:small"], ["'small'", "real or tiny"]),
        ([CONFIG, "--config.optimizer.peek=1"], ["--config.optimizer.peek", "Did you mean peak?"]),
        ([CONFIG, "--config.data.mix.captons=0"], ["captons", "captions"]),
        ([CONFIG, "--config.steps=many"], ["--config.steps", "many"]),
        (["--config=configs/stage2_image.py", "--config.data.mix.cc3=0"], ["Did you mean cc3m?"]),
        ([CONFIG, "--config.init.llm/layers=none"], ["world/coco"]),
        ([CONFIG, "--config.steps.more=1"], ["--config.steps.more"]),
        ([CONFIG, "--wrkdir=x"], ["--wrkdir", "Did you mean --workdir?"]),
        ([CONFIG, "more"], ["unexpected argument 'more'"]),
        ([CONFIG], ["--workdir", "required"]),
        (["--workdir=x"], ["--config", "required"]),
    ],
)
def test_a_mistake_is_one_line(arguments, words, tmp_path):
    workdir = [] if "required" in words else [f"--workdir={tmp_path / 'run'}"]
    done = forked.run(
        [sys.executable, "launch/train.py", *arguments, *workdir],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and done.stdout == "", done.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert not (tmp_path / "run").exists()


def given(module, *tokens, size="real"):
    """(the configuration with the settings that were taken, the tokens that were left)."""
    config = module.get_config(size)
    rest, settings = dict_overrides.take(tokens, {"config": config})
    for setting in settings:
        setting.apply(config)
    return config, rest


def test_sources_are_left_out_where_no_weights_are_given():
    config, rest = given(stage2_image, "--config.data.mix.cc3m=0", "--config.steps=3")
    assert rest == ["--config.steps=3"]
    everything = mixture.mixture(stage2_image.get_config().data)
    assert mixture.mixture(config.data) == {n: w for n, w in everything.items() if n != "cc3m"}


def test_options_and_subtrees_get_names_that_the_configuration_lacks():
    config, rest = given(
        stage2_speech,
        "--config.init.speech_interface/c_former/bert=bases/bert:bert*",
        "--config.data.sources.aishell2.options.more=('a', 2)",
        "--config.parts.speech_interface.fields.max_tokens=48",
    )
    assert rest == []
    assert config.init["speech_interface/c_former/bert"] == "bases/bert:bert*"
    assert config.data.sources["aishell2"].options["more"] == ("a", 2)
    assert config.parts["speech_interface"].fields["max_tokens"] == 48


def test_what_the_configuration_has_goes_the_usual_way():
    tokens = ["--config.data.mix.captions=0", "--config.optimizer.peek=1", "--workdir=x", "more"]
    config, rest = given(stage2_image, *tokens, size="tiny")
    assert rest == tokens and config == stage2_image.get_config("tiny")


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("--config.data.mix.cc3=0", "Did you mean cc3m?"),
        ("--config.data.mix.cc3m=little", "'little' is no weight"),
    ],
)
def test_weights_are_numbers_of_sources(token, words):
    with pytest.raises(UserError, match=words):
        given(stage2_image, token)
