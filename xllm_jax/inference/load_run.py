"""A trained run's folder becomes networks and parameters, wherever the folder is called from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from xllm_jax.assembly import adapters, parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import base_description, checkpoint, checksum, damage, mesh
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Stage
from xllm_jax.core.stage_record import parse_stage
from xllm_jax.core.types import Device
from xllm_jax.inference import run_base
from xllm_jax.models import lora
from xllm_jax.models.xllm import LLM, XLLM


@dataclasses.dataclass(frozen=True)
class Restored:
    """Networks with their parameters, and the stage they were trained in, paths resolved."""

    model: XLLM
    params: dict[str, Any]
    stage: Stage


def load_run(
    directory: str | Path,
    replaced: Mapping[str, str] | None = None,
    devices: list[Device] | None = None,
    outputs: str | Path = "",
    base: str = "",
) -> Restored:
    """Loads all networks of a finished run: what it trained, and what it was trained on.

    Args:
      directory: folder of the run (the --workdir of launch/train.py).
      replaced: {part: 'DIR' or 'DIR:part'} that come from elsewhere; '' as source takes what the
        run started from. A base of `xllm quantize` keeps its packed kernels.
      devices: where the parameters go; all by default, those of other hosts among them.
      outputs: folder of a run of decoding-side alignment beside the same LLM, whose signal tokens
        and projections let this one answer with pictures.
      base: folder of the LLM's base, in place of the one that the run names: the same, or another
        packing of it.

    Raises:
      UserError: no finished run there, something it was trained on is gone or is not what it was
        then, or sizes differ; the runs cannot be joined; the base is of another LLM.
    """
    replaced = dict(replaced or {})
    stage = without_teachers(stage_of(directory, outputs))
    about = base_description.base_about(final(directory))
    trained = {path.split("/")[0] for path in about["shapes"]}
    init = {name: place(source, directory) for name, source in stage.init.items() if source}
    for part in sorted(trained - {name for name, source in replaced.items() if not source}):
        init = {name: source for name, source in init.items() if name.split("/")[0] != part}
        init[part] = str(final(directory))
    init |= {name: source for name, source in replaced.items() if source}
    # What the run has trained comes from its result, and not from where it began.
    began = "" if any(map(lora.is_adapter, about["shapes"])) else stage.lora.init
    settings = dataclasses.replace(stage.lora, init=place(began, directory) if began else "")
    stage = dataclasses.replace(stage, offload=())
    unlike = set(replaced)  # parts that are not what the run was trained on
    if base:
        own = {name: place(source, directory) for name, source in stage.init.items() if source}
        ran = dataclasses.replace(stage, init=own)
        other = run_base.other_base(ran, final(directory), base)
        unlike |= set() if other.same else {LLM}
        replaced[LLM] = base
        init[LLM] = base
        if other.adapters:
            settings = dataclasses.replace(settings, init=str(other.adapters))
        stage = dataclasses.replace(stage, data=beside(ran, base))
    parts = {
        name: run_base.packed_as(part, name, replaced.get(name, ""))
        for name, part in stage.parts.items()
    }
    stage = dataclasses.replace(stage, parts=parts, init=init, lora=settings)
    run_base.check_packing(stage, directory)
    system = System.build(stage, mesh.make(stage.mesh, devices))
    with run_base.told_of_run(directory):
        params = parameters.parameters(system)
    frozen = adapters.split(stage, params)[1]
    check_base(frozen, params.keys() - unlike, about.get("base", {}), directory, stage.init)
    return Restored(system.model, params, stage)


def beside(stage: Stage, base: str) -> Data:
    """A run's data, with the tokenizer of a base where the one beside its own base is gone."""
    data = stage.data
    if Path(data.tokenizer).exists() or data.tokenizer != stage.init.get(LLM):
        return data
    return dataclasses.replace(data, tokenizer=base)


def without_teachers(stage: Stage) -> Stage:
    """The stage without what only the training of its projections asks: text encoders, and the
    networks of a denoising loss."""
    fields = ("text_encoder", "unet", "autoencoder")
    teachers = {getattr(out, field) for out in stage.outputs.values() for field in fields}
    outputs = {
        name: dataclasses.replace(out, **dict.fromkeys(fields, ""))
        for name, out in stage.outputs.items()
    }
    parts, init = (
        {name: value for name, value in row.items() if name.split("/")[0] not in teachers}
        for row in (stage.parts, stage.init)
    )
    return dataclasses.replace(stage, outputs=outputs, parts=parts, init=init)


