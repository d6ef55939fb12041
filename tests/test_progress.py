"""Progress in a terminal is a bar, elsewhere a line at most once a minute and one at the end."""

from __future__ import annotations

import io

import pytest

from xllm_jax.core import progress
from xllm_jax.core.log import Log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_kept_output_gets_a_line_a_minute_and_one_at_the_end(clock):
    out = io.StringIO()
    with progress.Bar(total=600, desc="job", unit="step", file=out, mininterval=0) as bar:
        for step in range(600):
            clock[0] += 0.5
            bar.set_postfix_str(f"loss={step}")
            bar.update()
            if step == 100:
                bar.write("a word", file=out)
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue() and lines.pop(0) == "a word"
    assert len(lines) == 6  # 300 s, and the end
    assert lines[0].startswith("job: 119/600") and lines[-1].startswith("job: 600/600")
    assert "loss=599" in lines[-1]


def test_a_terminal_keeps_its_bar(clock):
    out = Terminal()
    with progress.Bar(total=20, desc="job", file=out, mininterval=0) as bar:
        for _ in range(20):
            bar.update()
    assert out.getvalue().count("\r") >= 20 and "100%" in out.getvalue()


def test_an_iteration_and_an_unknown_total(clock):
    out = io.StringIO()
    assert list(progress.Bar(range(3), "read", file=out)) == [0, 1, 2]
    with progress.Bar(desc="files", file=out) as bar:
        bar.update(7)
    first, second = out.getvalue().splitlines()
    assert first.startswith("read: 3/3") and second.startswith("files: 7/")


def test_a_run_says_where_it_ends(tmp_path, capsys):
    log = Log(tmp_path, "stage", 40, 0)
    for step in range(1, 41):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stage: 40/40") and "loss=0.025" in line
