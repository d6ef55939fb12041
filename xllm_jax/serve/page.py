"""The web page: a chat about pictures, clips and speech, as a client of the server's own API.

It shows what the model heard in a sound and the frames that it saw of a clip. Where the server
needs keys, the page asks for one before it shows itself. Nothing on it comes from elsewhere.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.util
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.text.instructions import instructions
from xllm_jax.serve import page_messages
from xllm_jax.serve.page_messages import REFUSED, kind
from xllm_jax.serve.security import Keys
from xllm_jax.serve.service import Service

if TYPE_CHECKING:
    import httpx

PATH = "/page"
SHOW_SECONDS = 0.1  # between two states of an answer, each of which goes through gradio as a whole
KEPT_SECONDS = 3600  # that uploads are kept
MODALITY = {"image": "image", "video": "video", "audio": "speech"}
EXAMPLES = (("coco/test", ".jpg", "caption"), ("msrvtt", ".mp4", "video_caption"))
SPEECH = (("aishell/wav/test", ".flac", "asr"),)
WATCH = """
<style>footer {display: none !important}</style>
"""

Frames = Callable[[str], Sequence[np.ndarray]]
"""A clip's file -> the frames that the model sees, `[size, size, 3]` uint8 each."""


def installed() -> bool:
    """Whether the page's library is there."""
    return importlib.util.find_spec("gradio") is not None


@dataclasses.dataclass
class Adder:
    """Adds the page to an application.

    Attributes:
      served: the model.
      keys: that open the server.
      url: of the server.
      frames: of clips.
      world: folder of the synthetic world, from which examples come; '' for none.
    """

    served: Service
    keys: Keys
    url: str
    frames: Frames
    world: str = ""

    def __call__(self, app: Any) -> None:
        """Mounts the page."""
        import gradio
        from gradio.themes import Default
        from starlette.responses import RedirectResponse, Response

        @app.get("/", include_in_schema=False)
        async def root() -> RedirectResponse:
            return RedirectResponse(f"{PATH}/")

        @app.get("/favicon.ico", include_in_schema=False)
        async def icon() -> Response:
            return Response(status_code=204)

        page_messages.register_types()
        auth = (lambda _, key: self.keys.allow(key)) if self.keys.required else None
        gradio.mount_gradio_app(
            app,
            blocks(self),
            path=PATH,
            auth=auth,
            auth_message="Any name, and a key of this server as the password.",
            max_file_size=self.served.limits.medium,
            allowed_paths=[self.world] if self.world else None,
            root_path=PATH,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            theme=Default(font=["sans-serif"], font_mono=["monospace"]),
            head=WATCH,
        )


def blocks(page: Adder) -> Any:
    """The page itself, of gradio's parts."""
    import gradio

    known = page.served.card.modalities
    kinds = [one for one, modality in MODALITY.items() if modality in known]
    title = f"X-LLM: {page.served.card.name}"
    with (
        gradio.Blocks(
            title=title,
            analytics_enabled=False,
            delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
            fill_height=True,
        ) as made,
        gradio.Row(equal_height=False),
    ):
        question = _question(kinds)
        with gradio.Column(scale=1, min_width=240, render=False) as side:
            told = _told()
            settings = _settings(page.served.card.max_tokens)
            _recorders(kinds, question)
        with gradio.Column(scale=3, min_width=320):
            gradio.ChatInterface(
                _asker(page),
                multimodal=True,
                title=title,
                chatbot=_chat(),
                textbox=question,
                additional_inputs=settings,
                additional_outputs=told,
                examples=examples(page.world, known) or None,
                run_examples_on_click=False,
                cache_examples=False,
                flagging_mode="never",
                api_visibility="private",
                concurrency_limit=64,
            )
        side.render()
    return made


def _chat() -> Any:
    import gradio

    # Answers are words: what looks like markup in them is shown as it is.
    return gradio.Chatbot(
        height="60vh",
        elem_id="chat",
        render_markdown=False,
        allow_tags=False,
        show_label=False,
        feedback_options=None,
        buttons=["copy", "copy_all"],
    )


def _question(kinds: Sequence[str]) -> Any:
    import gradio

    sources: list[Any] = ["upload", *(["microphone"] if "audio" in kinds else [])]
    return gradio.MultimodalTextbox(
        sources=sources,
        file_types=page_messages.types(kinds),
        file_count="multiple",
        stop_btn=True,
        placeholder="Ask about pictures, clips or speech",
        elem_id="ask",
        show_label=False,
        render=False,
    )


def _told() -> list[Any]:
    """What the model heard, and the frames that it saw."""
    import gradio

    heard = gradio.Textbox(
        label="What the model heard", lines=2, interactive=False, elem_id="heard"
    )
    seen = gradio.Gallery(
        label="Frames that it saw", columns=2, height=260, elem_id="seen", buttons=[]
    )
    return [heard, seen]


def _settings(most: int) -> list[Any]:
    """Temperature and length."""
    import gradio

    with gradio.Accordion("Settings", open=False):
        return [
            gradio.Slider(0, 2, 0, step=0.05, label="Temperature (0 takes the best)"),
            gradio.Slider(1, most, min(64, most), step=1, label="Tokens of an answer, at most"),
        ]


def _recorders(kinds: Sequence[str], question: object) -> None:
    """A camera for pictures and one for clips, whose recordings join the files of the question."""
    import gradio

    seen = [one for one in ("image", "video") if one in kinds]
    if not seen:
        return
    # A mirrored or muted clip would need an ffmpeg program beside the server.
    sides = {"width": {"ideal": 640}, "height": {"ideal": 480}}  # models look at fewer pixels
    as_seen = gradio.WebcamOptions(mirror=False, constraints={"video": sides})
    with gradio.Accordion("Camera", open=False, elem_id="camera"):
        if "image" in seen:
            _recorder(
                gradio.Image(
                    label="Picture", sources=["webcam"], type="filepath", webcam_options=as_seen
                ),
                question,
            )
        if "video" in seen:
            film = gradio.Video(
                label="Clip", sources=["webcam"], webcam_options=as_seen, include_audio=True
            )
            _recorder(film, question)


