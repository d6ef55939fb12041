"""`xllm serve`: what is wrong with its flags is told before anything large is read."""

from __future__ import annotations

import sys

import pytest
import small_runs
from absl import flags

from xllm_jax.core.errors import UserError
from xllm_jax.launch import serve
from xllm_jax.serve import app

KEY = "sk-0123456789abcdef"


@pytest.fixture
def given(monkeypatch):
    """Sets flags for one test."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1] + ["--checkpoint=none"])

    def give(**values):
        for name, value in values.items():
            monkeypatch.setattr(flags.FLAGS[name], "value", value)

    return give


def test_other_machines_need_a_key(given, tmp_path):
    given(host="0.0.0.0", api_key_file="", open=False)
    with pytest.raises(UserError, match="lets other machines ask"):
        serve.who()
    given(open=True)
    assert not serve.who().required
    (tmp_path / "keys").write_text(f"{KEY}\n")
    given(open=False, api_key_file=str(tmp_path / "keys"))
    assert serve.who().allow(KEY) and serve.who().required
    given(api_key_file=str(tmp_path / "none"))
    with pytest.raises(UserError, match="--api_key_file"):
        serve.who()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_none(given, host):
    given(host=host, api_key_file="", open=False)
    assert not serve.who().required


def test_the_names_that_it_may_be_called_by(given):
    given(host="127.0.0.1", server_names=["GPU1.example.org"], open=False)
    assert serve.called().hosts == app.LOOPBACK | {"gpu1.example.org"}
    given(host="0.0.0.0", server_names=[], open=True)
    assert "*" in serve.called().hosts
    given(open=False)
    assert "*" not in serve.called().hosts


def test_limits_come_from_flags(given):
    given(max_body=1.5, max_files=3, deadline=7.0)
    found = serve.limits()
    assert (found.body, found.medium, found.bodies) == (1_500_000, 1_500_000, 12_000_000)
    assert (found.media, found.decode_seconds) == (3, 7.0)


def test_no_run_and_no_libraries(given, tmp_path, monkeypatch):
    given(checkpoint=str(tmp_path), host="127.0.0.1", port=0)
    with pytest.raises(UserError, match="no finished run here"):
        serve.main([])
    monkeypatch.setattr(serve, "NEEDS", ("no_such_package",))
    with pytest.raises(UserError, match=r"pip install -e '.\[serve\]'"):
        serve.main([])


def test_files_of_a_run_are_decoded_within_a_deadline(tmp_path):
    """Whatever the stage was trained with: 0 there means without workers."""
    from xllm_jax.inference import load_run
    from xllm_jax.inference.load_run import Restored
    from xllm_jax.serve.limits import Limits

    stage = load_run.stage_of(small_runs.stage3(tmp_path))
    found = serve.within_deadline(Restored(None, {}, stage), Limits(decode_seconds=3))
    assert (found.stage.data.deadline, found.stage.data.threads) == (3, 2)
