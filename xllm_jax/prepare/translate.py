"""English to Chinese by mBART-50, as the paper translated its data.

The model is a folder of `facebook/mbart-large-50-many-to-many-mmt` as published (config.json,
sentencepiece.bpe.model, weights). transformers has no mBART without PyTorch
(its Flax models went with version 5), and a port would serve this one preparing step: so PyTorch is
imported here, when a text is translated, and nowhere that trains or reads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import bounded, checksum, damage
from xllm_jax.core.errors import UserError

MODEL_FILE = "sentencepiece.bpe.model"
PAD, END, UNK, SHIFT = 1, 2, 3, 1  # <s> is 0; pieces stand one higher than in the model
BEAMS = 5  # the published generation_config.json's


class Translator:
    """mBART-50 of a folder, loaded once per process, when it is first asked.

    Args:
      folder: of the model.
      source, target: language codes of mBART-50.
      beams: of the search; greedy with 1.
    """

    def __init__(
        self, folder: str, source: str = "en_XX", target: str = "zh_CN", beams: int = BEAMS
    ):
        self.folder, self.source, self.target, self.beams = folder, source, target, beams
        self._loaded: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}

    @property
    def identity(self) -> str:
        """Hash of what translations depend on; the same model may move to another folder."""
        config = bounded.read_text(Path(self.folder) / "config.json")
        return checksum.of_json([config, self.source, self.target, self.beams])

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Translates some texts at once.

        Raises:
          UserError: no PyTorch, no such model, or one that does not know the languages.
        """
        import torch

        model, vocabulary = self._load()
        most = model.config.max_position_embeddings
        rows = [vocabulary.encode(text, self.source, most) for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        first = vocabulary.language(self.target)
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids,
                attention_mask=(ids != PAD).long(),
                forced_bos_token_id=first,
                num_beams=self.beams,
            )
        return [vocabulary.decode(row) for row in made.tolist()]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            check(self.folder)
            from transformers import MBartForConditionalGeneration

            names, told = ("config.json", MODEL_FILE), "no mBART-50 model"
            with damage.given_to_library(self.folder, *names, told=told):
                vocabulary = Vocabulary(self.folder)
                for code in (self.source, self.target):
                    vocabulary.language(code)
                model = MBartForConditionalGeneration.from_pretrained(self.folder).eval()
            self._loaded = model, vocabulary
        return self._loaded


class Vocabulary:
    """Ids of mBART-50: those of its SentencePiece model, moved by one, then 52 languages.

    transformers reads that model through protocol buffers of a newer version than Beam allows, so
    the two could not be installed together.
    """

    def __init__(self, folder: str):
        import sentencepiece
        from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES

        path = str(Path(folder) / MODEL_FILE)
        self._folder = folder
        self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        self._languages = list(FAIRSEQ_LANGUAGE_CODES)
        self._pieces = self._model.get_piece_size()

    def language(self, code: str) -> int:
        """Id of a language.

        Raises:
          UserError: mBART-50 does not know it.
        """
        if code not in self._languages:
            hint = f"Choices: {', '.join(self._languages)}"
            raise UserError(f"knows no language {code!r}", field=self._folder, hint=hint)
        return self._pieces + SHIFT + self._languages.index(code)

    def encode(self, text: str, language: str, most: int) -> list[int]:
        """The language, the text and the end, cut to `most` ids."""
        unknown = self._model.unk_id()
        ids = [UNK if i == unknown else i + SHIFT for i in self._model.encode(text)]
        return [self.language(language), *ids[: most - 2], END]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special ones."""
        kept = [i - SHIFT for i in ids if UNK < i < self._pieces + SHIFT]
        return self._model.decode(kept).strip()


def check(folder: str) -> None:
    """Looks whether a folder may be a model, and PyTorch is there, before any work is done.

    Raises:
      UserError: not so.
    """
    for name in ("config.json", MODEL_FILE):
        if not (Path(folder) / name).is_file():
            hint = "A folder of facebook/mbart-large-50-many-to-many-mmt, or give --translations"
            raise UserError(f"has no {name}", field=folder, hint=hint)
    if importlib.util.find_spec("torch") is None:
        hint = "pip install -e '.[prepare,convert]', or give --translations"
        raise UserError("PyTorch is not installed", field="--translator", hint=hint)
