"""A Stage becomes networks; they hold no parameters."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from xllm_jax.assembly import adapters, fit, outputs
from xllm_jax.core import lookup, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Part, Stage
from xllm_jax.core.types import Params
from xllm_jax.data import cached_features
from xllm_jax.models import layers
from xllm_jax.models.xllm import XLLM

MODELS = "xllm_jax.models"


def network(part: Part, stage: Stage, name: str) -> nn.Module:
    """Builds one part's network from its SIZES row, the part's own fields and the stage's dtype.

    Args:
      part: names the network, its size and fields.
      stage: gives dtype, `remat` and `unroll`.
      name: of the part, for errors.

    Raises:
      UserError: unknown network, size, field or choice of `remat`, or heads that do not divide.
    """
    file, kind = lookup.attribute(MODELS, part.network, f"parts.{name}.network")
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        what = f"{part.network} is no network"
        raise UserError(what, field=f"parts.{name}.network", hint="Name a class of flax.linen")
    for table in ("SIZES", "SHARDING"):
        if not hasattr(file, table):
            what = f"{part.network.partition(':')[0]} has no {table}"
            hint = "See xllm_jax/models/vit.py"
            raise UserError(what, field=f"parts.{name}.network", hint=hint)
    row = lookup.size_row(file.SIZES, part.size, f"parts.{name}.size")
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = set(part.fields) - known
    if unknown:
        raise UserError(
            f"{part.network} has no field {sorted(unknown)[0]!r}",
            field=f"parts.{name}.fields",
            hint=f"Choices: {', '.join(sorted(known - {'parent', 'name'}))}",
        )
    if stage.remat not in layers.REMAT:
        choices = ", ".join(layers.REMAT)
        raise UserError(
            f"unknown choice {stage.remat!r}", field="remat", hint=f"Choices: {choices}"
        )
    common = {"dtype": jnp.dtype(stage.compute), "remat": stage.remat, "unroll": stage.unroll}
    common["registry"] = outputs.registry(stage)
    common |= outputs.tokens(stage, name)
    common = {key: value for key, value in common.items() if key in known}
    given = {**row, **common, **part.fields}
    width, heads = given.get("width"), given.get("heads")
    if width and heads and width % heads:
        raise UserError(
            f"width {width} is no multiple of {heads} heads",
            field=f"parts.{name}.fields",
            hint="Change 'width' or 'heads'",
        )
    activation = given.get("activation", "gelu")
    if activation not in layers.ACTIVATIONS:
        raise UserError(
            f"unknown activation {activation!r}",
            field=f"parts.{name}.fields.activation",
            hint=f"Choices: {', '.join(layers.ACTIVATIONS)}",
        )
    return kind(**given)


def model(stage: Stage) -> XLLM:
    """Composes the networks of a stage; holds no parameters.

    Raises:
      UserError: a modality or an output names a part that the stage does not have or that does not
        fit, `data.cache` is not a cache of features, or media files hold what the networks do not
        take.
    """
    networks = {name: network(part, stage, name) for name, part in stage.parts.items()}
    rows = tuple((name, m.encoder, m.interface) for name, m in stage.modalities.items())
    for name, *parts in rows:
        for part in parts:
            if part not in networks:
                raise UserError(
                    f"names the part {part!r}, which parts lacks",
                    field=f"modalities.{name}",
                    hint=f"Choices: {', '.join(networks)}",
                )
    made = XLLM(
        networks=networks,
        modalities=rows,
        outputs=outputs.rows(stage),
        spans={name: len(one.ids) for name, one in stage.data.signals.items()},
        denoisers=outputs.denoisers(stage),
    )
    outputs.check(stage, made)
    fit.check(stage, made)
    made = dataclasses.replace(made, frozen=frozen_sections(stage, made))
    given = given_sections(stage, made)
    cached = cached_features.steps(stage.data.cache) if stage.data.cache else {}
    return dataclasses.replace(made, cached=given | cached, given=given)


def given_sections(stage: Stage, xllm: XLLM) -> dict[str, int]:
    """{modality: how many of its first sections its files hold the outcome of}.

    Args:
      stage: `data.speech_features` names the last of these sections.
      xllm: its networks, with `frozen`.

    Raises:
      UserError: there is no such section, it trains, or it gives vectors of another width.
    """
    found = {}
    for modality, _, interface in xllm.modalities:
        field, chain = f"data.{modality}_features", xllm.chain(modality)
        last = getattr(stage.data, f"{modality}_features", "")
        if not last:
            continue
        ends = [
            n for n, section in enumerate(chain, 1) if section.names and section.names[-1] == last
        ]
        if not ends:
            raise UserError(
                f"{interface} has no section {last!r}", field=field, hint="Leave it out"
            )
        if xllm.frozen[modality] < ends[0]:
            what = f"{chain[xllm.frozen[modality]]} trains, and the files of {modality} hold"
            raise UserError(f"{what} its outcome", field="trainable", hint=f"Or leave out {field}")
        found[modality] = ends[0]
        _check_width(stage, modality, xllm.networks[interface].encoder_width)
    return found


def _check_width(stage: Stage, modality: str, wanted: int) -> None:
    """Raises UserError where the vectors of a modality's files are not as wide as wanted."""
    width = getattr(stage.data, f"{modality}_width")
    if width != wanted:
        what = f"is {width}, and {stage.modalities[modality].interface} reads vectors of {wanted}"
        hint = "Set it, or the encoder_width of the interface, to the width of the files"
        raise UserError(what, field=f"data.{modality}_width", hint=hint)


def frozen_sections(stage: Stage, xllm: XLLM) -> dict[str, int]:
    """{modality: how many of its first sections hold nothing that trains}; of captions, too."""
    parts = {part for modality, *pair in xllm.modalities for part in pair}
    parts |= set(xllm.encoders.values())
    tree = {name: shapes_of(xllm.networks[name]) for name in sorted(parts)}
    tree = adapters.held(stage.lora, xllm.networks, tree)
    patterns = tuple((pattern, None) for pattern in adapters.allowed(stage))
    trains = [p for p in rules.flatten(tree) if rules.first_match(patterns, p) is not None]

    def count(modality: str) -> int:
        sections = xllm.chain(modality)
        first = (
            n for n, section in enumerate(sections) if any(section.owns(path) for path in trains)
        )
        return next(first, len(sections))

    return {name: count(name) for name in (*(n for n, *_ in xllm.modalities), *xllm.encoders)}


def init_params(network: nn.Module, key: jax.Array) -> Params:
    """Float32 parameters of one network, drawn from a key."""
    return dict(network.init({"params": key}, *network.example())["params"])


def shapes_of(network: nn.Module) -> Params:
    """Shapes of one network's parameters, without allocating anything.

    Networks that are equal are traced once, which takes longer than all else before a run begins.
    """
    try:
        found = _traced(network)
    except TypeError:  # a field that has no hash, such as a dict
        found = _traced.__wrapped__(network)
    return jax.tree.map(lambda x: x, found)


@functools.lru_cache(maxsize=256)
def _traced(network: nn.Module) -> Params:
    return jax.eval_shape(lambda: init_params(network, jax.random.key(0)))


def shapes(xllm: XLLM) -> Params:
    """Shapes of every parameter, `{part: tree}`, without allocating anything.

    What works only on media whose outputs come cached is left out.
    """
    unread = xllm.unread()
    tree = {name: shapes_of(network) for name, network in xllm.networks.items()}
    if not unread:
        return tree
    flat = rules.flatten(tree)
    return rules.unflatten(
        {path: x for path, x in flat.items() if not any(section.owns(path) for section in unread)}
    )
