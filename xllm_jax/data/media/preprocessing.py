"""What the values of media depend on beside the fields of a stage: defaults, and libraries.

Another version of a library may give other pixels: Pillow 12.3 and 13.0 differ by up to two gray
levels in 5 % of the values of a resized picture. So versions are compared wherever values of
before meet values of now: by a feature cache, by the hosts of a run, and by a run that resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.media import modalities
from xllm_jax.data.media.modality import Modality

CHOICES = ("same", "any")
HINT = "Install what made them, or go on with --config.data.libraries=any"
LIBRARY = "library "  # begins the names of libraries among the settings


def _pillow() -> str:
    import PIL
    from PIL import features

    return f"{PIL.__version__} (libjpeg {_codec(features.version('libjpeg_turbo'))})"


def _codec(version: str | None) -> str:
    return f"turbo {version}" if version else "of the system"


def _pyav() -> str:
    import av

    return av.__version__


def _ffmpeg() -> str:
    import av

    parts = ("libavformat", "libavcodec", "libswscale")
    numbers = [".".join(map(str, av.library_versions[part])) for part in parts]
    return ", ".join(f"{part} {number}" for part, number in zip(parts, numbers, strict=True))


def _soxr() -> str:
    import soxr

    return f"{soxr.__version__} (libsoxr {soxr.__libsoxr_version__})"


def _sndfile() -> str:
    import soundfile

    return soundfile.__libsndfile_version__


def _scipy() -> str:
    import scipy

    return scipy.__version__


VERSIONS: Mapping[str, Callable[[], str]] = {
    "Pillow": _pillow,
    "PyAV": _pyav,
    "FFmpeg": _ffmpeg,
    "soxr": _soxr,
    "libsndfile": _sndfile,
    "SciPy": _scipy,
}


def of_modality(found: Modality, data: Data) -> dict[str, str]:
    """{setting or library: value or version} of one modality.

    Raises:
      UserError: a value that there is not, or a library of a foreign modality is not installed.
    """
    versions = {f"{LIBRARY}{name}": _version(name) for name in found.libraries}
    return dict(found.settings(data)) | versions


def of_data(names: Iterable[str], data: Data) -> dict[str, str]:
    """The same of several modalities."""
    found: dict[str, str] = {}
    for name in sorted(names):
        found |= of_modality(modalities.find(name, data), data)
    return found


def _version(name: str) -> str:
    if name in VERSIONS:
        return VERSIONS[name]()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise UserError("is not installed", field=f"library {name}") from error


def compare(
    then: Mapping[str, str], now: Mapping[str, str], when: str, choice: str, hint: str = ""
) -> None:
    """Stops where media are read otherwise than before; what only one side knows is no change.

    Args:
      then: {setting or library: value or version} that was written down.
      now: of this process.
      when: that was, in words.
      choice: 'same', or 'any' where other libraries may go on, as `Data.libraries` says.
      hint: what else the user may do about it.

    Raises:
      UserError: something differs that may not; names all of it. Unknown choice.
    """
    changed = [name for name in sorted(then.keys() & now.keys()) if then[name] != now[name]]
    if not changed:
        return
    if choice not in CHOICES:
        unknown = f"unknown choice {choice!r}"
        raise UserError(unknown, field="data.libraries", hint=" or ".join(CHOICES))
    what = "; ".join(f"{name} was {then[name]} {when} and is {now[name]} now" for name in changed)
    if choice == "any" and all(map(is_library, changed)):
        print(f"Media may differ by rounding: {what}", file=sys.stderr, flush=True)
        return
    raise UserError(f"media are read otherwise: {what}", hint=hint or HINT)


def is_library(name: str) -> bool:
    """Whether a setting is the version of a library."""
    return name.startswith(LIBRARY)
