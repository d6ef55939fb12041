"""How `xllm evaluate --suite=NAME` finds its configuration and what answers, and runs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from xllm_jax.core import base_description, checksum
from xllm_jax.core.errors import UserError
from xllm_jax.core.suite import Suite
from xllm_jax.data.media.modalities import SPEECH
from xllm_jax.evaluation import answer_store
from xllm_jax.evaluation.measure import Answer
from xllm_jax.evaluation.suites import run
from xllm_jax.evaluation.suites.run import Model
from xllm_jax.inference import assistant, load_run, transcriber
from xllm_jax.launch import cli
from xllm_jax.launch import hosts as host_flags

FOLDER = Path(cli.packaged_folder(), "suites")
SUITES = sorted(file.stem for file in FOLDER.glob("[!_.]*.py"))


def with_config(argv: Sequence[str]) -> list[str]:
    """The command line with the packaged configuration of its --suite, where it names none.

    '--suite=asr:tiny' takes the variant 'tiny'. Without a suite, or with one that is not there,
    nothing is added.
    """
    given = {token.lstrip("-").partition("=")[0] for token in argv}
    tokens = [token for token in argv if token.lstrip("-").startswith("suite=")]
    if not tokens or "config" in given:
        return list(argv)
    name, colon, variant = tokens[-1].partition("=")[2].partition(":")
    if name not in SUITES:
        cli.fail(f"--suite: no such suite {name!r}. {cli.nearest(name, SUITES)}")
    # Before the flags that change its fields, as ml_collections wants it.
    return [argv[0], f"--config={FOLDER / name}.py{colon}{variant}", *argv[1:]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Who answers: the folder of a run, '' for nobody, and the flag --base."""

    run: str
    base: str = ""


def evaluate(name: str, config: Suite, asked: Asked, output: str, baseline: str) -> None:
    """Runs a suite, and prints its tables.

    Args:
      name: of the suite.
      config: its configuration.
      asked: the run that answers; none for a suite that asks nobody.
      output: folder of the results.
      baseline: of other results, or ''.

    Raises:
      UserError: no run where the suite asks one, or what the suite raises.
    """
    asks = run.suite(name).ASKS
    if asks != bool(asked.run):
        what = "is missing" if asks else f"has no part in {name}"
        raise UserError(what, field="--checkpoint", hint="Give the folder of a finished run")
    if asked.base and not asks:
        raise UserError(f"has no part in {name}", field="--base", hint="Leave it out")
    host, count = host_flags.share()
    from xllm_jax.core import hosts, watchdog

    store = hosts.store()
    place = run.Place(Path(output), baseline, host, count, store)
    with watchdog.Watch(place.folder, 0, store):
        shown = run.run(
            name, config, of_run(asked.run, config, asked.base) if asks else None, place
        )
    if shown is None:
        print(f"Host {host} has done its share; others are still at work")
        return
    print(f"\n{shown}\n\nAs a page: {place.folder / 'results.html'}")
    sys.stdout.flush()


def of_run(directory: str, config: Suite, base: str = "") -> Model:
    """A run of stage 1 (speech alone), or any run with an LLM, on this host's devices.

    Args:
      directory: of the run.
      config: says how many samples are answered at a time, and how.
      base: the flag --base.

    Raises:
      UserError: no finished run there, or no base.
    """
    stage = load_run.stage_of(directory)
    hears = transcriber.DECODER in stage.parts
    about = {"run": answer_store.identity(load_run.final(directory))}
    if base:
        about["base"] = checksum.of_json(base_description.base_about(base))

    def load() -> Answer:
        import jax

        restored = load_run.load_run(directory, devices=jax.local_devices(), base=base)
        if hears:
            return transcriber.Transcriber(restored, config.rows, config.beams).transcribe
        model = assistant.Assistant(restored, config.rows, config.max_tokens)
        how = model.decoding(beams=config.beams) if config.beams > 1 else model.decoding()
        return lambda examples: model.answers(examples, how)

    return Model(directory, about, load, (SPEECH,) if hears else ())


def limited(config: Suite, rows: int | None, limit: int | None) -> Suite:
    """The suite with what the command's own flags say."""
    given = {"rows": rows, "limit": limit}
    return dataclasses.replace(config, **{n: v for n, v in given.items() if v is not None})
