"""Path rules: the one mechanism that decides sharding, trainability, weight decay and dtype.

A rule table is an ordered tuple of (pattern, value) rows. A pattern is a regular expression that
must match a whole parameter path such as ``image_interface/qformer/queries``; the first row that
matches wins. Tables are total (every leaf has a row) and used (every row has a leaf), so a typo in
either direction is an error and not a silent default.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from xllm_jax.core.errors import UserError

Rules = tuple[tuple[str, Any], ...]
Tree = Mapping[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns {path: leaf} of nested dicts; paths join the keys with '/', in sorted order."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping):
            flat.update({f"{key}/{rest}": leaf for rest, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`: {path: leaf} to nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def first_match(rules: Rules, path: str) -> int | None:
    """Returns the number of the first row whose pattern matches the whole path, or None."""
    return next((i for i, (pattern, _) in enumerate(rules) if re.fullmatch(pattern, path)), None)


def assign(rules: Rules, tree: Tree, *, what: str = "rules", total: bool = True) -> dict[str, Any]:
    """Returns a tree like `tree` that holds each leaf's value from `rules`.

    Args:
      rules: ordered (pattern, value) rows.
      tree: nested dicts; only the paths are read.
      what: the table's name, for errors.
      total: also demand that every row matches a leaf.

    Raises:
      UserError: a leaf without a row, or a row without a leaf.
    """
    rows = {path: first_match(rules, path) for path in flatten(tree)}
    missing = [path for path, row in rows.items() if row is None]
    if missing:
        raise UserError(
            f"no row matches parameter {missing[0]!r} ({len(missing)} without a row)",
            field=what,
            hint="Add a row whose pattern matches the whole path",
        )
    if total:
        check_used([pattern for pattern, _ in rules], rows, what=what)
    return unflatten({path: rules[row][1] for path, row in rows.items() if row is not None})


def check_used(patterns: Iterable[str], paths: Iterable[str], *, what: str) -> None:
    """Raises UserError naming the first pattern that matches none of `paths`."""
    paths = list(paths)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.3)
            raise UserError(
                f"pattern {pattern!r} matches no parameter",
                field=what,
                hint=f"Nearest parameter: {near[0]!r}" if near else "Remove the row",
            )


def split(patterns: Iterable[str], tree: Tree, *, what: str = "trainable") -> tuple[dict, dict]:
    """Splits a tree into the part that matches any pattern and the rest.

    Splitting before the gradient is taken is what keeps XLA from computing weight gradients of
    frozen leaves; masking afterwards would not.

    Raises:
      UserError: a pattern that matches nothing.
    """
    patterns = tuple(patterns)
    flat = flatten(tree)
    check_used(patterns, flat, what=what)
    chosen = {p for p in flat if any(re.fullmatch(pattern, p) for pattern in patterns)}
    return (
        unflatten({p: leaf for p, leaf in flat.items() if p in chosen}),
        unflatten({p: leaf for p, leaf in flat.items() if p not in chosen}),
    )


def join(first: Tree, second: Tree) -> dict[str, Any]:
    """Puts the two halves of `split` together again; a leaf in both halves is an error."""
    one, two = flatten(first), flatten(second)
    shared = one.keys() & two.keys()
    if shared:
        raise ValueError(f"parameter in both halves: {sorted(shared)[0]}")
    return unflatten(one | two)
