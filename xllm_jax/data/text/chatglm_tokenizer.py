"""Ids and text of ChatGLM, from `ice_text.model` alone: no code of the checkpoint is run."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from xllm_jax.core import atomic, bounded, disk
from xllm_jax.core.errors import UserError
from xllm_jax.data.text.glm_layout import Specials

MODEL_FILE = "ice_text.model"
CONTROLS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
LINE, TAB = "<n>", "<|tab|>"
LONGEST_BLANK = 80
BLANKS = re.compile(f" {{2,{LONGEST_BLANK}}}")
# What stands for a run of spaces; any other number is text that the LLM wrote.
BLANK_PIECE = re.compile(r"<\|blank_([2-9]|[1-7][0-9]|80)\|>")
IMAGE_PIECE = re.compile(r"<image_([0-9]{1,9})>")

# Published names of the special tokens that are found inside a text. The others, such as [gMASK],
# are plain text when somebody types them.
SPLITTING = ("bos_token", "eos_token", "mask_token", "pad_token", "unk_token")
DEFAULTS = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "mask_token": "[MASK]",
    "gmask_token": "[gMASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
# Keys of the LLM's config.json that must agree with the tokenizer's ids.
CHECKED = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "mask_token_id": "mask_token",
    "gmask_token_id": "gmask_token",
}


def blank(length: int) -> str:
    """Piece that stands for a run of 2 to 80 spaces."""
    return f"<|blank_{length}|>"


class ChatGLMTokenizer:
    """ChatGLM-6B's tokenizer.

    Args:
      folder: with `ice_text.model`, and `tokenizer_config.json` and `config.json` where there are.
      image_tokens: ids in front of the text pieces (20000 in the first release); None reads
        `num_image_tokens`, whose default is 20000 as in the reference.

    Attributes:
      specials: ids for `data/text/glm_layout.py`. unk: id of <unk>.
      pieces: ids with a meaning; vocab: rows of the LLM's embedding (config.json), at least that.

    Raises:
      UserError: no model file, or config.json names other special ids.
    """

    def __init__(self, folder: str | Path, image_tokens: int | None = None):
        path = Path(folder) / MODEL_FILE
        if not path.exists():
            raise UserError("no such file", field=str(path), hint="Give the tokenizer's folder")
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self._options = DEFAULTS | _read_json(Path(folder) / "tokenizer_config.json")
        configured: Any = self._options.get("num_image_tokens", 20000)
        self.image_tokens: int = configured if image_tokens is None else image_tokens
        self.pieces = self._model.get_piece_size() + self.image_tokens
        names = [self._options[name] for name in SPLITTING]
        self._split = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        self.specials = Specials(
            mask=self._named("mask_token"),
            gmask=self._named("gmask_token"),
            sop=self._named("bos_token"),
            eop=self._named("eos_token"),
            pad=self._named("pad_token"),
        )
        self.unk = self._named("unk_token")
        config = _read_json(Path(folder) / "config.json")
        self._check_config(config, str(Path(folder) / "config.json"))
        self.vocab = max(config.get("vocab_size", 0), self.pieces)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; `special` appends [gMASK] <sop>, which is how a prompt ends."""
        ids: list[int] = []
        for part, found in self._parts(text):
            ids += [self.piece_id(part)] if found else self._ids(part)
        return [*ids, self.specials.gmask, self.specials.sop] if special else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Padding, image tokens and ids without a piece are left out.

        The LLM has more rows than there are pieces; an id past them can be generated and must not
        end an evaluation.
        """
        kept = [int(token) for token in ids if int(token) != self.specials.pad]
        kept = [i - self.image_tokens for i in kept if self.image_tokens <= i < self.pieces]
        text = self._model.decode(kept).replace(LINE, "\n").replace(TAB, "\t")
        return BLANK_PIECE.sub(lambda found: " " * int(found.group(1)), text)

    def piece_id(self, piece: str) -> int:
        """Id of a piece; <unk>'s when there is none."""
        image = IMAGE_PIECE.fullmatch(piece)
        if image and int(image.group(1)) < self.image_tokens:
            return int(image.group(1))
        return self._model.piece_to_id(piece) + self.image_tokens

    def piece(self, token: int) -> str:
        """Piece of an id, '' for an id that has none."""
        if token < self.image_tokens:
            return f"<image_{token}>"
        return self._model.id_to_piece(token - self.image_tokens) if token < self.pieces else ""

    def pair(self, prompt: str, answer: str) -> list[int]:
        """`prompt [gMASK] <sop> answer <eop>`."""
        return [*self.encode(prompt, special=True), *self.encode(answer), self.specials.eop]

    def _parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """(special token, True) and (what stands between them, as the model reads it, False)."""
        start, after_special = 0, False
        for match in self._split.finditer(text):
            yield self._normalized(text[start : match.start()], after_special, True), False
            yield match.group(), True
            start, after_special = match.end(), True
        yield self._normalized(text[start:], after_special, False), False

    def _ids(self, text: str) -> list[int]:
        ids = self._model.encode(text)
        return [index + self.image_tokens for index in ids] if self.image_tokens else ids

    def _normalized(self, text: str, left_cut: bool, right_cut: bool) -> str:
        text = text.lstrip() if left_cut else text
        text = text.rstrip() if right_cut else text
        if self._options.get("remove_space"):
            text = " ".join(text.split())
        if self._options.get("do_lower_case"):
            text = text.lower()
        text = text.replace("\n", LINE).replace("\t", TAB)
        if "  " not in text:
            return text
        return BLANKS.sub(lambda run: blank(len(run.group())), text)

    def _named(self, name: str) -> int:
        piece = self._options[name]
        piece = piece["content"] if isinstance(piece, dict) else piece
        index = self._model.piece_to_id(piece)
        if self._model.id_to_piece(index) != piece:
            raise UserError(f"the tokenizer has no piece {piece!r}", field=name)
        return index + self.image_tokens

    def _check_config(self, config: dict[str, Any], path: str) -> None:
        for key, name in CHECKED.items():
            expected = self._named(name)
            if config.get(key, expected) != expected:
                raise UserError(
                    f"{key} is {config[key]}, but the tokenizer says {expected}",
                    field=path,
                    hint="Tokenizer and checkpoint are of different releases",
                )