def _recorder(camera: Any, question: Any) -> None:
    """Puts what a camera records among the files of the question, and empties the camera."""

    def add(file: str | None, asked: Mapping[str, Any] | None) -> tuple[Any, Any]:
        import gradio

        if not file:
            return gradio.skip(), gradio.skip()
        said = asked or {}
        return None, {"text": said.get("text") or "", "files": [*said.get("files", []), file]}

    camera.change(
        add,
        [camera, question],
        [camera, question],
        show_progress="hidden",
        api_visibility="private",
    )


def examples(world: str, known: Sequence[str]) -> list[list[Any]]:
    """A picture, a clip and a sound of the synthetic world, with what to ask; none elsewhere."""
    if not (world and (Path(world) / "world.json").is_file()):
        return []
    found = []
    for folder, suffix, task in (*EXAMPLES, *SPEECH):
        modality = {".jpg": "image", ".mp4": "video", ".flac": "speech"}[suffix]
        file = next(iter(sorted(Path(world, folder).rglob(f"*{suffix}"))), None)
        if file and modality in known:
            found.append([{"text": instructions(task)[0], "files": [str(file)]}, None, None])
    return found


def _asker(page: Adder) -> Callable[..., AsyncIterator[tuple[Any, Any, Any]]]:
    """What gradio calls with a question; a closure, for it looks at the signature."""

    async def ask(
        message: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        heat: float,
        length: int,
    ) -> AsyncIterator[tuple[Any, Any, Any]]:
        files = message.get("files", [])
        async for piece in answered(page, message.get("text") or "", files, history, heat, length):
            yield piece

    return ask


async def answered(
    page: Adder,
    text: str,
    files: Sequence[str],
    history: Sequence[Mapping[str, Any]],
    heat: float,
    length: int,
) -> AsyncIterator[tuple[Any, Any, Any]]:
    """(answer so far, what was heard, frames that were seen) again and again.

    What the server refuses is told in the answer's place, and the chat goes on without it.

    Args:
      page: it.
      text: the question.
      files: uploaded with it.
      history: of the chat, as gradio keeps it.
      heat: temperature.
      length: tokens of the answer.
    """
    import gradio
    import httpx

    same = gradio.skip()  # the frames would be sent again with every piece
    messages: list[dict[str, Any]] = []
    headers = {"authorization": f"Bearer {page.keys.inside}"}
    async with httpx.AsyncClient(base_url=page.url, headers=headers, timeout=600) as client:
        try:
            last = {"role": "user", "content": page_messages.parts(text, files)}
            messages += [*page_messages.past(history), last]
            body = {
                "model": page.served.card.name,
                "messages": messages,
                "stream": True,
                "temperature": heat,
                "max_tokens": int(length),
            }
            said, drawn, shown = "", [], 0.0
            yield "", *await _taken(page, client, files)
            async for delta in _deltas(client, body):
                # Gradio shows HTML even where it renders no Markdown: words are escaped.
                said += html.escape(delta.get("content") or "", quote=False)
                drawn += [_picture(one) for one in delta.get("images") or []]
                if time.monotonic() - shown >= SHOW_SECONDS:
                    yield [said, *drawn] if drawn else said, same, same
                    shown = time.monotonic()
            yield [said, *drawn] if drawn else said, same, same
        except UserError as error:
            yield _refusal(page_messages.named(error.what, messages)), same, same
        except httpx.HTTPError as error:
            yield _refusal(f"The server does not answer ({type(error).__name__})"), same, same


def _refusal(what: str) -> Any:
    """An answer's place that says why there is none."""
    import gradio

    return gradio.ChatMessage(html.escape(what, quote=False), metadata={"title": REFUSED})


async def _taken(
    page: Adder, client: httpx.AsyncClient, files: Sequence[str]
) -> tuple[str, list[Any]]:
    """(what is heard in some files, the frames that are seen of them)."""
    import asyncio

    heard = [await _heard(client, file) for file in files if kind(file) == "audio"]
    clips = [file for file in files if kind(file) == "video"]
    frames = [one for file in clips for one in await asyncio.to_thread(page.frames, file)]
    return "\n".join(filter(None, heard)), frames


async def _deltas(
    client: httpx.AsyncClient, body: Mapping[str, Any]
) -> AsyncIterator[Mapping[str, Any]]:
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise UserError(_message(await answer.aread()))
        async for line in answer.aiter_lines():
            if not line.startswith("data:") or line == "data: [DONE]":
                continue
            piece = json.loads(line.removeprefix("data:"))
            if "error" in piece:
                raise UserError(piece["error"]["message"])
            for choice in piece["choices"]:
                yield choice["delta"]


async def _heard(client: httpx.AsyncClient, file: str) -> str:
    """What the server hears in a file; '' where it cannot tell."""
    sent = {"file": (Path(file).name, Path(file).read_bytes())}
    answer = await client.post("/v1/audio/transcriptions", files=sent)
    return answer.json().get("text", "") if answer.status_code == 200 else ""


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "The server cannot be understood"


def _picture(part: Mapping[str, Any]) -> Any:
    import io

    import gradio
    from PIL import Image

    _, _, packed = part["image_url"]["url"].partition(",")
    return gradio.Image(Image.open(io.BytesIO(base64.b64decode(packed))), buttons=[])
