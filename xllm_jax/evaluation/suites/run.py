"""What all suites share: sets are read, answered once over all hosts, scored, written."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from xllm_jax.core import fingerprint, hosts, lookup
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.core.suite import Suite
from xllm_jax.data import guarded, mixture
from xllm_jax.data.example import Example
from xllm_jax.evaluation import answer_store
from xllm_jax.evaluation.answer_store import Answered
from xllm_jax.evaluation.demo_suite import spread
from xllm_jax.evaluation.measure import Answer
from xllm_jax.report import suite_page
from xllm_jax.report.tables import Table

PACKAGE = "xllm_jax.evaluation.suites"
MOST_BAD = 0.01  # share of a set's records that may have no usable reference
Sets = Mapping[str, tuple[Example, ...]]


@dataclasses.dataclass(frozen=True)
class Model:
    """What answers a suite's questions.

    Attributes:
      name: in the report.
      about: what its answers depend on, JSON.
      load: returns what answers; called where there is something to answer.
      modalities: what it takes; () any.
    """

    name: str
    about: object
    load: Callable[[], Answer]
    modalities: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Found:
    """What a suite reports about.

    Attributes:
      folder: of the evaluation.
      sets: {set: its samples with answers}.
      other: the same of the run that it is compared with; {} without one.
      say: where a line of progress goes.
    """

    folder: Path
    sets: Mapping[str, Answered]
    other: Mapping[str, Answered] = dataclasses.field(default_factory=dict)
    say: Callable[[str], None] = print


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an evaluation runs.

    Attributes:
      folder: of the evaluation, which the hosts share.
      baseline: folder of another one that it is compared with, or ''.
      host, count: this host, of how many.
      store: of hosts that JAX has joined; None where they share the folder alone.
    """

    folder: Path
    baseline: str = ""
    host: int = 0
    count: int = 1
    store: hosts.Store | None = None


def suite(name: str) -> ModuleType:
    """The file of a suite.

    Raises:
      UserError: there is none of that name.
    """
    return lookup.module(PACKAGE, name, "--suite", "report")


def samples(config: Suite, say: Callable[[str], None] = print) -> dict[str, tuple[Example, ...]]:
    """The samples of the sets that are there; a record that its reader cannot make is left out.

    Args:
      config: of the suite.
      say: is told which sets are not there, and what is left out.

    Raises:
      UserError: a set that was asked for by name, or every set, is not there; or more than
        `MOST_BAD` of its records cannot be made.
    """
    for name in config.only:
        if name not in config.sets:
            hint = f"Choices: {', '.join(config.sets)}"
            raise UserError(f"no such set {name!r}", field="only", hint=hint)
    wanted = {name: config.sets[name] for name in config.only or config.sets}
    found, missing = {}, []
    for name, source in wanted.items():
        if not config.only and not os.path.exists(os.path.join(config.root, source.path)):
            missing.append(f"{name} ({os.path.join(config.root, source.path)})")
            continue
        found[name] = _read(name, source, config, say)
    if not found:
        hint = "Set --config.root, or --config.sets.NAME.path"
        raise UserError(f"none of its sets is there: {', '.join(missing)}", field="sets", hint=hint)
    if missing:
        say(f"Not there, left out: {', '.join(missing)}")
    return found


def _read(
    name: str, source: Source, config: Suite, say: Callable[[str], None]
) -> tuple[Example, ...]:
    read = mixture.read(name, source, config.root)
    found, bad = [], []
    for place in spread(range(len(read)), config.limit or len(read)):
        try:
            found.append(guarded.example(read, place))
        except UserError as error:
            bad.append(error)
    if len(bad) > MOST_BAD * (len(found) + len(bad)):
        raise bad[0]
    if bad:
        say(f"{name}: {len(bad)} records have no usable reference; the first: {bad[0]}")
    return tuple(found)


def answered(sets: Sets, config: Suite, model: Model, place: Place) -> dict[str, Answered] | None:
    """Answers this host's share of the sets.

    Returns:
      All answers; None while other hosts, which share the folder alone, are at work.

    Raises:
      UserError: the folder holds other answers, or all samples fail.
    """
    how = [config.rows, config.beams, config.max_tokens]
    jobs = {
        name: answer_store.job(place.folder, name, rows, [model.about, how], config.shard)
        for name, rows in sets.items()
    }
    todo = {n: s.todo(range(place.host, s.count, place.count)) for n, s in jobs.items()}
    # Hosts that JAX has joined load together.
    if any(todo.values()) or place.store is not None:
        answer = model.load()
        for name, shards in jobs.items():
            answer_store.write(shards, todo[name], sets[name], answer)
    hosts.meet(place.store, "answered")
    if any(shards.todo() for shards in jobs.values()):
        return None
    return {name: answer_store.read(shards, sets[name]) for name, shards in jobs.items()}


def run(name: str, config: Suite, model: Model | None, place: Place) -> str | None:
    """Runs a suite and writes its results.

    Args:
      name: of the suite.
      config: of the suite.
      model: what answers; None for a suite that asks none.
      place: where it runs.

    Returns:
      The tables as text; None on a host that has done its share while others are at work.

    Raises:
      UserError: what the sets, the model or the suite raise.
    """
    made = suite(name)
    sets: Sets = made.tasks(config, model)
    if model is None:
        rows = {n: Answered(s, ("",) * len(s), ("",) * len(s)) for n, s in sets.items()}
    else:
        rows = answered(sets, config, model, place)
    if rows is None:
        return None
    write = functools.partial(_write, name, made, config, model, place, rows)
    return hosts.share(place.store, "results", write)


def _write(
    name: str,
    made: ModuleType,
    config: Suite,
    model: Model | None,
    place: Place,
    rows: Mapping[str, Answered],
) -> str:
    other: dict[str, Answered] = {}
    if place.baseline:
        for key, one in rows.items():
            known = answer_store.stored(Path(place.baseline), key, one.examples)
            other |= {key: known} if known else {}
        if not other:
            what = "has no answers to any of these sets"
            hint = "Give the --output of another run of this suite"
            raise UserError(what, field="--baseline", hint=hint)
    results, tables = made.report(config, Found(place.folder, rows, other))
    about = settings(name, config, model, place)
    results = {"suite": name, "settings": about, **results}
    table: list[Table] = [*tables, suite_page.settings(about)]
    return suite_page.write(made.TITLE, results, table, place.folder)


def settings(name: str, config: Suite, model: Model | None, place: Place) -> dict[str, str]:
    """How a result came about; the same for any number of hosts."""
    about = {
        "suite": name,
        "model": model.name if model else "none",
        "root": config.root,
        "limit": str(config.limit or "none"),
        "rows, beams, max_tokens": f"{config.rows}, {config.beams}, {config.max_tokens}",
        "commit": fingerprint.commit(),
    }
    return about | ({"baseline": place.baseline} if place.baseline else {})