def check_base(
    frozen: Mapping[str, Any],
    kept: Collection[str],
    known: Mapping[str, str],
    directory: str | Path,
    init: Mapping[str, str],
) -> None:
    """Compares the frozen parameters with those that a run was trained on.

    Args:
      frozen: {part: frozen half}.
      kept: parts that are to be as they were.
      known: {part: identity}, as the run wrote it.
      directory: of the run, for the error.
      init: where the parts come from, for the error.

    Raises:
      UserError: a part is another one now; names it.
    """
    for part in sorted(known.keys() & frozen.keys() & set(kept)):
        older = checksum.is_older(known[part])
        if checksum.identity(frozen[part], older) != known[part]:
            raise UserError(
                f"was trained on another {part} than {init.get(part) or 'what its seed gives'} "
                "(its frozen parameters differ)",
                field=str(directory),
                hint=f"Bring the {part} back that it was trained on, or train again",
            )
    if any(map(checksum.is_older, known.values())):
        checksum.warn(str(directory))


def final(directory: str | Path) -> Path:
    """Folder of a run's result.

    Raises:
      UserError: the run is not finished, or not there.
    """
    found = Path(directory) / "final"
    if not checkpoint.base_exists(found):
        raise UserError(
            "no finished run here (no folder 'final')",
            field=str(directory),
            hint="Give the --workdir of a run of xllm train that has ended",
        )
    return found


def stage_of(directory: str | Path, outputs: str | Path = "") -> Stage:
    """The stage of a finished run, paths of its data and decoders resolved; it reads media, not
    cached ones.

    Args:
      directory: folder of the run.
      outputs: of a run that it is joined with, see `load_run`.

    Raises:
      UserError: as of `final` and `joined`.
    """
    stage = _stage_of(directory)
    return joined(stage, directory, outputs) if str(outputs) else stage


def joined(stage: Stage, directory: str | Path, outputs: str | Path) -> Stage:
    """A run's stage with the signal tokens, projections and decoders of another one.

    Args:
      stage: of the run `directory`.
      directory, outputs: folders of the two runs.

    Raises:
      UserError: the other run has no outputs, this one has some already, or their LLMs differ.
    """
    field, other = f"--outputs={outputs}", _stage_of(outputs)
    if not other.outputs:
        hint = "Give a run of stage_output_image"
        raise UserError("answers of this run hold text alone", field=field, hint=hint)
    if stage.outputs:
        what = f"{directory} answers with {', '.join(stage.outputs)} already"
        raise UserError(what, field=field, hint="Leave --outputs out")
    trained = {path.split("/")[0] for path in base_description.base_about(final(outputs))["shapes"]}
    common = sorted(trained & stage.parts.keys())
    if common:
        what = f"trained {common[0]}, which {directory} has, too"
        raise UserError(what, field=field, hint="Give a run that trained its outputs alone")
    if not same_llm(directory, outputs):
        what = f"was trained beside another LLM than {directory}"
        raise UserError(what, field=field, hint="Train it beside the same LLM")
    told = ("signals", "caption_tokenizer", "caption_length")
    data = dataclasses.replace(stage.data, **{name: getattr(other.data, name) for name in told})
    return dataclasses.replace(
        stage,
        parts=stage.parts | {name: other.parts[name] for name in sorted(trained)},
        init=stage.init | dict.fromkeys(sorted(trained), str(final(outputs).absolute())),
        outputs=other.outputs,
        data=data,
    )


def same_llm(first: str | Path, second: str | Path) -> bool:
    """Whether two finished runs stand beside the same LLM, by its fields and its kernels' hashes.

    Hashes that a run does not have, or that an earlier version took, are not compared.

    Raises:
      UserError: as of `final`.
    """
    parts = [_stage_of(run).parts.get("llm") for run in (first, second)]
    abouts = [base_description.base_about(final(run)) for run in (first, second)]
    bases = [about.get("base", {}).get("llm") for about in abouts]
    older = any(checksum.is_older(base) for base in bases if base)
    return parts[0] == parts[1] and (not all(bases) or older or bases[0] == bases[1])


def _stage_of(directory: str | Path) -> Stage:
    about = base_description.base_about(final(directory))
    with damage.reading(final(directory)):
        stage = parse_stage(about["stage"])
    data = stage.data
    files = {
        name: place(getattr(data, name), directory)
        for name in ("root", "tokenizer", "characters", "vocabulary", "caption_tokenizer")
        if getattr(data, name)
    }
    outputs = {
        name: dataclasses.replace(out, decoder=place(out.decoder, directory) if out.decoder else "")
        for name, out in stage.outputs.items()
    }
    data = dataclasses.replace(data, **files, cache="")
    return dataclasses.replace(stage, data=data, outputs=outputs)


def place(source: str, directory: str | Path) -> str:
    """Resolves a relative path of a stage, which started at the folder it was trained from.

    That folder is one of those above the run's, or else the working directory. What exists nowhere
    stays as it is, so that the error names it as the user wrote it.

    Args:
      source: 'PATH', 'PATH:part' or either with a '*' behind.
      directory: the run's folder.
    """
    path, colon, rest = source.partition(":")
    star = "*" if path.endswith("*") else ""
    path = path.removesuffix("*")
    for folder in (*Path(directory).absolute().parents, Path.cwd()):
        if (folder / path).exists():
            return f"{folder / path}{star}{colon}{rest}"
    return source
