"""Chats with a trained X-LLM in the terminal; it remembers what was said.

    xllm chat --checkpoint=demo/runs/stage3

A line is a question. Commands:
    /image PATH, /video PATH, /speech PATH   show or play a file; it goes with all that follows
    /reset                                   forget files and questions
    /help, /quit
With --draw=DIR pictures of the answers go to that folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from absl import flags

from xllm_jax.core.errors import CannotWrite, UserError
from xllm_jax.core.text_lines import split_lines
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.media.modalities import MODALITIES
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.text.instructions import instructions
from xllm_jax.inference import assistant
from xllm_jax.inference.load_run import load_run
from xllm_jax.launch import cli, drawing, other_base, terminal

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of a finished run, such as demo/runs/stage3.", required=True
)
ROUNDS = flags.DEFINE_integer("rounds", 4, "Number of earlier rounds that the model sees.", 0)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 64, "Length of the longest answer in tokens, the end token included.", 2, 1 << 20
)
DRAW = flags.DEFINE_string("draw", "", drawing.HELP)
flags.adopt_module_key_flags(drawing)
flags.adopt_module_key_flags(other_base)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the noise that pictures begin with.", allow_override=True
)

HELP = "\n".join(split_lines(__doc__ or "")[4:-1])

Answer = Callable[[Example], str]


@dataclasses.dataclass(frozen=True)
class Chat:
    """What has been shown and said so far, and of which modalities files may be."""

    media: tuple[tuple[str, str], ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    known: Mapping[str, Modality] = dataclasses.field(default_factory=lambda: MODALITIES)


def main(_: list[str]) -> None:
    write = drawing.chosen(CHECKPOINT.value, DRAW.value, SEED.value, SEED.name)
    restored = load_run(CHECKPOINT.value, outputs=drawing.OUTPUTS.value, base=other_base.BASE.value)
    model = assistant.Assistant(restored, max_tokens=MAX_TOKENS.value)
    known = tuple(name for name, _, _ in model.model.modalities)
    easel = drawing.Easel(Path(DRAW.value), model.family, write) if write else None

    def answer(example: Example) -> str:
        return easel.text(model.replies([example])[0]) if easel else model.answers([example])[0]

    files = f"{', '.join(known)} and " if known else ""
    print(f"Knows {files}text. /help lists the commands.")
    converse(typed(), answer, print, ROUNDS.value, modalities.named(model.data.modalities))


def typed() -> Iterator[str]:
    """Lines that the user types, until the end of the input."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def converse(
    lines: Iterator[str],
    answer: Answer,
    say: Callable[[str], None],
    rounds: int,
    known: Mapping[str, Modality] = MODALITIES,
) -> Chat:
    """Answers line by line; a mistake is reported and the chat goes on.

    Args:
      lines: what the user types.
      answer: the model.
      say: shows a line.
      rounds: earlier rounds that go into a prompt.
      known: {name: Modality} of the files that commands may name.

    Returns:
      The chat when the user left.
    """
    chat = Chat(known=known)
    for line in map(str.strip, lines):
        if line == "/quit":
            break
        try:
            chat = turn(chat, line, answer, say, rounds) if line else chat
        except CannotWrite:
            raise
        except UserError as error:
            say(str(error))
    return chat


def turn(chat: Chat, line: str, answer: Answer, say: Callable[[str], None], rounds: int) -> Chat:
    """The chat after one line: a command, a spoken question, or a written one.

    Raises:
      UserError: an unknown command, or what cannot be read; the chat stays as it was.
    """
    name, _, rest = line.removeprefix("/").partition(" ")
    if not line.startswith("/"):
        return ask(chat, terminal.decoded(line, "question"), answer, say, rounds)
    if name == "reset":
        say("Forgotten.")
        return Chat(known=chat.known)
    if name == "help":
        say(HELP)
        return chat
    if name not in chat.known:
        near = cli.nearest(name, [*chat.known, "reset", "help", "quit"], "/")
        raise UserError("unknown command", field=f"/{name}", hint=near)
    if not rest.strip():
        raise UserError("names no file", field=line, hint=f"/{name} PATH")
    return show(chat, name, rest.strip(), answer, say, rounds)


def show(
    chat: Chat, modality: str, path: str, answer: Answer, say: Callable[[str], None], rounds: int
) -> Chat:
    """Adds a file. A spoken file is a question at once, if there is something to ask about."""
    more = dataclasses.replace(chat, media=(*chat.media, (modality, path)))
    shown = chat.known[modality]
    seen = any(not chat.known[name].spoken for name, _ in chat.media)
    texts = instructions(shown.tasks[shown.spoken and seen])
    if not texts:
        say("Ask about it.")
        return more
    # Describing it at once also shows whether the file can be read.
    said = ask(more, texts[0], answer, say, rounds)
    if not shown.spoken:
        return said
    # The next spoken question replaces this one.
    return dataclasses.replace(said, media=chat.media)


def ask(chat: Chat, text: str, answer: Answer, say: Callable[[str], None], rounds: int) -> Chat:
    """One round."""
    kept = chat.history[-rounds:] if rounds else ()
    reply = answer(Example("chat", chat.media, text, history=kept))
    say(reply)
    return dataclasses.replace(chat, history=(*chat.history, (text, drawing.words(reply))))


if __name__ == "__main__":
    cli.run(main)
