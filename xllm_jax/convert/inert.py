"""Stand-ins for the settings that trainers pickle beside their tensors.

fairseq keeps its arguments as `argparse.Namespace`, others theirs in omegaconf, Lightning's
dictionaries or NumPy's scalars, and PyTorch's `weights_only` reader refuses a file for naming any
of them. Names of the closed list below are read as boxes that take their contents and do nothing:
the classes are never imported, nothing of theirs ever runs. A file that names anything else is
refused.
"""

from __future__ import annotations

import collections
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from xllm_jax.convert import dry_run

LEGACY = 5  # pickles before PyTorch 1.6: number, version, machine, content, names of storages
LIBRARIES = (
    "omegaconf",
    "fairseq",
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "transformers",
    "accelerate",
    "deepspeed",
)
"""Packages whose objects are settings, counters and states of a trainer, and no weights."""

MAPPING = re.compile(
    r"collections\.defaultdict|(yacs\.config\.CfgNode|easydict\.EasyDict|addict(\.addict)?\.Dict"
    r"|(pytorch_lightning|lightning|lightning_fabric)\..*\.AttributeDict)"
)
"""Classes that are filled entry by entry, as a dict is."""

BOX = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|typing\.\w+|pathlib(\._local)?\.\w*Path"
    r"|datetime\.(date|time|datetime|timedelta|timezone)|decimal\.Decimal|uuid\.UUID"
    r"|copyreg\._reconstructor"
    r"|builtins\.(object|dict|list|tuple|int|float|complex|str|bool|bytes|bytearray|set"
    r"|frozenset|range|slice)"
    r"|collections\.ChainMap|fractions\.Fraction"
    r"|numpy(\._?core\.(multiarray|numeric))?\.(scalar|_reconstruct|_frombuffer|ndarray|dtype)"
    r"|numpy\.(dtypes\.\w+DType|bool_?|u?int\d+|float\d+)"
    r"|(" + "|".join(LIBRARIES) + r")\.[\w.]+"
)


class Box:
    """Takes what an object is made of; of what comes as a dict, its entries become attributes."""

    def __init__(self, *_: object, **__: object):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update({str(name): value for name, value in state.items()})


class Queue:
    """Makes an empty list, which takes what is appended to a deque."""

    def __new__(cls, *_: object, **__: object) -> Any:
        """Returns the list instead of an instance."""
        return []


class Entries:
    """Makes an empty OrderedDict, the one kind of dict whose attributes the reader fills too."""

    def __new__(cls, *_: object, **__: object) -> Any:
        """Returns the dict instead of an instance."""
        return collections.OrderedDict()


def named(path: Path) -> set[str]:
    """Classes and functions that a file of `torch.save` names; nothing is built or run.

    Raises:
      Exception: of any kind, where it is none, or would swell or hang while it is read.
    """
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            _refuse_tar(file.read(tarfile.BLOCKSIZE))
            file.seek(0)
            return dry_run.names(file, size, LEGACY)
    with zipfile.ZipFile(path) as archive:
        inside = archive.namelist()
        (content,) = [name for name in inside if name.endswith("data.pkl")]
        if content.partition("/")[0] != inside[0].partition("/")[0]:  # where PyTorch looks for it
            raise ValueError("several files in one")
        if archive.getinfo(content).file_size > dry_run.MOST_BYTES:
            raise ValueError("too long a description")
        with archive.open(content) as file:
            return dry_run.names(cast(BinaryIO, file), size)


def _refuse_tar(block: bytes) -> None:
    """PyTorch would read a tar of its first years, whose headers can be of any length."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return
    raise ValueError("a tar")


def stand_ins(names: set[str]) -> list[tuple[Any, str]]:
    """(stand-in, name) of those names that are on the lists, as `safe_globals` takes them."""
    pairs = [(_stand_in(name), name) for name in sorted(names)]
    return [(made, name) for made, name in pairs if made is not Box or BOX.fullmatch(name)]


def _stand_in(name: str) -> Any:
    if name == "collections.deque":
        return Queue
    return Entries if MAPPING.fullmatch(name) else Box


def settings(content: Any) -> dict[str, Any]:
    """The model's settings in a checkpoint of fairseq, such as its number of heads; else nothing.

    They stand in `cfg.model` or, from before fairseq 0.10, in `args`.
    """
    if not isinstance(content, Mapping):
        return {}
    config = content.get("cfg")
    for place in (
        config.get("model") if isinstance(config, Mapping) else None,
        content.get("args"),
    ):
        if isinstance(place, Mapping | Box):
            return dict(place) if isinstance(place, Mapping) else vars(place)
    return {}
