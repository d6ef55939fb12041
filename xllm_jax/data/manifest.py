"""What tells two copies of a stage's data apart without reading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError
from xllm_jax.core.fingerprint import digest
from xllm_jax.core.stage import Data
from xllm_jax.data.batching import batch_format
from xllm_jax.data.example import Example
from xllm_jax.data.media import preprocessing
from xllm_jax.data.text import llm_family

FILES = ("manifest.json", "dataset_info.json")  # of prepared and of TFDS sets: they hold checksums


def manifest(data: Data, sources: Mapping[str, Sequence[Example]]) -> dict[str, str]:
    """{item: text} of a stage's sources, for comparing hosts.

    Args:
      data: of the stage.
      sources: {name: examples} as its readers give them.

    Returns:
      Of each source the number of records, the keys of the first and the last, and the checksum of
      the description that a prepared set has; and what `media_settings` gives.
    """
    folder = Path(data.tokenizer)
    texts = [folder / file for file in llm_family.find(data).files] if data.tokenizer else []
    texts += [Path(file) for file in (data.characters, data.vocabulary) if file]
    found = media_settings(data) | {str(file): _description(file) for file in texts}
    for name, examples in sources.items():
        folder = Path(data.root) / data.sources[name].path
        found[f"{name}: records"] = str(len(examples))
        found[f"{name}: first record"] = _key(examples, 0)
        found[f"{name}: last record"] = _key(examples, len(examples) - 1)
        found |= {f"{name}: {file}": _description(folder / file) for file in FILES}
    return found


def media_settings(data: Data) -> dict[str, str]:
    """{setting or library: value or version} that the values of a stage's media depend on."""
    return preprocessing.of_data(batch_format.find(data).media, data)


def _key(examples: Sequence[Example], index: int) -> str:
    try:
        return examples[index].key
    except UserError as error:
        return f"unreadable ({error.what})"


def _description(file: Path) -> str:
    return digest(bounded.read_bytes(file)) if file.is_file() else "absent"
