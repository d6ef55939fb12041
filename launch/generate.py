r"""Asks a trained X-LLM about images, videos and speech.

    xllm generate --checkpoint=demo/runs/stage3 --image=a.jpg --prompt="图中有什么？"
    xllm generate --checkpoint=demo/runs/stage3 --image=a.jpg --speech=question.flac

    xllm generate --checkpoint=runs/stage_output_image --prompt="画一个红色的圆" --draw=out/

    xllm generate --checkpoint=runs/stage3 --outputs=runs/stage_output_image --speech=request.flac \
        --draw=out/

Any number of files; with speech the question may be spoken. Without --prompt the model gets the
instruction that fits its files: describe the image or video, write down the speech, answer the
spoken question. <image>, <video> and <speech> in the prompt say where the files stand in it.
With --draw the answer's pictures go to a folder, and the text names their files in their places;
--steps, --guidance, --size, --scheduler and --seed say how they are drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media.modalities import MODALITIES, SPEECH, task
from xllm_jax.data.text.instructions import instructions
from xllm_jax.inference.load_run import load_run
from xllm_jax.launch import cli, drawing, other_base, terminal, unused_flags

if TYPE_CHECKING:
    from xllm_jax.inference import assistant

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a finished run, such as demo/runs/stage3.", required=True
)
FILES = {
    name: flags.DEFINE_multi_string(name, [], f"{name.capitalize()} file") for name in MODALITIES
}
MEDIA = flags.DEFINE_multi_string(
    "media", [], "MODALITY:PATH, a file of a modality that the run added by data.modalities."
)
PROMPT = flags.DEFINE_string(
    "prompt", "", "Question or instruction; with files it may be left out."
)
DECODE = flags.DEFINE_enum(
    "decode", "greedy", ["greedy", "sample", "beam"], "How the next token is chosen."
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.95, "Temperature for sampling; lower is more certain.", 1e-3
)
TOP_P = flags.DEFINE_float(
    "top_p",
    0.7,
    "Sample from the likeliest tokens of this total probability; 1 takes all.",
    0.0,
    1.0,
)
TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Sample from this many of the likeliest tokens; 0 takes all.", 0
)
BEAMS = flags.DEFINE_integer("beams", 4, "Number of beams of beam search.", 2, 1024)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 64, "Length of the longest answer in tokens, the end token included.", 2, 1 << 20
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the random numbers for sampling, and of the noise that pictures begin with."
)
DRAW = flags.DEFINE_string("draw", "", drawing.HELP)
flags.adopt_module_key_flags(drawing)
flags.adopt_module_key_flags(other_base)
HEARD = flags.DEFINE_bool("heard", False, "Also print the transcript of the speech.")


def main(_: list[str]) -> None:
    prompt = terminal.decoded(PROMPT.value, "--prompt")
    example, options = question(files(), prompt), decoding()
    from xllm_jax.inference import assistant  # takes seconds, which a mistake need not wait for

    write = drawing.chosen(CHECKPOINT.value, DRAW.value, SEED.value)
    restored = load_run(CHECKPOINT.value, outputs=drawing.OUTPUTS.value, base=other_base.BASE.value)
    model = assistant.Assistant(restored, max_tokens=MAX_TOKENS.value)
    if HEARD.value:
        for name, path in example.media:
            if name == SPEECH:
                print(f"Heard: {hear(model, path)}")
    how = model.decoding(**options)
    if write is None:
        print(model.answers([example], how, SEED.value)[0])
        return
    easel = drawing.Easel(Path(DRAW.value), model.family, write)
    print(easel.text(model.replies([example], how, SEED.value)[0]))


def files() -> tuple[tuple[str, str], ...]:
    """(modality, path) of every file on the command line, images first.

    Raises:
      UserError: a file does not exist, or has no modality.
    """
    found = [(name, path) for name in MODALITIES for path in FILES[name].value]
    for name, path in found:
        check_file(path, f"--{name}")
    for value in MEDIA.value:
        name, colon, path = value.partition(":")
        if not colon:
            hint = "Write --media=MODALITY:PATH"
            raise UserError(f"names no modality: {value}", field="--media", hint=hint)
        found.append((name, check_file(path, "--media")))
    return tuple(found)


def check_file(path: str, field: str) -> str:
    """Raises `UserError` for a path that is no file; returns it."""
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}", field=field, hint="Check the path")
    return path


def question(media: tuple[tuple[str, str], ...], prompt: str) -> Example:
    """What is asked: the prompt, or the instruction that fits the files.

    Raises:
      UserError: neither files nor a prompt, or a prompt of spaces.
    """
    if prompt.strip():
        return Example("prompt", media, prompt.strip())
    names = {name for name, _ in media}
    if prompt or not media or not names <= MODALITIES.keys():
        raise UserError("nothing to ask", field="--prompt", hint="Give a prompt or a file")
    kind = task(names, MODALITIES)
    return Example("prompt", media, instructions(kind)[0], task=kind)


def hear(model: assistant.Assistant, path: str) -> str:
    """The model's transcript of one speech file."""
    return model.answers([question(((SPEECH, path),), "")])[0]


def decoding() -> dict[str, Any]:
    """Fields of `generate.Decoding` from the flags.

    Raises:
      UserError: a flag of another way of decoding was given.
    """
    ways = {
        "sample": {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": TOP_K},
        "beam": {"beams": BEAMS},
    }
    for way, options in ways.items():
        if way != DECODE.value:
            unused_flags.refuse(f"with --decode={DECODE.value}", f"Add --decode={way}", *options)
    chosen = {name: flag.value for name, flag in ways.get(DECODE.value, {}).items()}
    return chosen | ({"sample": True} if DECODE.value == "sample" else {})


if __name__ == "__main__":
    cli.run(main)
