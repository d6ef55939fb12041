"""The console command `xllm`: a name for every command of launch/.

    xllm --help              lists the commands
    xllm COMMAND --help      explains a command and its flags
    xllm COMMAND --FLAG=VALUE …

The module of a command is run as a script: `xllm train` does what `python launch/train.py` does.
Nothing heavy is imported before that, so that the help appears at once.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from xllm_jax.core import interrupts
from xllm_jax.launch import terminal

FOLDER = Path(__file__).parent
# Command and module, in the order in which a newcomer needs them.
COMMANDS = {
    "demo": "demo",
    "train": "train",
    "evaluate": "evaluate",
    "generate": "generate",
    "chat": "chat",
    "serve": "serve",
    "convert": "convert",
    "adapter": "adapter",
    "quantize": "quantize",
    "prepare": "prepare",
    "build-data": "build_data",
    "inspect": "inspect_data",
    "cache": "cache",
    "preflight": "preflight",
    "conformance": "conformance",
    "replay": "replay",
    "ablation": "ablation",
    "world": "world",
    "build-backbones": "build_backbones",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names, with the arguments after it.

    Args:
      argv: the command line without the program's name; `sys.argv` by default.

    Raises:
      SystemExit: with the command's exit code; 2 for an unknown command.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    first = given[0] if given else "--help"
    with terminal.ready():
        if first in ("--help", "-h", "help"):
            print(overview())
        elif first == "--version":
            print(f"xllm_jax {importlib.metadata.version('xllm_jax')}")
        elif first in COMMANDS:
            start(first, given[1:])
        else:
            refuse(first)


def start(name: str, arguments: list[str]) -> None:
    """Runs a command's module as a script; Ctrl-C while it is still being imported is one line."""
    sys.argv = [f"xllm {name}", *arguments]
    interrupts.ready()
    try:
        runpy.run_module(f"xllm_jax.launch.{COMMANDS[name]}", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        print("Stopped. Nothing was begun", file=sys.stderr)
        raise SystemExit(130) from None


def refuse(name: str) -> NoReturn:
    """Prints one line that names the nearest command; exits with 2."""
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Choices: {', '.join(COMMANDS)}"
    print(f"xllm {name}: unknown command. {hint}", file=sys.stderr)
    raise SystemExit(2)


def overview() -> str:
    """The commands with one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary(module)}" for name, module in COMMANDS.items()]
    return "\n".join(
        [
            "usage: xllm COMMAND [--FLAG=VALUE …]",
            "",
            *lines,
            "",
            "xllm COMMAND --help explains a command and its flags.",
        ]
    )


def summary(module: str) -> str:
    """First line of a module's docstring, read without importing it."""
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{module}.py").read_text("utf-8")))
    return (docstring or "").partition("\n")[0]


if __name__ == "__main__":
    main()
