"""Beam pipelines: in this process, in local processes, or on any runner with the same options."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from xllm_jax.core import atomic, disk
from xllm_jax.core.errors import CannotWrite, UserError
from xllm_jax.core.parallel import ahead

Element = TypeVar("Element")
Value = TypeVar("Value")  # what JSON holds

# Local processes would tell their every step amid the progress bar; failures come as exceptions.
QUIET = "--default_sdk_harness_log_level=CRITICAL"


def options(arguments: Sequence[str] = (), workers: int = 0) -> list[str]:
    """Beam's options: those given, and a local runner where they name none.

    Args:
      arguments: such as '--runner=FlinkRunner'. Elsewhere, the workers need this package, and the
        input and output folders under the same paths.
      workers: local processes; 0 works in this one.
    """
    if any(one.startswith("--runner") for one in arguments):
        return list(arguments)
    local = ["--runner=DirectRunner"]
    if workers:
        local += ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
        local.append(QUIET)
    return [*local, *arguments]


def pipeline(arguments: Sequence[str] = (), workers: int = 0) -> Any:
    """A pipeline to be built and run in a `with` block. Arguments as of `options`.

    Raises:
      UserError: Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        hint = "pip install -e '.[prepare]'"
        raise UserError("Apache Beam is not installed", field="prepare", hint=hint) from error
    # It logs every failure with its traceback, several times, before it raises it.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    return beam.Pipeline(options=PipelineOptions(options(arguments, workers)))


def mapped(
    call: Callable[[Element], Value],
    elements: Sequence[Element],
    file: Path,
    arguments: Sequence[str] = (),
    workers: int = 0,
    threads: int = 1,
    stop: Callable[[], None] = lambda: None,
) -> list[Value]:
    """What a function makes of every element: in threads here, or by Beam, which tells no order.

    Args:
      call: from an element to a JSON value.
      elements: values.
      file: where Beam writes what it collects; it is removed.
      arguments, workers: as of `options`; where one is given, Beam does it.
      threads: here.
      stop: called when the work ends, however it ends, before threads are waited for.

    Raises:
      UserError: what the function raises.
    """
    if not arguments and not workers:
        with ThreadPoolExecutor(threads) as pool, contextlib.ExitStack() as stack:
            stack.callback(stop)
            places = range(len(elements))
            return list(ahead(pool, lambda place: call(elements[place]), places, 2 * threads))

    disk.make_folder(file.parent)
    file.unlink(missing_ok=True)  # of a run that was killed
    with pipeline(arguments, workers) as started:
        import apache_beam as beam

        found = started | "elements" >> beam.Create(list(elements)) | beam.Reshuffle()
        listed = found | "apply" >> beam.Map(Guarded(call)) | beam.combiners.ToList()
        _ = listed | "write list" >> beam.Map(WriteJson(file))
    return values(file)


def values(file: Path) -> list[Any]:
    """The results that Beam has written to a file, which is removed.

    Raises:
      UserError: a result is a mistake of the user.
      CannotWrite: it tells of a disk that is full or read-only, or the list itself did not fit.
    """
    if not file.is_file():
        with atomic.whole(file) as partial:  # the cause, if it lasts
            partial.write_bytes(bytes(atomic.BLOCK))
        file.unlink()
        raise CannotWrite(str(file), "its disk was full for a moment, or is not this one's")
    made = json.loads(file.read_text("utf-8"))
    file.unlink()
    failed = next((one["error"] for one in made if "error" in one), None)
    if failed and "reason" in failed:
        raise CannotWrite(failed["field"], failed["reason"], failed["safe"])
    if failed:
        raise UserError(failed["what"], field=failed["field"], hint=failed["hint"])
    return [one["value"] for one in made]


class Guarded:
    """Calls a function; a mistake of the user is its result, and ends the work of this process.

    Beam would make a traceback of it.
    """

    def __init__(self, call: Callable[..., object]):
        self._call, self._failed = call, None

    def __call__(self, element: Any) -> dict[str, Any]:
        """{'value': …}, or {'error': {'what', 'field', 'hint'}, or of a closed disk its own}."""
        if self._failed is None:
            try:
                return {"value": self._call(element)}
            except CannotWrite as error:
                told = {"field": error.field, "reason": error.reason, "safe": error.safe}
                self._failed = told
            except UserError as error:
                self._failed = {"what": error.what, "field": error.field, "hint": error.hint}
        return {"error": self._failed}


class WriteJson:
    """Writes a value to a file, whole or not at all; without a word where the disk is closed, as
    Beam would make a traceback of it, and `values` finds the cause."""

    def __init__(self, file: Path):
        self._file = file

    def __call__(self, value: object) -> None:
        with contextlib.suppress(CannotWrite):
            atomic.write_json(self._file, value)
