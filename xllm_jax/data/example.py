"""Example: what every source yields, before any file is opened."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Example:
    """One training or evaluation example that still points at its files.

    Attributes:
      key: unique name inside its source, used in logs and quarantine lists.
      media: ordered (modality, path) pairs, e.g. ``(('image', 'a.jpg'), ('speech', 'q.flac'))``.
        One pair is one slot of the prompt. `data/media/paths.py` says what a path may be.
      instruction: the question or instruction; empty means that the prompt picks one of the task's
        named instructions.
      answer: the text to be learnt, or the reference answer in evaluation.
      outputs: ordered (modality, caption) pairs of what the answer holds beside text; the n-th
        `<modality>` marker in it stands for the n-th of them, and the others stand at its end.
      pictures: files that show `outputs`, one for each or none at all, '' where nobody has one;
        opened where `data.signals` asks for pixels.
      task: 'caption', 'region', 'vqa', 'asr', 'video_caption', 'spoken_vqa', 'dialogue', 'draw' or
        'text'.
      history: earlier rounds of a dialogue as (question, answer) pairs, oldest first.
      references: every acceptable caption of the same media, for CIDEr and BLEU.
      transcript: what the last speech file says; its token count sizes the speech slot in training.
      tags: properties that reports group by, e.g. 'unseen_pair' or 'color'.
    """

    key: str
    media: tuple[tuple[str, str], ...] = ()
    instruction: str = ""
    answer: str = ""
    task: str = "text"
    history: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...] = ()
    transcript: str = ""
    tags: tuple[str, ...] = ()
    outputs: tuple[tuple[str, str], ...] = ()
    pictures: tuple[str, ...] = ()