def train_tokenizer(
    texts: Sequence[str],
    folder: str | Path,
    learned: int = 300,
    longest: int = 16,
    words: Sequence[str] = (),
) -> Path:
    """Trains a small tokenizer in ChatGLM's layout (unigram, every character kept, byte fallback).

    Args:
      texts: training text.
      folder: where `ice_text.model` and `tokenizer_config.json` are written.
      learned: pieces learnt from the text; never fewer than it has characters. 349 fixed ones
        (special tokens, line break, tab, blanks, bytes) are added.
      longest: characters of a learnt piece, at most.
      words: pieces that the texts are always cut at, whatever is learnt.

    Returns:
      The folder.
    """
    folder = Path(folder)
    disk.make_folder(folder)
    fixed = 4 + 1 + len(CONTROLS) + 1 + (LONGEST_BLANK - 1) + 256
    characters = len(set("".join(texts))) + 1
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        model_type="unigram",
        vocab_size=fixed + len(words) + max(learned, characters),
        max_sentencepiece_length=longest,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        control_symbols=list(CONTROLS),
        user_defined_symbols=[LINE, TAB, *map(blank, range(2, LONGEST_BLANK + 1)), *words],
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    with atomic.whole(folder / MODEL_FILE) as partial:
        partial.write_bytes(_reordered(written.getvalue()))
    options = DEFAULTS | {"end_token": "</s>", "num_image_tokens": 0}
    atomic.write_json(folder / "tokenizer_config.json", options)
    atomic.remove_partial(folder, {MODEL_FILE, "tokenizer_config.json"})
    return folder


def _reordered(model: bytes) -> bytes:
    """Puts the pieces into the published order: learned ones before special tokens and bytes."""
    proto = _model_message().FromString(model)
    late = [*CONTROLS, TAB, *map(blank, range(2, LONGEST_BLANK + 1))]
    late += [f"<0x{byte:02X}>" for byte in range(256)]
    order = {piece: number for number, piece in enumerate(late, start=1)}
    pieces = sorted(proto.pieces, key=lambda piece: order.get(piece.piece, 0))
    first = [p for p in pieces if p.piece in ("<unk>", "<s>", "</s>", "<pad>", LINE)]
    rest = [p for p in pieces if p not in first]
    del proto.pieces[:]
    proto.pieces.extend(first + rest)
    return proto.SerializeToString()


def _model_message() -> Any:
    """The class of SentencePiece's model file, as far as it is edited here; all else in it is kept.

    The class that sentencepiece ships demands the version of protobuf that it was generated with,
    and each package that needs protobuf has limits of its own: Apache Beam refuses version 7.
    """
    file = descriptor_pb2.FileDescriptorProto(name="pieces.proto", package="xllm_jax")
    piece, model = (file.message_type.add(name=name) for name in ("Piece", "Model"))
    field = descriptor_pb2.FieldDescriptorProto
    piece.field.add(name="piece", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    pieces = model.field.add(name="pieces", number=1, type=field.TYPE_MESSAGE)
    pieces.label, pieces.type_name = field.LABEL_REPEATED, ".xllm_jax.Piece"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("xllm_jax.Model"))


def _read_json(path: Path) -> dict[str, Any]:
    return bounded.read_json(path) if path.exists() else {}
