"""How every command starts and fails: a user's mistake is one line and exit code 2."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import difflib
import functools
import importlib
import json
import math
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from xllm_jax.core import disk, errors, interrupts, limits, memory_allocator, words
from xllm_jax.core.errors import Diverged, UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.suite import Suite
from xllm_jax.launch import auto_value, compiled, dict_overrides, terminal

# Exit codes. 0: done. After SAVED and LOST the same command continues the run; after FAILED and
# DIVERGED it would fail again, after UNWRITABLE until there is room.
FAILED = 2  # a user's mistake
UNWRITABLE = errors.UNWRITABLE  # 74, the disk is full or read-only
DIVERGED = 3  # the loss is not a number, or has left its path
SAVED = errors.SAVED  # 75, SIGTERM: what there was to save is saved
LOST = errors.LOST  # 76, a host stalled or was lost
STOPPED = 130  # Ctrl-C
LARGEST_STAGE = 1 << 20  # bytes of a stage file
MESSAGE = 200  # characters of a library's message that are shown
LINE = 2000  # characters of a line on stderr
MOST = 2**31 - 1  # of an integer

ALLOW_PATHS = flags.DEFINE_multi_string(
    "allow_paths",
    [],
    "Folder that a data set's files may lie in, beyond data.root and the set's own folder; may be "
    "repeated.",
)
T = TypeVar("T")

HELP = ("--help", "-help", "-h", "-?")
STAGE_HELP = (
    "Stage to run: the name of a packaged one, such as stage2_image, or the path of a file that "
    "defines get_config. NAME:tiny takes the size of the demo."
)


def run(
    main: Callable[[list[str]], object],
    safe: str | Callable[[], str] = "",
    kind: type[Stage] | type[Suite] = Stage,
    arguments: bool = False,
) -> NoReturn:
    """Parses the flags and calls `main` with what is left of the command line.

    Exits with 0, with what `main` returns, with 2 after a user's mistake (one line on stderr that
    names file or field and the hint), with 3 when a run diverges, with 74 where something cannot be
    written, with 130 after Ctrl-C, or with 141 when who reads the output has gone. Other exceptions
    keep their traceback: they are defects.

    Args:
      main: the command.
      safe: a sentence on what is intact when it cannot write or is stopped; '' for one that writes
        no files.
      kind: what the command's configurations are.
      arguments: whether words that are no flags may follow the command.
    """
    kept = safe if callable(safe) else lambda: safe
    memory_allocator.keep_freed_memory()
    compiled.keep()
    interrupts.ready()
    disk.say_once()
    with terminal.ready():
        try:
            app.run(
                lambda argv: guard(main, argv, kept),
                flags_parser=functools.partial(parse, kind=kind, arguments=arguments),
            )
        except KeyboardInterrupt:
            interrupts.ignore()
            stop(f"Stopped. {kept()}")


def guard(main: Callable[[list[str]], T], argv: list[str], safe: Callable[[], str] = str) -> T:
    """Calls `main`, turning what a user may read into its line.

    Libraries report warnings only, unless --verbosity or `main` says otherwise.

    Args:
      main: the command.
      argv: what is left of the command line.
      safe: what is intact, in a sentence or ''.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        with disk.told(safe):
            result = main(argv)
            with disk.writing("standard output"):
                sys.stdout.flush()
        return result
    except UserError as error:
        fail(str(error), getattr(error, "code", FAILED))
    except Diverged as error:
        fail(str(error), DIVERGED)
    except OSError as error:
        if safe() and terminal.unheard(error):
            with contextlib.suppress(OSError):
                print(f"Nobody reads the output any more. {safe()}", file=sys.stderr, flush=True)
        raise


def parse(
    argv: Sequence[str], kind: type[Stage] | type[Suite] = Stage, arguments: bool = False
) -> list[str]:
    """Parses absl flags; a wrong one ends the program with one line.

    `--help` prints the command's docstring and flags, and exits with 0.
    """
    if any(token in HELP for token in argv[1:]):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    try:
        argv = locate_stages(with_flag_files(argv))
        configs = configurations(argv)
        given, settings = dict_overrides.take(auto_value.take(argv, configs), configs)
        check_names(given, configs)
        rest = parsed(given)
        check_numbers()
        for setting in settings:
            setting.apply(flags.FLAGS[setting.flag].value)
        for name in configs:
            check_settings(name, flags.FLAGS[name].value, kind)
            allow_paths(flags.FLAGS[name].value)
        if len(rest) > 1 and not arguments:
            raise UserError(f"unexpected argument {rest[1]!r}", hint="Flags start with --")
        return rest
    except UserError as error:
        fail(str(error))
    except flags.Error as error:
        fail(format_message(error))


def with_flag_files(argv: Sequence[str]) -> list[str]:
    """The command line with the lines of every --flagfile in its place.

    Configurations look at the command line before absl would read these files.

    Raises:
      UserError: one cannot be read.
    """
    try:
        return [argv[0], *flags.FLAGS.read_flags_from_files(list(argv[1:]))]
    except UnicodeDecodeError:
        raise UserError("is no file of flags", field="--flagfile") from None
    except (flags.Error, OSError) as error:
        what = f"cannot be read ({error.__cause__ or error})"[:MESSAGE]
        raise UserError(what, field="--flagfile", hint="Give a file with a flag a line") from None


