"""Serves a trained X-LLM: OpenAI's interface for text, pictures, clips and speech, and a web page.

    xllm serve --checkpoint=demo/runs/stage3
    xllm serve --checkpoint=demo/runs/stage3 --outputs=RUN             # answers with pictures, too
    xllm serve --checkpoint=RUN --host=0.0.0.0 --server_names=gpu1.example.org --api_key_file=keys

Any client of OpenAI's works with base_url http://127.0.0.1:8000/v1. Only this machine reaches the
server unless --host says otherwise, which needs keys. No URL is fetched unless --fetch_hosts names
its host. SIGTERM lets what runs finish, for --drain seconds; a second one ends it at once.
docs/serving.md has the routes, the limits and what is logged.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from xllm_jax.core.errors import UserError
from xllm_jax.inference import load_run
from xllm_jax.launch import cli, drawing, other_base

if TYPE_CHECKING:
    from xllm_jax.core.stage import Stage
    from xllm_jax.data.media.decode_workers import Decoders
    from xllm_jax.inference.load_run import Restored
    from xllm_jax.serve.easel import Easel
    from xllm_jax.serve.lifecycle import Server
    from xllm_jax.serve.limits import Limits
    from xllm_jax.serve.security import Keys, Names
    from xllm_jax.serve.service import Service

NEEDS = {
    "fastapi",
    "uvicorn",
    "sse_starlette",
    "prometheus_client",
    "websockets",
    "python_multipart",
}

flags.adopt_module_key_flags(drawing)
flags.adopt_module_key_flags(other_base)

CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder of a finished run, such as demo/runs/stage3.",
    required=True,
    allow_override=True,
)
ASR = flags.DEFINE_string(
    "asr",
    "",
    "Folder of a stage-1 speech run that transcribes; by default the LLM does.",
    allow_override=True,
)
NAME = flags.DEFINE_string("model_name", "", "Name that clients ask for; by default the folder's.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 takes one that is free.", 0, 65535)
KEYS = flags.DEFINE_string("api_key_file", "", "File of the keys that clients need, one a line.")
OPEN = flags.DEFINE_bool("open", False, "Let other machines ask without a key.")
NAMES = flags.DEFINE_multi_string(
    "server_names", [], "Further name that the server may be called by in Host headers."
)
ORIGINS = flags.DEFINE_multi_string(
    "origins", [], "Origin of other pages that may ask from a browser: https://page.example.org."
)
FETCH = flags.DEFINE_multi_string(
    "fetch_hosts", [], "Host that files may be fetched from by URL, as HOST or HOST:PORT."
)
PAGE = flags.DEFINE_bool("page", True, "Also serve the web page, at /page.", allow_override=True)
SLOTS = flags.DEFINE_integer(
    "slots", 8, "Requests that are decoded at a time.", 1, 4096, allow_override=True
)
LENGTH = flags.DEFINE_integer(
    "length", 512, "Tokens of a prompt, files included.", 16, 1 << 20, allow_override=True
)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 256, "Tokens of an answer, at most.", 2, 1 << 20, allow_override=True
)
QUEUE = flags.DEFINE_integer("queue", 64, "Requests that may wait; more are refused.", 1, 1 << 20)
QUEUE_SECONDS = flags.DEFINE_float(
    "queue_seconds", 60.0, "Seconds that a request may wait for a slot.", 0.001
)
REQUEST_SECONDS = flags.DEFINE_float(
    "request_seconds", 300.0, "Seconds that a request may take in all.", 0.001
)
CACHE = flags.DEFINE_float(
    "cache", 1.0, "Gigabytes of encoded files that are remembered.", 0.0, allow_override=True
)
DRAIN = flags.DEFINE_float("drain", 30.0, "Seconds that requests may take to end at SIGTERM.", 0.0)
BODY = flags.DEFINE_float("max_body", 64.0, "Megabytes of a request.", 0.001)
FILES = flags.DEFINE_integer("max_files", 16, "Files of a request.", 1)
PIXELS = flags.DEFINE_integer("max_pixels", 40_000_000, "Pixels of a picture or a frame.", 1)
FRAMES = flags.DEFINE_integer("max_frames", 36_000, "Frames of a clip.", 1)
CLIP = flags.DEFINE_float("max_clip_seconds", 600.0, "Seconds of a clip.", 0.001)
SOUND = flags.DEFINE_float("max_sound_seconds", 60.0, "Seconds of a sound.", 0.001)
DEADLINE = flags.DEFINE_float(
    "deadline", 20.0, "Seconds that decoding a file may take.", 0.001, allow_override=True
)
MEMORY = flags.DEFINE_float("memory", 2.0, "Gigabytes that decoding a file may take.", 0.01)
CONTEXTS = flags.DEFINE_float(
    "contexts",
    0.5,
    "Gigabytes on the device of prompts that are remembered; the same one again is not read again.",
    0.0,
    allow_override=True,
)
SIZES = flags.DEFINE_multi_string(
    "picture_sizes",
    [],
    "Further size that pictures may be asked for in, as WIDTHxHEIGHT; each is compiled beforehand.",
)
BATCH = flags.DEFINE_integer(
    "draw_batch", 1, "Pictures of one size that are drawn at once.", 1, 64, allow_override=True
)
LOG_TEXT = flags.DEFINE_bool("log_text", False, "Also log questions and answers.")


def main(_: list[str]) -> int:
    check_installed()
    keys, names = who(), called()
    server, opened = made(keys, names)
    name, where = server.served.card.name, _reached(opened)
    print(f"Serving {name} at http://{where}/v1. Warming up.", flush=True)
    server.run(sockets=[opened])
    code = 130 if server.ended_by == 2 else 0
    if server.busy:  # a warm-up, whose compiler would abort the process while Python ends
        os._exit(code)
    return code


def check_installed() -> None:
    """Raises `UserError` where the server's libraries are missing."""
    missing = list(name for name in NEEDS if importlib.util.find_spec(name) is None)
    if missing:
        hint = "pip install -e '.[serve]', or '.[demo]' with the web page"
        raise UserError(f"{missing[0]} is not installed", hint=hint)


