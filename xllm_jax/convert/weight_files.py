"""Which files of a folder are its weights: those that an index or a known name makes so.

A trainer's folder holds its optimizer, its random states and its arguments beside them, a download
what another program left there. None of these is opened.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from xllm_jax.convert import bounds
from xllm_jax.core.errors import UserError

ENDS = ("safetensors", "bin", "pth", "pt", "ckpt")
"""In this order: repositories often hold several forms of the same weights."""
STEMS = (
    "model",
    "pytorch_model",
    "diffusion_pytorch_model",
    "open_clip_model",
    "open_clip_pytorch_model",
)
"""Names that transformers, diffusers and open_clip give to weights."""
VARIANTS = ("", "fp32", "bf16", "fp16", "non_ema")
"""Words that diffusers puts into the names of other forms of the same weights, the best first."""
VARIANT = re.compile(rf"\.({'|'.join(VARIANTS[1:])})(?=[-.])")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
BESIDE = re.compile(
    r"\..*|(training_args|trainer_state|optimizer|optim|scheduler|lr_scheduler|scaler|rng_state"
    r"|random_states|sampler|dataloader|custom_checkpoint|arguments)([_.-].*)?\.\w+"
    r"|.*[_-]optim_states\.\w+"
)
"""What trainers and file systems leave beside weights."""


def index_of(folder: Path) -> Path | None:
    """The index of shards that a folder is read by; None where it has none.

    That of a variant counts only where there are no weights of a better one.
    """
    known = [path for end in ENDS for path in sorted(folder.glob(f"*.{end}.index*.json"))]
    known = [path for path in known if not BESIDE.fullmatch(path.name)]
    best = min(
        [*known, *(p for end in ENDS for p in _weights(folder, end))], key=_rank, default=None
    )
    return next((path for path in known if _rank(path) == _rank(best)), None) if best else None


def _rank(path: Path) -> int:
    """Place of a file's variant among VARIANTS."""
    found = VARIANT.search(path.name)
    return VARIANTS.index(found[1] if found else "")


def _weights(folder: Path, end: str) -> list[Path]:
    files = (path for path in sorted(folder.glob(f"*.{end}")) if path.is_file())
    return [path for path in files if not BESIDE.fullmatch(path.name)]


def shards_of(index: Path) -> dict[str, str]:
    """{tensor: name of the shard} of an index.

    Raises:
      UserError: it is no index, or names files outside of its folder.
    """
    try:
        places = dict(bounds.read_json(index)["weight_map"].items())
        outside = next((name for name in places.values() if Path(name).name != name), None)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"not an index of shards ({type(error).__name__})",
            field=str(index),
            hint="Download it again",
        ) from error
    if outside is not None:
        what = f"names {outside[: bounds.SHOWN]!r}, which is no file of this folder"
        raise UserError(what, field=str(index), hint="Download it again")
    return places


def without_index(folder: Path) -> list[Path]:
    """The files that a folder without an index is read by.

    Raises:
      UserError: there is none, one of several shards is missing, or several files of unknown names
        may be meant.
    """
    for variant, end in itertools.product(VARIANTS, ENDS):
        files = [p for p in _weights(folder, end) if _rank(p) == VARIANTS.index(variant)]
        for stem in STEMS:
            name = ".".join(filter(None, (stem, variant, end)))
            if folder / name in files:
                return [folder / name]
        shards = [path for path in files if SHARD.fullmatch(path.stem)]
        if shards:
            return _whole(shards)
        if len(files) > 1:
            raise UserError(
                f"{', '.join(path.name for path in files[:4])}: several files may be the weights",
                field=str(folder),
                hint="Give one of them as --input, or the index of the shards beside them",
            )
        if files:
            return files
    raise UserError(
        f"no checkpoint here ({', '.join(f'.{end}' for end in ENDS)})",
        field=str(folder),
        hint="Give the folder or file of the published checkpoint",
    )


def _whole(shards: list[Path]) -> list[Path]:
    """The shards of the first name, each of which must be there."""
    matches = [match for path in shards if (match := SHARD.fullmatch(path.stem))]
    stem, count = matches[0][1], matches[0][3]
    end = shards[0].suffix
    names = [f"{stem}-{n:05d}-of-{count}{end}" for n in range(1, int(count) + 1)]
    for name in names:
        if not (shards[0].parent / name).is_file():
            raise UserError(
                f"this shard of {int(count)} is missing",
                field=str(shards[0].parent / name),
                hint="Download it again",
            )
    return [shards[0].parent / name for name in names]
