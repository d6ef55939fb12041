"""Finds modules and classes by name: a new file is a new choice, without a registry."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from xllm_jax.core.errors import UserError


def choices(package: str, needs: str = "") -> list[str]:
    """Names of the modules of a package, sorted; with `needs` of those that have that attribute."""
    path = importlib.import_module(package).__path__
    names = sorted(info.name for info in pkgutil.iter_modules(path))
    if not needs:
        return names
    return [n for n in names if hasattr(importlib.import_module(f"{package}.{n}"), needs)]


def module(package: str, name: str, field: str = "", needs: str = "") -> ModuleType:
    """Imports `package.name`.

    Args:
      package: dotted name.
      name: of the file in it.
      field: of the stage that named it, for errors.
      needs: attribute that tells a choice from the package's other modules.

    Raises:
      UserError: the package has no such module; names the nearest one.
    """
    known = choices(package, needs)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"unknown name {name!r}", field=field, hint=f"{hint}Choices: {', '.join(known)}"
        )
    return importlib.import_module(f"{package}.{name}")


def size_row(sizes: Mapping[str, Mapping[str, Any]], name: str, field: str) -> dict[str, Any]:
    """A row of a network's SIZES.

    Args:
      sizes: {name: fields}; the first row is the network as it was published.
      name: of the row; 'real' is the published one.
      field: where the name stands, for the error.

    Raises:
      UserError: no such row.
    """
    chosen = next(iter(sizes)) if name == "real" else name
    if chosen not in sizes:
        raise UserError(f"unknown size {name!r}", field=field, hint=f"Choices: {', '.join(sizes)}")
    return dict(sizes[chosen])


def attribute(package: str, name: str, field: str = "") -> tuple[ModuleType, Any]:
    """Resolves 'file.Attribute' inside a package, or 'other_package.module:Attribute' outside.

    Files of a folder in the package are 'folder.file.Attribute'.

    Args:
      package: dotted name that files are looked up in.
      name: the attribute.
      field: of the stage that named it, for errors.

    Returns:
      (module, attribute).

    Raises:
      UserError: no such module or attribute.
    """
    if ":" in name:
        return imported(name, field)
    first, *rest = name.split(".")
    found = module(package, first, field)
    while len(rest) > 1 and hasattr(found, "__path__"):
        found = module(found.__name__, rest.pop(0), field)
    attribute_name, hint = ".".join(rest), "Write it as 'file.Class'"
    if hasattr(found, "__path__") or not rest:
        raise UserError(f"{name!r} names a folder or a file", field=field, hint=hint)
    if not hasattr(found, attribute_name):
        file = found.__name__.removeprefix(f"{package}.").replace(".", "/")
        raise UserError(f"{file}.py has no {attribute_name!r}", field=field, hint=hint)
    return found, getattr(found, attribute_name)


def imported(name: str, field: str = "") -> tuple[ModuleType, Any]:
    """Resolves 'package.module:Attribute', of anything that Python can import.

    Returns:
      (module, attribute).

    Raises:
      UserError: the module cannot be imported, or lacks the attribute.
    """
    path, _, attribute_name = name.partition(":")
    hint = "Write it as 'package.module:NAME'; the module must be installed or on PYTHONPATH"
    try:
        found = importlib.import_module(path)
    except (ImportError, ValueError, TypeError) as error:
        what = f"{path!r} cannot be imported ({error})"
        raise UserError(what, field=field, hint=hint) from error
    if not hasattr(found, attribute_name):
        raise UserError(f"{path} has no {attribute_name!r}", field=field, hint=hint)
    return found, getattr(found, attribute_name)
