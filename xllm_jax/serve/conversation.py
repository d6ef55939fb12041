"""Messages of a chat become one question with its files, as a prompt wants them.

A model has learned to read files at one place of its prompt, and there they go, in order. Where a
message says something before and behind a file, as in "compare … with …", all files stand where
they stand in the messages. The words `<image>`, `<video>` and `<speech>`, which mark places of
files in a prompt, are only words here: where they could be taken for one they get a space.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.media.modalities import MODALITIES
from xllm_jax.data.text.instructions import instructions
from xllm_jax.serve.errors import wrong
from xllm_jax.serve.limits import Limits
from xllm_jax.serve.media_input import Medium, Part

SYSTEM, USER, ASSISTANT = ("system", "developer"), "user", "assistant"
FILES = {  # modality and field of each type of a part
    "image_url": ("image", "url"),
    "video_url": ("video", "url"),
    "audio_url": ("speech", "url"),
    "input_audio": ("speech", "data"),
}
WORDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}

Piece = str | Part


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What messages say.

    Attributes:
      rounds: (question, answer), earlier ones first; the last answer is ''.
      parts: the files, in order.
      silent: modalities of the last question's files where it has no words.
    """

    rounds: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]
    silent: frozenset[str] = frozenset()

    def example(self, key: str, media: Sequence[Medium]) -> Example:
        """The question as the engine reads it.

        Args:
          key: of the request.
          media: what the parts have become.
        """
        *earlier, (question, _) = self.rounds
        task = modalities.task(self.silent, MODALITIES) if self.silent else "dialogue"
        if self.silent:
            question += instructions(task)[0]
        return Example(key, tuple(media), question, task=task, history=tuple(earlier))


@dataclasses.dataclass
class Turn:
    """What one side says until the other does."""

    role: str
    pieces: list[Piece]

    @property
    def said(self) -> bool:
        """Whether it has words."""
        return any(isinstance(piece, str) and piece.strip() for piece in self.pieces)

    @property
    def parts(self) -> list[Part]:
        """Its files."""
        return [piece for piece in self.pieces if isinstance(piece, Part)]

    @property
    def surrounded(self) -> bool:
        """Whether a file has words before and behind it."""
        spoken = [bool(p.strip()) if isinstance(p, str) else None for p in self.pieces]
        filled = [n for n, one in enumerate(spoken) if one]
        return bool(filled) and None in spoken[filled[0] : filled[-1]]

    def text(self, marked: bool, names: Collection[str]) -> str:
        """Its words.

        Args:
          marked: with markers in the places of files.
          names: modalities of the conversation's files.
        """
        pattern = f"<({'|'.join(names)})>" if names else "(?!)"  # which matches nothing
        found = [
            (f"<{piece.modality}>" if marked else "")
            if isinstance(piece, Part)
            else re.sub(pattern, _unmarked, piece.replace("\0", " "))
            for piece in self.pieces
        ]
        return "".join(found)


def _unmarked(marker: re.Match[str]) -> str:
    return f"< {marker[0][1:]}"


def read(
    messages: Sequence[Mapping[str, Any]], known: Collection[str], limits: Limits
) -> Conversation:
    """Takes messages apart.

    Args:
      messages: of OpenAI's form.
      known: modalities of the model.
      limits: of their number and their words.

    Raises:
      ApiError: a message that cannot be read; names it.
    """
    if not 0 < len(messages) <= limits.messages:
        raise wrong(f"messages: not between 1 and {limits.messages} of them", "messages")
    turns, system = _turns(messages, known)
    if not turns or turns[-1].role != USER:
        raise wrong("messages: the last one is not the user's", "messages")
    if not (turns[-1].said or turns[-1].parts):
        raise wrong("messages: the last one asks nothing", "messages")
    parts = tuple(part for turn in turns for part in turn.parts)
    names = sorted({part.modality for part in parts})
    marked = any(turn.surrounded for turn in turns)
    texts = [(turn.role, turn.text(marked, names)) for turn in turns]
    if sum(len(text) for _, text in texts) + sum(map(len, system)) > limits.text:
        raise wrong(f"messages: more than {limits.text:,} characters", "messages")
    last = frozenset() if turns[-1].said else frozenset(p.modality for p in turns[-1].parts)
    return Conversation(_rounds(texts, system), parts, last)


def _turns(
    messages: Sequence[Mapping[str, Any]], known: Collection[str]
) -> tuple[list[Turn], list[str]]:
    """(turns of user and assistant, what the system says)."""
    turns: list[Turn] = []
    system: list[str] = []
    for number, message in enumerate(messages):
        param, role = f"messages[{number}]", message.get("role")
        if role not in (*SYSTEM, USER, ASSISTANT):
            raise wrong(f"{param}.role: is not system, user or assistant", f"{param}.role")
        pieces = _pieces(message.get("content"), f"{param}.content", known)
        turn = Turn(role, pieces)
        if turn.parts and role != USER:
            raise wrong(f"{param}: files are the user's alone", param)
        if role in SYSTEM:
            system.append(turn.text(False, ()))
        elif turns and turns[-1].role == role:
            turns[-1].pieces += ["\n", *pieces]
        else:
            turns.append(turn)
    return turns, system


def _rounds(texts: Sequence[tuple[str, str]], system: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Questions with their answers; what the system says stands before the first question."""
    if texts[0][0] != USER:
        texts = [(USER, ""), *texts]
    questions = [text for role, text in texts if role == USER]
    answers = [text for role, text in texts if role == ASSISTANT]
    questions[0] = "\n".join(filter(None, [*system, questions[0]]))
    return tuple(zip(questions, [*answers, ""], strict=True))


def _pieces(content: object, param: str, known: Collection[str]) -> list[Piece]:
    """Words and files of a message's content, in order."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise wrong(f"{param}: is neither a text nor a list of parts", param)
    return [_piece(part, f"{param}[{number}]", known) for number, part in enumerate(content)]


def _piece(part: Any, place: str, known: Collection[str]) -> Piece:
    kind = part.get("type") if isinstance(part, dict) else None
    kind = kind if isinstance(kind, str) else ""
    if kind in WORDS:
        said = part.get(WORDS[kind])
        if not isinstance(said, str):
            raise wrong(f"{place}.{WORDS[kind]}: is no text", place)
        return said
    if kind not in FILES:
        what = f"{place}.type: is none of {', '.join([*WORDS, *FILES])}"
        raise wrong(what, f"{place}.type")
    modality, field = FILES[kind]
    if modality not in known:
        raise wrong(f"{place}: this model reads no {modality}", place, "unsupported_modality")
    inner = part.get(kind)
    text = inner.get(field) if isinstance(inner, dict) else inner
    if not isinstance(text, str) or not text:
        raise wrong(f"{place}.{kind}.{field}: is no text", place)
    return Part(modality, place, text)
