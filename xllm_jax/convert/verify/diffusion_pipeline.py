"""The recorded pipeline of Stable Diffusion, from given latents and from words, and its pixels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert.verify.diffusion_model import Pipeline, first_channels, last_channels
from xllm_jax.convert.verify.recording import Replay, read_json
from xllm_jax.data.media import image
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer
from xllm_jax.inference.render import Renderer, fitted
from xllm_jax.models.outputs import scheduler_config

UNGUIDED_STEPS, WORDS_STEPS, WORDS_GUIDANCE = 4, 5, 7.5


def values(replay: Replay, pipeline: Pipeline) -> None:
    """Both schedulers with guidance, DDIM without, and a caption's way from its words."""
    without, given = (replay.input(f"{name}prompt_embeds") for name in ("negative_", ""))
    noise = last_channels(replay.input("latents"))
    scale = float(replay.input("guidance_scale"))
    steps = int(replay.input("num_inference_steps"))
    for name in ("pndm", "ddim"):
        draws = renderer(pipeline, name)
        table = draws.scheduler.table(steps)
        replay.compare(f"{name}.timesteps", table.calls.time.astype(np.int64))
        latents, traced = draws.latents(noise, given, table, scale, without, trace=True)
        after = np.moveaxis(np.asarray(traced[1]), -1, 2)
        replay.compare(f"{name}.latents_after_step", after)
        _pixels(replay, name, draws, latents)
    draws = renderer(pipeline, "ddim")
    table = draws.scheduler.table(UNGUIDED_STEPS)
    latents, _ = draws.latents(noise, given, table, 1.0)
    _pixels(replay, "ddim_unguided", draws, latents)
    replay.attempt(_from_text, pipeline, draws, noise[:1])


def _pixels(replay: Replay, name: str, draws: Renderer, latents: jax.Array) -> None:
    signed = draws.decoded(latents)
    replay.compare(f"{name}.image", jnp.clip(signed / 2 + 0.5, 0, 1))
    # Values near a half of a pixel's step may be rounded to either side.
    pixels, uint8 = image.from_signed(np.asarray(signed)), f"{name}.image_uint8"
    if uint8 in replay:
        apart = np.abs(pixels.astype(int) - replay.recorded(uint8).astype(int)).max()
        replay.check(uint8, float(apart), 1.0, "steps of a pixel")


def _from_text(replay: Replay, pipeline: Pipeline, draws: Renderer, noise: jax.Array) -> None:
    text, params = pipeline.network("text_encoder"), pipeline.params("text_encoder")
    tokenizer = ClipTokenizer(pipeline.folder / "tokenizer")
    caption = read_json(replay.folder / "cases_clip.json")["captions"][0]
    ids = tokenizer.encode([caption, ""], text.positions)
    given, without = text.apply({"params": params}, jnp.asarray(ids), method="states")
    replay.compare("encoded.prompt_embeds", given[None])
    replay.compare("encoded.negative_prompt_embeds", without[None])
    table = draws.scheduler.table(WORDS_STEPS)
    latents, _ = draws.latents(noise, given[None], table, WORDS_GUIDANCE, without)
    _pixels(replay, "from_text", draws, latents)


def renderer(pipeline: Pipeline, scheduler: str) -> Renderer:
    """The recorded networks behind a scheduler, a key of `scheduler_config.KINDS`."""
    config = read_json(pipeline.folder / "scheduler/scheduler_config.json")
    text = pipeline.network("text_encoder")
    return Renderer(
        pipeline.network("unet"),
        pipeline.network("vae"),
        {part: pipeline.params(part) for part in ("unet", "vae")},
        scheduler_config.parse(config, scheduler),
        np.zeros((text.positions, text.width), np.float32),
    )


def preprocessing(replay: Replay, pipeline: Pipeline) -> None:
    """Pixels to what the autoencoder reads and back, and the scaling of latents."""
    replay.compare("preprocessed", first_channels(image.to_signed(replay.input("image_uint8"))))
    sized = fitted(replay.input("odd_uint8"), 8)
    replay.compare("odd_resized_uint8", sized)
    replay.compare("odd_preprocessed", first_channels(image.to_signed(sized)[None]))
    decoded = np.moveaxis(replay.input("decoded"), 1, -1)
    replay.compare("postprocessed", np.clip(decoded / 2 + 0.5, 0, 1))
    replay.compare("postprocessed_uint8", image.from_signed(decoded))
    scaling, latents = pipeline.network("vae").scaling, replay.input("latents")
    replay.compare("scaled_latents", latents * np.float32(scaling))
    replay.compare("unscaled_latents", latents / np.float32(scaling))
