"""The texts of any source in Chinese, as the paper translated its English sets: every text once.

    OUTPUT/SPLIT.jsonl, SPLIT.npy       text and translation, for the reader's option `captions`
    OUTPUT/SPLIT_translated.json        counts, and the texts that are left out with their reasons
    OUTPUT/translations/, answers/      what a translator has made so far (prepare/translators.py)

Read the source with the same reader and `captions=OUTPUT`. Captions, regions, questions, answers
and rounds are translated; numbers and Chinese stay as they are. A translation that is empty,
overlong, not Chinese, or repeats itself or others is left out with its records, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, checksum, sharded_job
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import guarded, mixture
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.translated import same
from xllm_jax.prepare import runner, translation_faults, translators
from xllm_jax.prepare.endpoint import Endpoint

CHUNK = 4096  # records that are read together


def build(
    input: str,
    output: str,
    reader: str,
    split: str = "train",
    options: Mapping[str, Any] | None = None,
    translations: str = "",
    translator: str = "",
    endpoint: Endpoint | None = None,
    beam: Sequence[str] = (),
    workers: int = 0,
    allow_paths: Sequence[str] = (),
) -> dict[str, Any]:
    """Translates one split.

    Args:
      input: where the source lies.
      output: folder of the translation.
      reader: of the source.
      split: of the source.
      options: of the reader.
      translations, translator, endpoint: as of `translators.Way`.
      beam, workers: as of `runner.mapped`.
      allow_paths: folders that the source's files may lie in, too.

    Returns:
      {'texts' (without doubles), 'translated', 'left_out': {reason: texts}, 'unreadable'
      (records)}, and what an endpoint cost.

    Raises:
      UserError: what the reader and the translator raise, the output holds the translation of
        another reader, or no text has a usable one.
    """
    way = translators.Way(translations, translator, endpoint)
    source = Source(reader, input, split, dict(options or {}), tuple(allow_paths))
    begin(source, output)
    found, unreadable = read(source, output, beam, workers)
    texts = unique(found)
    made, cost = translators.outputs(texts, way, output, split, beam, workers)
    table, reasons = translation_faults.judged(made)
    left_out = dict(Counter(reasons.values()).most_common())
    counts = {"texts": len(texts), "translated": len(table), "left_out": left_out}
    counts |= {"unreadable": unreadable, **cost}
    atomic.write_json(Path(output) / f"{split}_translated.json", counts | {"reasons": reasons})
    if not table:
        what = f"translates no text ({', '.join(left_out) or 'none needs it'})"
        raise UserError(what, field=way.name)
    translated.write(Path(output) / f"{split}.jsonl", table)
    atomic.remove_partial(Path(output))
    return counts


def begin(source: Source, output: str) -> None:
    """Takes a folder for a source; `translations` of another reader in it would be replaced."""
    about = {"reader": source.reader, "options": dict(source.options)}
    file = Path(output) / f"{source.split}.plan.json"
    hint = "Choose another --output, or empty it"

    def difference(held: dict[str, Any]) -> str:
        return f"the translation of {held['reader']} with the options {held['options']}"

    sharded_job.begin(file, checksum.of_json(about), about, difference, hint)


def read(
    source: Source, output: str, beam: Sequence[str] = (), workers: int = 0
) -> tuple[list[str], int]:
    """(every text of a source that needs a translation, records that cannot be read).

    Raises:
      UserError: no record can be read.
    """
    count = len(mixture.read(source.reader, source, ""))
    starts, file = range(0, count, CHUNK), Path(output) / f"{source.split}_read.json"
    found = runner.mapped(ReadTexts(source), starts, file, beam, workers)
    unreadable = sum(one["unreadable"] for one in found)
    if unreadable == count:
        raise UserError(f"none of {count} records can be read", field=source.path)
    return sorted({text for one in found for text in one["texts"]}), unreadable


def unique(texts: Iterable[str]) -> list[str]:
    """One of the texts that say the same: the least."""
    least: dict[str, str] = {}
    for text in texts:
        key = same(text)
        least[key] = min(text, least.get(key, text))
    return sorted(least.values())


class ReadTexts:
    """Reads the texts of some records; the source is opened once by every worker."""

    def __init__(self, source: Source):
        self._source, self._found = source, None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": None}

    def __call__(self, start: int) -> dict[str, Any]:
        """{'texts', 'unreadable' (records)} from one place on."""
        if self._found is None:
            self._found = mixture.read(self._source.reader, self._source, "")
        texts, references, unreadable = set(), (), 0
        for place in range(start, min(start + CHUNK, len(self._found))):
            try:
                example = guarded.example(self._found, place)
            except UserError:
                unreadable += 1
                continue
            texts.update(translated.texts(example, but=references))
            references = example.references
        return {"texts": sorted(texts), "unreadable": unreadable}