def check_numbers() -> None:
    """Looks at the numbers of all flags: absl takes NaN for one within any bounds.

    Raises:
      UserError: one is not finite, or an integer beyond 32 bits.
    """
    for flag in (flags.FLAGS[name] for name in flags.FLAGS if "." not in name):
        for value in flag.value if isinstance(flag.value, list) else [flag.value]:
            odd = isinstance(value, float) and not math.isfinite(value)
            if odd or (isinstance(value, int) and abs(value) > MOST):
                hint = f"Give a number up to {MOST:,}".replace(",", "_")
                raise UserError(
                    f"cannot be {words.shown(value)}", field=f"--{flag.name}", hint=hint
                )


def check_settings(flag: str, made: object, kind: type[Stage] | type[Suite] = Stage) -> None:
    """Looks at the values of a stage or suite before anything heavy is imported.

    Raises:
      UserError: `get_config` gave another thing, or a field holds what it cannot.
    """
    if not isinstance(made, kind):
        what = f"get_config gives a {type(made).__name__}"
        raise UserError(what, field=f"--{flag}", hint=f"Let it return a {kind.__name__}")
    limits.check(made)


def allow_paths(made: Stage | Suite) -> None:
    """Lets the sources of a stage or suite read the folders of --allow_paths."""
    if isinstance(made, Suite):
        sources = [*made.sets.values()]
    else:
        sources = [*made.data.sources.values(), *made.validation.sources.values()]
    for source in sources:
        source.allow_paths = (*source.allow_paths, *ALLOW_PATHS.value)


def parsed(argv: list[str]) -> list[str]:
    """What absl leaves of a command line; a configuration's flag reads `sys.argv` by itself.

    Raises:
      UserError: a value that a configuration's field cannot be given; names the flag.
    """
    whole, sys.argv = sys.argv, argv
    try:
        return flags.FLAGS(argv)
    except flags.Error:
        raise
    except Exception as error:  # ml_collections raises whatever a value makes it raise
        names = [token.partition("=")[0] for token in argv[1:] if override(token)]
        what = f"cannot be set to this value ({type(error).__name__}: {error})"[:MESSAGE]
        raise UserError(what, field=" or ".join(names) or "command line") from error
    finally:
        sys.argv = whole


def fail(line: str, code: int = FAILED) -> NoReturn:
    """Prints one line on stderr, or none, and leaves; too long a word of the user is cut."""
    line = re.sub(rf"\S{{{MESSAGE},}}", lambda word: f"{word[0][:60]}…", line)
    line = " ".join(line.split())
    line = line if len(line) <= LINE else f"{line[:LINE]}…"
    for stream, text in ((sys.stdout, ""), (sys.stderr, line)):
        try:
            print(text, end="\n" if text else "", file=stream, flush=True)
        except OSError:  # Python would try again at the end, and print a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(code)


def stop(line: str) -> NoReturn:
    """Prints one line on stderr and leaves at once, with `STOPPED`.

    Threads of JAX that still run abort the process (SIGABRT) while Python ends, and one that Ctrl-C
    left amid a decoder or a save would be waited for without end.
    """
    try:
        fail(line, STOPPED)
    finally:
        atexit._run_exitfuncs()  # end worker processes, remove temporary folders
        os._exit(STOPPED)


def format_message(error: flags.Error) -> str:
    """absl's message with the nearest flag or the hint in our order."""
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        known = sorted(flags.FLAGS.get_key_flags_for_module(sys.argv[0]), key=lambda f: f.name)
        names = [flag.name for flag in known]
        return f"--{name}: unknown flag. {nearest(name, names, '--')}"
    text = str(error)
    if "must have a value other than None" in text:
        name = text.split("=")[0].removeprefix("flag --")
        return f"--{name}: this flag is required. {flags.FLAGS[name].help}"
    return text.removeprefix("flag ")


def json_object(text: str, field: str, hint: str = "") -> dict[str, Any]:
    """The JSON object that a flag or a file holds.

    Args:
      text: JSON.
      field: flag or file, for the error.
      hint: an example.

    Raises:
      UserError: it is none.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"no JSON object ({error})", field=field, hint=hint) from None
    if not isinstance(found, dict):
        what = f"no JSON object (is {type(found).__name__})"
        raise UserError(what, field=field, hint=hint)
    return found


def nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    """'Did you mean …?' or, where nothing is near, the choices."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean {prefix}{near[0]}?"
    if not known:
        return "It has none below it"
    return f"Choices: {', '.join(prefix + choice for choice in known)}"


def config_flag_names() -> list[str]:
    """Names of the flags that hold a configuration file."""
    return [name for name in flags.FLAGS if config_flags.is_config_flag(flags.FLAGS[name])]


def join_values(argv: Sequence[str]) -> list[str]:
    """Writes `--config STAGE` as `--config=STAGE`; other flags stay as they are."""
    names = {f"{dash}{name}" for name in config_flag_names() for dash in ("-", "--")}
    tokens, found = iter(argv), []
    for token in tokens:
        value = next(tokens, None) if token in names else None
        found.append(token if value is None else f"{token}={value}")
    return found


