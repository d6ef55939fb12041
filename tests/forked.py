"""Python processes that start as forks of one that has imported what commands import.

Importing JAX and its neighbors takes two seconds of a core, more than most commands do after that.
`Popen` and `run` are those of `subprocess`. What they start has a number, folder, variables, pipes
and an end of its own, and is a child of this process like any other; only the imports are done.
Where a command asks for more than that, such as other options of Python, it starts as usual.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import restricted

ROOT = Path(__file__).parents[1]
PRELOADED = ("assembly", "training", "inference", "data", "feature_cache", "evaluation", "report")
# Read while JAX or Python starts: another value is another start.
EARLY = ("JAX_", "PYTHON", "LD_", "MALLOC_", "OMP_", "OPENBLAS_")
LATER = {"JAX_PLATFORMS": "jax_platforms"}  # what can be set afterwards, too
UNHEEDED = ("PYTHONPATH", "PYTHONUNBUFFERED")
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)


class Popen(subprocess.Popen):
    """`subprocess.Popen` of a Python process."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        names = (
            "startupinfo creationflags shell p2cread p2cwrite c2pread c2pwrite errread errwrite "
            "restore_signals gid gids uid umask start_new_session process_group"
        )
        given = dict(zip(names.split(), rest, strict=True))
        words = [os.fspath(word) for word in args] if not isinstance(args, str) else []
        variables = dict(os.environ if env is None else env)
        usual = (executable, preexec_fn, given["shell"], pass_fds, given["gid"], given["uid"])
        server = None
        if not any(x not in (None, False, ()) for x in usual) and plain(words):
            server = parent(variables)
        if server is None:
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest
            )
        ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        asked = {
            "words": words[1:],
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": variables,
            "session": given["start_new_session"],
        }
        self.pid = server.start(asked, [end if end >= 0 else n for n, end in enumerate(ends)])
        self._child_created = True
        pipes = ["p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"]
        self._close_pipe_fds(*(given[name] for name in pipes))


def run(*arguments, **options) -> subprocess.CompletedProcess:
    """`subprocess.run` of a Python process."""
    with mock.patch.object(subprocess, "Popen", Popen):
        return subprocess.run(*arguments, **options)


def xllm(
    *arguments: str, cwd: Path = ROOT, typed: str | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """What a command prints, `xllm ARGUMENTS`, with these variables beside those of the test.

    Args:
      arguments: of the command.
      cwd: its folder.
      typed: what its user types, if it reads that.
      variables: of its environment.
    """
    return run(
        [sys.executable, "-m", "xllm_jax.launch.commands", *arguments],
        input=typed,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | variables,
    )


def plain(words: list[str]) -> bool:
    """Whether this is `python [-u] -c CODE …`, `python [-u] -m MODULE …` or `python FILE.py …`."""
    if not words or words[0] != sys.executable:
        return False
    rest = [word for word in words[1:] if word != "-u"]
    return (len(rest) > 1 and rest[0] in ("-c", "-m")) or (bool(rest) and rest[0].endswith(".py"))


class Server:
    """The process that has imported everything, and `before` that some modules, and forks."""

    def __init__(self, before: Iterable[str] = ()):
        self.variables = dict(os.environ)
        self.link, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno()), *before],
                pass_fds=[other.fileno()],
                cwd=ROOT,
                env=self.variables | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
            )
        self.link.settimeout(600)

    def start(self, asked: dict, ends: list[int]) -> int:
        """The number of a new child of this process, whose standard streams are `ends`."""
        prctl = ctypes.CDLL(None).prctl
        # The fork's own parent ends at once: the child goes to the nearest process that takes it.
        prctl(SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self.link, [json.dumps(asked).encode()], ends)
            return int(self.link.recv(64))
        finally:
            prctl(SUBREAPER, 0, 0, 0, 0)

    def stop(self) -> None:
        """Ends the process that forks."""
        self.link.close()
        self.process.wait(60)


@contextlib.contextmanager
def imported(*before: str) -> Iterator[None]:
    """Within it processes are forks of one that imported these modules first."""
    made = Server(before)
    try:
        with mock.patch(f"{__name__}._server", lambda: made):
            yield
    finally:
        made.stop()


@functools.cache
def _server() -> Server:
    made = Server()
    atexit.register(made.stop)
    return made


def parent(variables: dict[str, str]) -> Server | None:
    """Who forks a process with these variables; None if they have to be there from its start."""
    made = _server()
    for name in variables.keys() | made.variables.keys():
        early = name.startswith(EARLY) and name not in (*LATER, *UNHEEDED)
        if early and variables.get(name) != made.variables.get(name):
            return None
    return made


def preload(before: Iterable[str]) -> None:
    """Imports modules, then what commands import, except for what they define their flags in."""
    gc.disable()  # there is nothing to find in what stays
    for name in before:
        importlib.import_module(name)
    for name in PRELOADED:
        package = importlib.import_module(f"xllm_jax.{name}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


def serve(link: socket.socket) -> dict:
    """Forks for each request; returns what a child has been asked for, in this child."""
    while True:
        content, ends, _, _ = socket.recv_fds(link, 1 << 20, 3)
        if not content:
            raise SystemExit
        read, write = os.pipe()
        first = os.fork()
        if not first:
            between = os.getpid()
            second = os.fork()
            if second:
                os.write(write, str(second).encode())
                os._exit(0)
            for end in (read, write, link.detach()):
                os.close(end)
            while os.getppid() == between:
                time.sleep(0.001)
            return become(json.loads(content), ends)
        os.waitpid(first, 0)
        link.send(os.read(read, 64))
        for end in (read, write, *ends):
            os.close(end)


def become(asked: dict, ends: list[int]) -> dict:
    """Takes folder, variables and streams of what was asked for."""
    if asked["session"]:
        os.setsid()
    for number, end in enumerate(ends):
        os.dup2(end, number)
        os.close(end)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    open_streams(at_once=asked["words"][0] == "-u" or bool(os.environ.get("PYTHONUNBUFFERED")))
    import jax

    for name, setting in LATER.items():
        jax.config.update(setting, os.environ.get(name))
    return asked


def open_streams(at_once: bool) -> None:
    """Text streams over the descriptors, as Python makes them when it starts."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode = "w" if number else "r"
        file = open(number, f"{mode}b", 0 if number and at_once else -1, closefd=False)  # noqa: SIM115
        old = getattr(sys, name)
        lines = bool(number) and (number == 2 or file.isatty())
        told = {"encoding": old.encoding, "errors": old.errors, "line_buffering": lines}
        made = io.TextIOWrapper(file, **told, write_through=bool(number) and at_once)
        setattr(sys, name, made)
        setattr(sys, f"__{name}__", made)


def execute(words: list[str]) -> None:
    """Does what `python WORDS` does."""
    words = [word for word in words if word != "-u"] if words[0] == "-u" else words
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:2] = ["", *filter(None, folders)]
    if words[:2] == ["-c", restricted.RESTRICT]:
        restrict(int(words[2]))
        words = words[4:]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = ["-m", *words[2:]]
        runpy._run_module_as_main(words[1])  # what `python -m` calls
    else:
        sys.path[0] = str(Path(words[0]).resolve().parent)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def restrict(limit: int) -> None:
    """What `restricted.RESTRICT` does before it becomes the command."""
    import resource

    import jax

    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if limit != resource.RLIM_INFINITY:
        jax.config.update("jax_enable_compilation_cache", False)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preload(sys.argv[2:])
        asked = serve(socket.socket(fileno=int(sys.argv[1])))
    execute(asked["words"])
