"""`--config.data.rows=auto`: the micro-batch and what goes with it, chosen for the devices here.

Host 0 chooses for all before the run begins: as in the run's folder where the run was begun on such
devices, as in this host's cache, or anew (docs/preflight.md, "Chosen for you"). A run keeps its
rows on other devices, too: its data and its steps are counted in them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import flags

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.launch import auto_value

AUTO = flags.DEFINE_bool(
    auto_value.FLAG,
    False,
    "The same as --config.data.rows=auto: the micro-batch, mesh and remat with the best forecast "
    "that fits the devices here, for the same update.",
)
FIELD = "--config.data.rows=auto"
FILE = "chosen.json"  # of a run
FEW = 4  # rows a device; frozen parameters are gathered for them in every micro-batch


def settle(stage: Stage, workdir: str) -> Stage:
    """The stage that this run trains: as it is configured, or as it was chosen for the devices.

    Every host calls it, once, when all have joined.

    Args:
      stage: as it is configured.
      workdir: the run's folder, which keeps the choice.

    Raises:
      UserError: nothing fits, the choice needs a base that is not there, or the run was begun with
        other rows.
      CannotWrite: the choice cannot be kept.
    """
    from xllm_jax.core import atomic, hosts  # take seconds, which a mistake need not wait for

    file = Path(workdir) / FILE
    told = hosts.share(hosts.store(), "chosen rows", lambda: _told(stage, file))
    if told["wrong"]:
        what, field, hint = told["wrong"]
        raise UserError(what, field=field, hint=hint)
    import jax

    found = told["found"]
    if found is None:
        if jax.process_index() == 0 and jax.default_backend() != "cpu":
            advise(stage, jax.device_count())
        return stage
    from xllm_jax.preflight import chosen

    if jax.process_index() == 0:
        print(chosen.text(found), flush=True)
        atomic.write_json(file, {name: found[name] for name in chosen.FIELDS})
    return chosen.apply(stage, found)


def advise(stage: Stage, devices: int) -> None:
    """Says on stderr where a run would mostly wait for links, and another micro-batch would not.

    Args:
      stage: that will train.
      devices: of all hosts.
    """
    from xllm_jax.data.batching import batch_format

    rows, accumulation = batch_format.find(stage.data).rows, stage.optimizer.accumulation
    if devices > 1 and accumulation > 1 and rows <= FEW * devices:
        line = f"{rows} rows x {accumulation} are few rows for {devices} devices; {FIELD} chooses "
        print(f"{line}the same update for them (docs/preflight.md)", file=sys.stderr, flush=True)


def _told(stage: Stage, file: Path) -> dict[str, Any]:
    """What host 0 tells all: the choice, None where there is none, or what is wrong."""
    if not AUTO.value and not file.exists():
        return {"found": None, "wrong": None}
    from xllm_jax.preflight import chosen

    try:
        kept = chosen.read(file)
        if not AUTO.value:
            check_rows(stage, kept)
            return {"found": None, "wrong": None}
        found = choose(stage, file.parent, kept)
        check_bases(chosen.apply(stage, found), found)
    except UserError as error:
        return {"found": None, "wrong": (error.what, error.field, error.hint)}
    return {"found": found, "wrong": None}


def choose(stage: Stage, workdir: Path, kept: dict[str, Any] | None) -> dict[str, Any]:
    """The choice for the devices that are here.

    Args:
      stage: as it is configured.
      workdir: the run's folder.
      kept: the choice with which the run was begun; None where it was not.

    Raises:
      UserError: nothing fits, or the run was begun without a choice.
    """
    from xllm_jax.core import kept_checkpoints
    from xllm_jax.preflight import apart, chosen, here, targets

    if kept is None and kept_checkpoints.steps(workdir):
        hint = "Leave it out, or choose another --workdir"
        raise UserError(f"{workdir} holds a run with rows of its own", field=FIELD, hint=hint)
    target = here.target(stage.slices)
    same = kept is not None and (
        kept["slice"] == targets.repeated(target, stage.slices).title
        and kept["mesh"].get("tensor") == stage.mesh.get("tensor", 1)
    )
    if kept is not None and same:
        return kept | {"kept": True}
    return chosen.find(stage, target, rows=kept["rows"] if kept else 0, make=apart.search)


def check_rows(stage: Stage, kept: dict[str, Any] | None) -> None:
    """Looks whether a run whose rows were chosen goes on with them.

    Raises:
      UserError: it would count its steps and data in others.
    """
    from xllm_jax.preflight import micro_batch

    now = (micro_batch.rows(stage), stage.optimizer.accumulation)
    if kept is not None and now != (kept["rows"], kept["accumulation"]):
        raise UserError(
            f"this run was begun with {kept['rows']} rows x {kept['accumulation']}, which were "
            f"chosen, and would go on with {now[0]} x {now[1]}",
            field="--config.data.rows",
            hint=f"Give {FIELD} again, or choose another --workdir",
        )


def check_bases(made: Stage, found: dict[str, Any]) -> None:
    """Looks whether the bases that a choice has packed are there.

    Raises:
      UserError: the first that is not; says how to make it.
    """
    from xllm_jax.core import checkpoint

    for name, note in zip(found["packed"], found["notes"]):
        if not checkpoint.base_exists(made.init[name]):
            what = f"this stage fits {found['slice']} with packed kernels of the {name} alone"
            raise UserError(what, field=FIELD, hint=f"First: {note}")
