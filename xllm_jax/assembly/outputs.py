"""The output side of a stage: which parts answer in which modality, and whether they fit."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params
from xllm_jax.data.media import target_pictures
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.outputs.unet import UNet
from xllm_jax.models.xllm import LLM, SIGNALS, XLLM

MEAN = "mean"  # of the LLM's other rows: how signal tokens may begin


def registry(stage: Stage) -> tuple[tuple[str, int, int], ...]:
    """(modality, id of its first signal token, tokens of a run), by modality."""
    return tuple((name, one.first, one.count) for name, one in sorted(stage.data.signals.items()))


def rows(stage: Stage) -> tuple[tuple[str, str, str], ...]:
    """(modality, projection part, text encoder part or ''), see `XLLM.outputs`."""
    return tuple((n, out.projection, out.text_encoder) for n, out in sorted(stage.outputs.items()))


def tokens(stage: Stage, part: str) -> dict[str, int]:
    """The field `tokens` of a projection: positions of a run of its modality; {} of other parts."""
    named = [name for name, out in stage.outputs.items() if out.projection == part]
    spans = {len(one.ids) for name, one in stage.data.signals.items() if name in named}
    return {"tokens": max(spans)} if spans else {}


def denoisers(stage: Stage) -> dict[str, tuple[str, str]]:
    """{modality: (UNet part, autoencoder part)}, see `XLLM.denoisers`."""
    return {
        name: (out.unet, out.autoencoder)
        for name, out in sorted(stage.outputs.items())
        if out.unet or out.autoencoder
    }


def check(stage: Stage, model: XLLM) -> None:
    """Looks whether signal tokens, projections and text encoders fit each other and the LLM.

    Raises:
      UserError: names the field that does not.
    """
    _check_names(stage, model)
    for name, projection, encoder in model.outputs:
        field, networks = f"outputs.{name}", model.networks
        for part in filter(None, (projection, encoder)):
            if part not in networks:
                what, hint = f"names the part {part!r}, which parts lacks", ", ".join(networks)
                raise UserError(what, field=field, hint=f"Choices: {hint}")
        made = networks.get(projection)
        if made is None or not hasattr(made, "output_width"):
            what = f"{projection!r} is no output projection"
            raise UserError(what, field=field, hint="See xllm_jax/models/outputs/projection.py")
        llm = networks[LLM]
        _same(f"parts.{projection}.fields.llm_width", made.llm_width, LLM, llm.width)
        if encoder:
            width, length = networks[encoder].width, stage.data.caption_length
            _same(f"parts.{projection}.fields.output_width", made.output_width, encoder, width)
            _same("data.caption_length", length, f"{projection}'s queries", made.queries)
        deepest = max(abs(layer + (layer < 0)) for layer in made.llm_layers)
        if deepest > llm.depth:
            what = f"names layer {deepest} of an LLM that has {llm.depth}"
            hint = f"Layers are counted from 1 to {llm.depth}; -1 is behind the final norm"
            raise UserError(what, field=f"parts.{projection}.fields.llm_layers", hint=hint)
    for name, parts in model.denoisers.items():
        _check_denoiser(stage, model, name, *parts)


def _check_denoiser(stage: Stage, model: XLLM, name: str, unet: str, autoencoder: str) -> None:
    """Raises UserError unless a denoising loss can go through these parts."""
    for field, part, kind in (("unet", unet, UNet), ("autoencoder", autoencoder, Autoencoder)):
        if not isinstance(model.networks.get(part), kind):
            what = f"{part!r} is no part whose network is of the kind {kind.__name__}"
            hint = "A denoising loss needs both, see configs/stage_output_denoising.py"
            raise UserError(what, field=f"outputs.{name}.{field}", hint=hint)
    networks = model.networks
    projection, vae = networks[model.output(name)[0]], networks[autoencoder]
    field = f"parts.{unet}.fields"
    _same(f"{field}.text_width", networks[unet].text_width, "projection", projection.output_width)
    _same(
        f"{field}.latent_channels",
        networks[unet].latent_channels,
        autoencoder,
        vae.latent_channels,
    )
    side, field = stage.data.signals[name].pixels, f"data.signals.{name}.pixels"
    if side and name not in target_pictures.KINDS:
        hint = f"Of {', '.join(target_pictures.KINDS)} alone; say 0"
        raise UserError("no file shows this modality", field=field, hint=hint)
    if side % vae.factor:
        what = f"{side} is no multiple of the autoencoder's factor {vae.factor}"
        raise UserError(what, field=field, hint="Choose another side, such as 512")


def _check_names(stage: Stage, model: XLLM) -> None:
    """Raises UserError unless outputs, signal tokens and their part name the same modalities."""
    signals = stage.data.signals
    odd = sorted(stage.outputs.keys() ^ signals.keys())
    if odd:
        hint = f"Give {odd[0]} a row in both, or in none"
        raise UserError("is not in both outputs and data.signals", field=odd[0], hint=hint)
    if not signals:
        return
    if SIGNALS not in model.networks or LLM not in model.networks:
        what = f"needs the parts {LLM!r} and {SIGNALS!r}"
        raise UserError(what, field="data.signals", hint="See configs/stage_output_image.py")
    llm = model.networks[LLM]
    _same(f"parts.{SIGNALS}.fields.width", model.networks[SIGNALS].width, LLM, llm.width)
    taken: dict[int, str] = {}
    for name, first, count in registry(stage):
        field, end = f"data.signals.{name}.first", first + count
        if end > llm.vocab:
            what = f"ends at {end}, and the LLM has {llm.vocab} rows"
            raise UserError(what, field=field, hint="Take spare rows of its vocabulary")
        for token in range(first, end):
            if token in taken:
                what = f"shares the id {token} with {taken[token]}"
                raise UserError(what, field=field, hint="Begin behind the other's last token")
            taken[token] = name


def _same(field: str, have: object, other: str, wanted: object) -> None:
    if have != wanted:
        what = f"is {have}, and {other} has {wanted}"
        raise UserError(what, field=field, hint=f"Say --config.{field}={wanted}")


def start_signals(model: XLLM, params: Params, drawn: Collection[str]) -> Params:
    """Gives rows of signal tokens that were drawn the mean of the LLM's other rows, where asked.

    Args:
      model: its networks.
      params: all parameters.
      drawn: paths of those that come from nowhere.
    """
    network = model.networks.get(SIGNALS)
    fresh = [path.partition("/")[2] for path in sorted(drawn) if path.startswith(f"{SIGNALS}/")]
    if network is None or network.initial != MEAN or not fresh or LLM not in params:
        return params
    spare = jnp.array([first + n for _, first, count in network.registry for n in range(count)])
    made = dict(params[SIGNALS])
    for name in fresh:
        # Without a head of its own, the LLM's word embedding is its head.
        table = params[LLM].get(name.rpartition("_")[2], params[LLM]["embedding"])
        filled = _filled(made[name], table, spare)
        made[name] = jax.device_put(filled, made[name].sharding)
    return {**params, SIGNALS: made}


@jax.jit
def _filled(rows: jax.Array, table: jax.Array, spare: jax.Array) -> jax.Array:
    """`rows` with the mean of the table's rows that are not `spare`."""
    others = jnp.ones(table.shape[0]).at[spare].set(0.0)
    mean = jnp.einsum("v,vd->d", others, table.astype(jnp.float32)) / others.sum()
    return jnp.broadcast_to(mean, rows.shape).astype(rows.dtype)
