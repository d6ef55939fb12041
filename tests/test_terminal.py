"""What commands print on terminals of any encoding, into closed pipes, and what is typed there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.launch import chat, terminal

ROOT = Path(__file__).parents[1]
PRINTS = """
import sys
from xllm_jax.launch import cli
def main(_):
    for number in range(20000):
        print(number, "笑脸😊", "\\udcff", "\\x1b]0;title\\x07", "\\u202e.gpj")
    print("done", file=sys.stderr)
cli.run(main)
"""


def command(*words: str, encoding: str = "utf-8", **options) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONIOENCODING": encoding, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, **pipes | options)


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "latin-1", "utf-8"])
def test_what_the_terminal_cannot_show_is_replaced(encoding):
    process = command("-c", PRINTS, encoding=encoding)
    out, err = process.communicate()
    assert process.returncode == 0 and err == b"done\n"
    first = out.decode(encoding).splitlines()[0]
    expected = {"gbk": "0 笑脸? ? ?]0;title? ?.gpj", "utf-8": "0 笑脸😊 ? �]0;title� �.gpj"}
    assert first == expected.get(encoding, "0 ??? ? ?]0;title? ?.gpj")
    assert out.count(b"\n") == 20000 and b"\x1b" not in out


SAID = {
    "a command": ("-c", PRINTS),
    "overview": ("-m", "xllm_jax.launch.commands", "--help"),
    "help": ("-m", "xllm_jax.launch.commands", "replay", "--help"),
    "script": ("launch/replay.py", "--help"),
}


CODES = (0, terminal.UNHEARD)  # absl itself ends --help with 0


@pytest.mark.parametrize("name", SAID)
def test_a_closed_pipe_ends_the_command_without_a_word(name):
    with command(*SAID[name]) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() in CODES
    with command(*SAID[name], stderr=subprocess.STDOUT) as process:
        process.stdout.close()
        assert process.wait() in CODES


def test_another_broken_pipe_is_no_closed_output():
    """It is a defect, and keeps its traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError), terminal.ready():
        os.write(writer, b"x")
    os.close(writer)


def test_streams_are_themselves_again_afterwards():
    before = sys.stdin, sys.stdout, sys.stderr
    with terminal.ready():
        assert sys.stdout.encoding == before[1].encoding
    assert (sys.stdin, sys.stdout, sys.stderr) == before
    out = io.StringIO()
    terminal.Plain(out).write("a\x1b[2J\x9b\tb\r\n\u2066")
    assert out.getvalue() == "a�[2J�\tb\r\n�"


QUESTION = "图中有什么？"


@pytest.mark.parametrize(
    ("bytes_", "encoding"),
    [(QUESTION.encode(), "gbk"), (QUESTION.encode("gbk"), "gbk"), (QUESTION.encode(), "utf-8")],
)
def test_a_prompt_is_read_by_the_locale(bytes_, encoding, monkeypatch):
    """Bytes that Python could not decode, as under PYTHONUTF8=1 in a GBK terminal."""
    monkeypatch.setattr("locale.getencoding", lambda: encoding)
    if bytes_ == QUESTION.encode() and encoding == "gbk":
        typed = bytes_.decode()
    else:
        typed = bytes_.decode("utf-8", "surrogateescape")
    assert terminal.decoded(typed, "--prompt") == QUESTION


@pytest.mark.parametrize("typed", [QUESTION.encode("gbk"), b"\xff", b"\xed\xa0\x80"])
def test_bytes_of_another_encoding_are_refused_in_one_line(typed, monkeypatch):
    monkeypatch.setattr("locale.getencoding", lambda: "utf-8")
    with pytest.raises(UserError, match="not written in utf-8") as caught:
        terminal.decoded(typed.decode("utf-8", "surrogateescape"), "--prompt")
    assert caught.value.field == "--prompt" and "LC_ALL" in caught.value.hint
    said = []
    lines = iter([typed.decode("utf-8", "surrogateescape"), "好"])
    chat.converse(lines, lambda example: f"{example.instruction}！", said.append, 1)
    assert len(said) == 2 and "not written" in said[0] and said[1] == "好！"


def test_the_command_refuses_such_a_prompt(tmp_path):
    words = (b"--prompt=" + QUESTION.encode("gbk"), b"--checkpoint=" + os.fsencode(tmp_path))
    process = command("launch/generate.py", *words)
    _, err = process.communicate()
    assert process.returncode == 2 and err.count(b"\n") == 1
    assert err.startswith(b"--prompt: is not written in")