def who() -> Keys:
    """The keys that clients need.

    Raises:
      UserError: other machines would reach the server without one.
    """
    from xllm_jax.serve import addresses
    from xllm_jax.serve.security import Keys

    if KEYS.value:
        return Keys.load(KEYS.value)
    if not addresses.is_loopback(HOST.value) and not OPEN.value:
        what = f"{HOST.value} lets other machines ask, and there are no keys"
        raise UserError(what, field="--host", hint="Give --api_key_file=FILE, or --open")
    return Keys()


def called() -> Names:
    """The names that requests may call the server by."""
    from xllm_jax.serve import app
    from xllm_jax.serve.security import Names

    own = HOST.value.strip("[]").lower()
    anywhere = own in ("0.0.0.0", "::") and OPEN.value and not NAMES.value
    hosts = {*app.LOOPBACK, own, *map(str.lower, NAMES.value), *(["*"] if anywhere else [])}
    return Names(frozenset(hosts), frozenset(ORIGINS.value))


def limits() -> Limits:
    """Of requests, by the flags."""
    from xllm_jax.serve.limits import Limits

    body = int(BODY.value * 1e6)
    return Limits(
        body=body,
        bodies=8 * body,
        medium=body,
        media=FILES.value,
        pixels=PIXELS.value,
        frames=FRAMES.value,
        clip_seconds=CLIP.value,
        sound_seconds=SOUND.value,
        decode_seconds=DEADLINE.value,
        decode_memory=MEMORY.value,
    )


def made(keys: Keys, names: Names) -> tuple[Server, socket.socket]:
    """(the server, the socket that it listens at); what is wrong is told before loading."""
    from xllm_jax.data.media.decode_workers import Decoders
    from xllm_jax.serve import app, lifecycle, page

    artist = easel(load_run.stage_of(CHECKPOINT.value, drawing.OUTPUTS.value))
    bounds, opened = limits(), lifecycle.listen(HOST.value, PORT.value)
    loaded = load_run.load_run(
        CHECKPOINT.value, outputs=drawing.OUTPUTS.value, base=other_base.BASE.value
    )
    restored = within_deadline(loaded, bounds)
    data = restored.stage.data
    workers = Decoders(data)
    served, add = service(restored, workers, bounds, artist), None
    if PAGE.value and page.installed():
        url = f"http://{_reached(opened)}"
        add = page.Adder(served, keys, url, lambda file: workers.seen(file, data), data.root)
    elif PAGE.value:
        print("No web page: pip install -e '.[demo]'", file=sys.stderr, flush=True)
    application = app.create(served, keys, names, sys.stdout, add)
    return lifecycle.Server(application, served, DRAIN.value), opened


