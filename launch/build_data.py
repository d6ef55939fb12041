r"""Builds the data that the paper made itself: one recipe of xllm_jax/prepare/recipes.

    xllm build-data --recipe=translated --reader=coco --input=coco --output=coco_zh \
        (--endpoint=URL --model=NAME [--prices=IN,OUT] | --translator=FOLDER | --translations=FILE)
    xllm build-data --recipe=vsdial_cn --input=visdial --output=vsdial_cn \
        --translator=mbart-large-50-many-to-many-mmt [--images=coco]  # or as translated does it
    xllm build-data --recipe=similar --reader=wukong --input=wukong --output=alike \
        (--clip=bases/clip [--tokenizer=FOLDER] | --scores=FILE) [--threshold=0.45]
    xllm build-data --recipe=instructions --input=data --output=data/instructions \
        [--counts=aishell2=2000] [--seed=0]
    xllm build-data --recipe=resampled --input=aishell2 --output=aishell2_16k
    xllm build-data --recipe=questions --input=visdial --output=texts [--reader=coco]

The recipe's docstring says what it reads and writes. The same command continues after an
interruption. instructions, vsdial_cn, --beam and --workers need pip install -e '.[prepare]';
--translator needs '.[convert]'.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from absl import flags

from xllm_jax.configs import sources
from xllm_jax.core import lookup
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.launch import cli
from xllm_jax.prepare.endpoint import Endpoint

RECIPE = flags.DEFINE_string(
    "recipe", None, "Recipe to run: the name of a file in xllm_jax/prepare/recipes."
)
INPUT = flags.DEFINE_string("input", None, "Folder of the data that the recipe reads.")
OUTPUT = flags.DEFINE_string("output", None, "Folder in which the data set is written.")
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Number of worker processes; 0 works in this process.", 0, 1024
)
BEAM = flags.DEFINE_multi_string("beam", [], "Pipeline option for Apache Beam")

THRESHOLD_HELP = (
    "similar: least cosine similarity that is kept; 0.45 by default, as in the paper. In OpenAI's "
    "CLIP, pairs that fit have about 0.25 to 0.35: look at OUTPUT/SPLIT_scores.npy and choose."
)

# Not given, they keep the recipe's defaults; given, the recipe must know them.
OWN = (
    flags.DEFINE_string("split", None, "Split of the data set to read."),
    flags.DEFINE_string(
        "translations", None, "vsdial_cn, translated: JSON file, {text: translation}."
    ),
    flags.DEFINE_string(
        "translator", None, "vsdial_cn, translated: folder of an mBART-50 model that translates."
    ),
    flags.DEFINE_string(
        "engine",
        None,
        "vsdial_cn: module:function that speaks a text; it is imported and run. Else, espeak-ng.",
    ),
    flags.DEFINE_string("images", None, "vsdial_cn: folder of the images."),
    flags.DEFINE_string(
        "reader",
        None,
        "questions, similar, translated: reader of the source, a file of xllm_jax/data/sources.",
    ),
    flags.DEFINE_string(
        "options", None, "questions, similar, translated: options of the reader, as a JSON object."
    ),
    flags.DEFINE_string("scores", None, "similar: file of similarities that were computed before."),
    flags.DEFINE_string("clip", None, "similar: base of the CLIP that computes similarities."),
    flags.DEFINE_string(
        "tokenizer", None, "similar: folder of CLIP's tokenizer; without it, the base's."
    ),
    flags.DEFINE_integer(
        "batch", None, "similar: number of pairs that CLIP computes at a time.", 1, 65536
    ),
    flags.DEFINE_float("threshold", None, THRESHOLD_HELP),
    flags.DEFINE_string(
        "sources", None, "instructions: JSON file of sources, {name: {reader, path, …}}."
    ),
    flags.DEFINE_multi_string("counts", None, "instructions: NAME=RECORDS of a source"),
    flags.DEFINE_string(
        "instructions", None, "instructions: JSON file of instructions, {task: [text, …]}."
    ),
    flags.DEFINE_integer("seed", None, "instructions: seed of the random draw.", 0),
)
flags.declare_key_flag("allow_paths")

URL = flags.DEFINE_string(
    "endpoint",
    None,
    "vsdial_cn, translated: address of an OpenAI-compatible API that translates, such as "
    "http://localhost:8000/v1. A key comes from the variable OPENAI_API_KEY, or from --key_file.",
)
# What else an endpoint may be told: the fields of xllm_jax/prepare/endpoint.py.
ENDPOINT = (
    flags.DEFINE_string("model", None, "With --endpoint: name of the model there."),
    flags.DEFINE_string("key_file", None, "With --endpoint: file that holds the key alone."),
    flags.DEFINE_string(
        "prices", None, "With --endpoint: INPUT,OUTPUT prices of a million tokens, to count costs."
    ),
    flags.DEFINE_string(
        "request",
        None,
        'With --endpoint: further fields of every request, as a JSON object; {"temperature": 0} '
        "without it.",
    ),
    flags.DEFINE_integer(
        "parallel", None, "With --endpoint: requests at a time; 8 without it.", 1, 1024
    ),
    flags.DEFINE_float(
        "timeout", None, "With --endpoint: seconds that a reply may take; 120 without it.", 0.1
    ),
)


def arguments(recipe: ModuleType) -> dict[str, Any]:
    """The arguments of a recipe's `build` from the flags.

    Raises:
      UserError: a flag that the recipe does not know, or lacks, or cannot read.
    """
    known = inspect.signature(recipe.build).parameters
    given = {flag.name: flag.value for flag in OWN if flag.value is not None}
    given |= endpoint()
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
        given["options"] = cli.json_object(given["options"], "--options")
    given |= {"input": INPUT.value, "output": OUTPUT.value}
    engine = {"beam": BEAM.value, "workers": WORKERS.value}
    engine["allow_paths"] = cli.ALLOW_PATHS.value
    given |= {name: value for name, value in engine.items() if name in known}
    for name, parameter in known.items():
        if parameter.default is parameter.empty and given.get(name) is None:
            raise UserError(f"the recipe {RECIPE.value} needs it", field=f"--{name}")
    return given


def endpoint() -> dict[str, Endpoint]:
    """{'endpoint': …} where one is given.

    Raises:
      UserError: a flag of an endpoint that is not given, or what `Endpoint` raises.
    """
    about = {flag.name: flag.value for flag in ENDPOINT if flag.value is not None}
    if URL.value is None:
        for name in about:
            raise UserError("belongs to an endpoint", field=f"--{name}", hint="Give --endpoint=URL")
        return {}
    if "request" in about:
        about["request"] = cli.json_object(about["request"], "--request")
    return {"endpoint": Endpoint(URL.value, **about)}


def count(text: str) -> tuple[str, int]:
    """'aishell2=2000' as name and number."""
    name, _, number = text.partition("=")
    if not number.isdecimal():
        raise UserError(f"{text!r} is no count", field="--counts", hint="NAME=RECORDS")
    return name, int(number)


def read_sources(file: str) -> Mapping[str, Source]:
    """{name: Source} of a JSON file."""
    try:
        with open(file, encoding="utf-8") as opened:
            found = cli.json_object(opened.read(), file)
        return {name: Source(**one) for name, one in found.items()}
    except (OSError, TypeError) as error:
        hint = '{"NAME": {"reader": "…", "path": "…", "split": "train", "options": {}}}'
        raise UserError(f"cannot be read ({error})", field=file, hint=hint) from None


def main(_: list[str]) -> None:
    recipe = lookup.module("xllm_jax.prepare.recipes", RECIPE.value, "--recipe")
    found = recipe.build(**arguments(recipe))
    print("  ".join(f"{name}: {format_message(value)}" for name, value in found.items()))


def format_message(value: object) -> str:
    """A count, or counts by name, in a few words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_message(one)}" for name, one in value.items()) or "none"
    return f"{value:,}"


if __name__ == "__main__":
    flags.mark_flags_as_required(["recipe", "input", "output"])
    cli.run(main, "What was finished is kept, and the same command continues")