def config_files(argv: Sequence[str]) -> dict[str, str]:
    """{name: STAGE[:variant]} of the configuration flags on the command line."""
    names, found = config_flag_names(), {}
    for token in join_values(argv)[1:]:
        name, _, value = token.lstrip("-").partition("=")
        if token.startswith("-") and name in names and value:
            found[name] = value
    return found


def locate_stages(argv: Sequence[str]) -> list[str]:
    """The command line with the path of its file for every configuration.

    Raises:
      UserError: there is no such stage or file; names the nearest.
    """
    asked = config_files(argv)
    found = {f"{name}={value}": f"--{name}={locate(name, value)}" for name, value in asked.items()}
    return [found.get(token.lstrip("-"), token) for token in join_values(argv)]


def locate(flag: str, value: str) -> str:
    """FILE[:variant] of a configuration that the user named by its path or its name."""
    text, colon, variant = value.partition(":")
    path, packaged = Path(text), packaged_stages()
    if os.path.isfile(path):  # False, too, for names that no file system knows
        return value
    if text in packaged:
        return f"{packaged[text]}{colon}{variant}"
    if path.suffix or path.name != text:
        known: list[str] = []
        with contextlib.suppress(OSError, ValueError):  # of a folder's name as well
            known = sorted(str(file) for file in path.parent.glob("*.py"))
        hint = nearest(text, known) if known else "Give the path of a stage file"
        raise UserError(f"no such file: {text}", field=f"--{flag}", hint=hint)
    raise UserError(f"no such stage: {text}", field=f"--{flag}", hint=nearest(text, packaged))


def packaged_stages() -> dict[str, Path]:
    """{name: file} of the stages that ship with the package, by name."""
    files = sorted(packaged_folder().glob("[!.]*.py"))  # macOS leaves ._NAME.py beside some
    return {file.stem: file for file in files if "def get_config(" in file.read_text("utf-8")}


def packaged_folder() -> Path:
    """The folder of the stages that ship with the package."""
    (folder,) = importlib.import_module("xllm_jax.configs").__path__
    return Path(folder)


def configurations(argv: Sequence[str]) -> dict[str, Any]:
    """{configuration flag: the configuration of its file, without any override}."""
    found = {}
    for name, value in config_files(argv).items():
        file, _, variant = value.partition(":")
        found[name] = _made(f"--{name}", file, variant)
    return found


def _made(flag: str, file: str, variant: str) -> object:
    """What `get_config` of a stage file gives.

    Raises:
      UserError: the file is no Python, has no such function, or raises something itself.
    """
    hint = "Give a Python file with a function get_config that returns a Stage"
    if os.path.getsize(file) > LARGEST_STAGE:
        raise UserError(f"{file} is too large for a stage", field=flag, hint=hint)
    try:
        get_config = runpy.run_path(file).get("get_config")
        if callable(get_config):
            return get_config(*([variant] if variant else []))
        what = "has no function get_config"
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's code does
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        where = f" at line {lines[-1]}" if lines else ""
        told = " ".join(f"{type(error).__name__}: {error}".split())[:MESSAGE]
        what = f"ends{where} with {told}"
    raise UserError(f"{file} {what}", field=flag, hint=hint)


def check_names(argv: Sequence[str], configs: Mapping[str, Any]) -> None:
    """Looks whether the fields of all `--config.some.field=` exist and are single values.

    Raises:
      UserError: the first that does not; names it and the nearest.
    """
    for path in filter(None, map(override, argv[1:])):
        if path[0] not in configs:
            continue
        line = unknown_field(configs[path[0]], path)
        if line:
            raise UserError(line)
        value = dict_overrides.holder(configs[path[0]], path[1:])
        if isinstance(value, dict) or dataclasses.is_dataclass(value):
            name = "--" + ".".join(path)
            hint = f"Set one of its fields: {name}.{(fields(value) or ['NAME'])[0]}=…"
            raise UserError("is no single value", field=name, hint=hint)


def override(token: str) -> list[str]:
    """['config', 'optimizer', 'peak'] of `--config.optimizer.peak=…`; [] of other flags."""
    path = token.lstrip("-").partition("=")[0].split(".")
    return path if token.startswith("-") and len(path) > 1 else []


def unknown_field(holder: object, path: Sequence[str]) -> str | None:
    """The line about the first step of ('config', 'optimizer', 'peek') that does not exist."""
    for depth, step in enumerate(path[1:], start=1):
        known = fields(holder)
        if step not in known:
            where = "--" + ".".join(path[: depth + 1])
            return f"{where}: the configuration has no such field. {nearest(step, known)}"
        holder = holder[step] if isinstance(holder, dict) else getattr(holder, step)
    return None


def fields(holder: object) -> list[str]:
    """Names below one node of a configuration."""
    if isinstance(holder, dict):
        return sorted(map(str, holder))
    if dataclasses.is_dataclass(holder):
        return [field.name for field in dataclasses.fields(holder)]
    return []
