"""Runs work that is killed (SIGKILL) where it writes, runs it again, and compares what it leaves.

    python kill_midway.py CASE FOLDER TRIES SEED

prints one line of JSON: {"writes": in all, "tried": [number of the write at which it was killed]}.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "shutil.copyfile")


def tree(folder: Path) -> dict[str, bytes]:
    """{relative path: bytes} of every file below a folder; of a base's arrays, their values.

    Orbax names its files at random.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    bases = [path.parent for path in folder.rglob("params") if path.is_dir()]
    files = [path for path in files if not any(base / "params" in path.parents for base in bases)]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    for base in bases:
        found |= {f"{base.relative_to(folder)}: {k}": v for k, v in leaves(base).items()}
    return found


def leaves(base: Path) -> dict[str, bytes]:
    from xllm_jax.core import checkpoint

    opened = checkpoint.open_leaves(base)
    return {path: store[...].read().result().tobytes() for path, store in opened.items()}


def is_write(event: str, args: tuple, output: str) -> bool:
    """Whether an audit event is about to change something below a folder."""
    if event not in WRITES or not args or not isinstance(args[0], str | os.PathLike):
        return False
    reads = event == "open" and (not isinstance(args[1], str) or not set(args[1]) & set("wax+"))
    return not reads and os.fspath(args[0]).startswith(output)


def watched(work: Callable[[], object], output: Path, last: int, told: int) -> None:
    """Works in this process, which dies before the `last`-th write; tells their number if not."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if is_write(event, args, str(output)):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()
    os.write(told, str(seen).encode())


def forked(work: Callable[[], object], output: Path, last: int = 0) -> int:
    """Works in a child; returns its writes, or 0 where it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            watched(work, output, last, writing)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == (0 if told else -signal.SIGKILL), status
    return int(told or 0)


def main(case: str, folder: str, tries: str, seed: str) -> None:
    cases = importlib.import_module("test_killed_recipes").CASES
    output = Path(folder, "output")

    def work() -> None:
        cases[case](Path(folder), output)

    def kept(name: str) -> Path:
        """Compared when nothing is forked any more: whoever opens a base starts threads."""
        return shutil.move(output, Path(folder, f"kept {name}"))

    count = forked(work, output)
    wanted = kept("whole")
    places = random.Random(int(seed)).sample(range(1, count + 1), min(int(tries), count))
    again = []
    for last in places:
        assert not forked(work, output, last), f"was not killed at write {last} of {count}"
        forked(work, output)
        again.append(kept(str(last)))
    known = tree(wanted)
    for last, folder_again in zip(places, again):
        found = tree(folder_again)
        odd = [name for name in found.keys() | known.keys() if found.get(name) != known.get(name)]
        assert not odd, (last, count, odd)
    print(json.dumps({"writes": count, "tried": places}))


if __name__ == "__main__":
    main(*sys.argv[1:])