def _reached(opened: socket.socket) -> str:
    """Where this machine reaches what listens at a socket."""
    host, port = opened.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def easel(stage: Stage) -> Easel | None:
    """What draws the pictures of a run's answers, looked at before anything large is read.

    Raises:
      UserError: a decoder or a flag of pictures does not fit, or a flag has no effect.
    """
    import jax

    from xllm_jax.core import mesh
    from xllm_jax.inference import decoder_base
    from xllm_jax.serve.easel import Easel, Style

    bases = {}
    for name in sorted(stage.outputs):
        base = drawing.decoder(stage, name)
        if base is None:
            line = f"No decoder of {name} ({decoder_base.missing(stage, name)}): it is not drawn"
            print(line, file=sys.stderr, flush=True)
        else:
            bases[name] = base
    if not bases:
        why, hint = "where nothing is drawn", "Give --outputs=RUN, whose decoder is there"
        drawing.check_unused(why, hint, SIZES.name, BATCH.name)
        return None
    style = Style(
        drawing.STEPS.value,
        drawing.GUIDANCE.value,
        BATCH.value,
        QUEUE.value,
        REQUEST_SECONDS.value,
    )
    alone = jax.device_count() == 1
    more = [drawing.pixels(one, "--picture_sizes") for one in SIZES.value]
    turned = [(height, width) for width, height in filter(None, more)]
    own = drawing.pixels(drawing.SIZE.value)
    return Easel(bases, style, own, turned, None if alone else mesh.make(stage.mesh))


def service(restored: Restored, workers: Decoders, bounds: Limits, artist: Easel | None) -> Service:
    """The model with all that is around it."""
    from xllm_jax.serve import hearing
    from xllm_jax.serve.fetch import Fetcher
    from xllm_jax.serve.media_input import MediaReader
    from xllm_jax.serve.metrics import Metrics
    from xllm_jax.serve.scheduler import Options, Scheduler
    from xllm_jax.serve.service import Card, Service

    options = Options(
        slots=SLOTS.value,
        length=LENGTH.value,
        max_tokens=MAX_TOKENS.value,
        queue=QUEUE.value,
        queue_seconds=QUEUE_SECONDS.value,
        request_seconds=REQUEST_SECONDS.value,
        cache_bytes=int(CACHE.value * 1e9),
        context_bytes=int(CONTEXTS.value * 1e9),
    )
    engine = Scheduler(restored, options)
    names = tuple(name for name, _, _ in restored.model.modalities)
    folder = Path(CHECKPOINT.value).resolve()
    written = int((load_run.final(folder)).stat().st_mtime)
    card = Card(NAME.value or folder.name, names, written, MAX_TOKENS.value)
    fetch = Fetcher(frozenset(FETCH.value), bounds.medium, bounds.fetch_seconds)
    if ASR.value:
        listener = within_deadline(load_run.load_run(ASR.value), bounds)
        ears: hearing.Ears | None = hearing.ASREars(listener, workers.load)
    else:
        ears = hearing.by_default(restored, workers.load)
    return Service(
        engine,
        card,
        bounds,
        MediaReader(bounds, fetch, workers.facts),
        Metrics(lambda: {**engine.metrics(), **(artist.metrics() if artist else {})}),
        artist,
        ears,
        LOG_TEXT.value,
    )


def within_deadline(restored: Restored, bounds: Limits) -> Restored:
    """A run whose files are decoded by workers that are killed when they are late."""
    data = dataclasses.replace(
        restored.stage.data,
        deadline=bounds.decode_seconds,
        memory=bounds.decode_memory,
        threads=bounds.decoders,
    )
    stage = dataclasses.replace(restored.stage, data=data)
    return dataclasses.replace(restored, stage=stage)


if __name__ == "__main__":
    cli.run(main)
