"""Builds the data that the paper made itself: one recipe of xllm_jax/prepare/recipes.

    python launch/build_data.py --recipe=vsdial_cn --input=visdial --output=vsdial_cn \
        --translator=mbart-large-50-many-to-many-mmt [--images=coco]
    python launch/build_data.py --recipe=similar --reader=wukong --input=wukong --output=alike \
        (--clip=bases/clip [--tokenizer=FOLDER] | --scores=FILE) [--threshold=0.45]
    python launch/build_data.py --recipe=instructions --input=data --output=data/instructions \
        [--counts=aishell2=2000] [--seed=0]
    python launch/build_data.py --recipe=resampled --input=aishell2 --output=aishell2_16k
    python launch/build_data.py --recipe=questions --input=visdial --output=texts

The recipe's docstring says what it reads and writes. The same command continues after an
interruption. Needs: pip install -e '.[prepare]', except similar without --beam and --workers;
--translator needs '.[prepare,convert]'.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from absl import flags

from xllm_jax.configs import sources
from xllm_jax.core import lookup
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.launch import cli

RECIPE = flags.DEFINE_string("recipe", None, "File of xllm_jax/prepare/recipes.")
INPUT = flags.DEFINE_string("input", None, "Where the data lie.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of what is built.")
WORKERS = flags.DEFINE_integer("workers", 0, "Local processes; 0 works in this one.", 0)
BEAM = flags.DEFINE_multi_string("beam", [], "A pipeline option of Beam; may be repeated.")

THRESHOLD_HELP = (
    "similar: least similarity that is kept; the paper's 0.45 by default. In OpenAI's CLIP, "
    "cosines of pairs that fit lie about 0.25 to 0.35: look at OUTPUT/SPLIT_scores.npy and choose."
)

# Not given, they keep the recipe's defaults; given, the recipe must know them.
OWN = (
    flags.DEFINE_string("split", None, "Split of the source."),
    flags.DEFINE_string("translations", None, "vsdial_cn: JSON file, {text: translation}."),
    flags.DEFINE_string("translator", None, "vsdial_cn: folder of an mBART-50 model."),
    flags.DEFINE_string("engine", None, "vsdial_cn: speech by module:function; else espeak-ng."),
    flags.DEFINE_string("images", None, "vsdial_cn: folder of the images."),
    flags.DEFINE_string("reader", None, "similar: a file of xllm_jax/data/sources."),
    flags.DEFINE_string("options", None, "similar: options of the reader, as JSON."),
    flags.DEFINE_string("scores", None, "similar: file of similarities."),
    flags.DEFINE_string("clip", None, "similar: base of CLIP that computes similarities."),
    flags.DEFINE_string("tokenizer", None, "similar: folder of CLIP's; else the base has it."),
    flags.DEFINE_integer("batch", None, "similar: pairs that CLIP looks at together.", 1),
    flags.DEFINE_float("threshold", None, THRESHOLD_HELP),
    flags.DEFINE_string("sources", None, "instructions: JSON file, {name: {reader, path, …}}."),
    flags.DEFINE_multi_string("counts", None, "instructions: NAME=RECORDS; may be repeated."),
    flags.DEFINE_string("instructions", None, "instructions: JSON file, {task: [text, …]}."),
    flags.DEFINE_integer("seed", None, "instructions: of the draw.", 0),
)


def arguments(recipe: ModuleType) -> dict[str, Any]:
    """The arguments of a recipe's `build` from the flags.

    Raises:
      UserError: a flag that the recipe does not know, or lacks, or cannot read.
    """
    known = inspect.signature(recipe.build).parameters
    given = {flag.name: flag.value for flag in OWN if flag.value is not None}
    for name in given:
        if name not in known:
            hint = f"It knows: {', '.join('--' + n for n in known if n not in ('beam', 'workers'))}"
            what = f"the recipe {RECIPE.value} has no such flag"
            raise UserError(what, field=f"--{name}", hint=hint)
    if "sources" in known:
        file = given.get("sources")
        given["sources"] = read_sources(file) if file else sources.INSTRUCTIONS
    if "counts" in given:
        given["counts"] = dict(map(count, given["counts"]))
    if "options" in given:
        given["options"] = read_object(given["options"], "--options")
    given |= {"input": INPUT.value, "output": OUTPUT.value}
    engine = {"beam": BEAM.value, "workers": WORKERS.value}
    given |= {name: value for name, value in engine.items() if name in known}
    for name, parameter in known.items():
        if parameter.default is parameter.empty and given.get(name) is None:
            raise UserError(f"the recipe {RECIPE.value} needs it", field=f"--{name}")
    return given


def count(text: str) -> tuple[str, int]:
    """'aishell2=2000' as name and number."""
    name, _, number = text.partition("=")
    if not number.isdecimal():
        raise UserError(f"{text!r} is no count", field="--counts", hint="NAME=RECORDS")
    return name, int(number)


def read_object(text: str, field: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"no JSON object ({error})", field=field) from None
    if not isinstance(found, dict):
        raise UserError(f"no JSON object (is {type(found).__name__})", field=field)
    return found


def read_sources(file: str) -> Mapping[str, Source]:
    """{name: Source} of a JSON file."""
    try:
        with open(file, encoding="utf-8") as opened:
            found = read_object(opened.read(), file)
        return {name: Source(**one) for name, one in found.items()}
    except (OSError, TypeError) as error:
        hint = '{"NAME": {"reader": "…", "path": "…", "split": "train", "options": {}}}'
        raise UserError(f"cannot be read ({error})", field=file, hint=hint) from None


def main(_: list[str]) -> None:
    recipe = lookup.module("xllm_jax.prepare.recipes", RECIPE.value, "--recipe")
    found = recipe.build(**arguments(recipe))
    print("  ".join(f"{name}: {told(value)}" for name, value in found.items()))


def told(value: Any) -> str:
    """A count, or counts by name, in a few words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {told(one)}" for name, one in value.items()) or "none"
    return f"{value:,}"


if __name__ == "__main__":
    flags.mark_flags_as_required(["recipe", "input", "output"])
    cli.run(main)
