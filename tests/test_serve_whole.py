"""The server and the real engine, asked by OpenAI's client: a model that sees, hears and draws."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import time
import urllib.request

import gray_video
import jax
import numpy as np
import openai
import pytest
import served
import small_engine
import small_outputs
import small_runs
from conftest import GOLDEN
from PIL import Image

from xllm_jax.assembly import networks
from xllm_jax.configs import stage3_instruction
from xllm_jax.convert import run_import
from xllm_jax.core import base_description, checkpoint
from xllm_jax.core.stage import Output
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.inference import decoder_base
from xllm_jax.inference.assistant import Assistant
from xllm_jax.inference.load_run import load_run
from xllm_jax.serve import app, hearing
from xllm_jax.serve.easel import Easel, Style
from xllm_jax.serve.request import Request, Sampling
from xllm_jax.serve.scheduler import Options, Scheduler

OPTIONS = Options(slots=3, length=128, max_tokens=12, queue=16)
INTERFACES = tuple(f"{name}_interface" for name in ("image", "video", "speech"))
PLACE = "bases/image_decoder"
QUESTIONS = ("画一个红色的圆", "图中有什么？", "是", "有几个方块", "红色的圆在哪里？")


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """A run that reads all files, joined with one that draws beside the same LLM."""
    folder = tmp_path_factory.mktemp("runs")
    run = small_runs.write_run(small_stage3(), folder / "stage3", INTERFACES)
    run_import.run_import("stable_diffusion", GOLDEN / "diffusion/sd", folder / PLACE)
    made = load_run(run, outputs=drawing_run(folder, run))
    rng = np.random.default_rng(3)
    llm = jax.tree.map(
        lambda x: rng.normal(scale=0.4, size=x.shape).astype(np.float32), made.params["llm"]
    )
    llm = jax.tree_util.tree_map_with_path(small_engine._plain, llm)
    head = rng.normal(scale=0.4, size=made.params["signal_tokens"]["image_head"].shape)
    head[0] *= 12  # so that many answers hold a picture
    signals = made.params["signal_tokens"] | {"image_head": head.astype(np.float32)}
    return dataclasses.replace(made, params=made.params | {"llm": llm, "signal_tokens": signals})


def small_stage3():
    """The miniature of stage 3 with fewer layers."""
    stage = stage3_instruction.get_config("tiny")
    for part in stage.parts.values():
        part.fields["depth"] = 2
    stage.parts["speech_encoder"].fields["depth"] = 3
    stage.parts["speech_encoder"].fields["pools"] = (1, 2)
    stage.parts["llm"].fields |= {"depth": 1, "alpha": 0.5}  # what is asked matters
    told = {"tokenizer": str(small_runs.TOKENIZER), "characters": "", "video": {"frames": 2}}
    return dataclasses.replace(stage, data=dataclasses.replace(stage.data, **told))


def drawing_run(folder, run):
    """A finished run of signal tokens and a projection, beside the LLM of another run."""
    about = base_description.base_about(run / "final")
    text = json.loads((folder / PLACE / "conversion.json").read_text())["options"]["text_encoder"]
    length, width = text["fields"]["positions"], text["fields"]["width"]
    stage = small_outputs.stage(folder)
    stage.parts["llm"] = small_stage3().parts["llm"]
    inner = stage.parts["llm"].fields["width"]
    stage.parts["signal_tokens"].fields["width"] = inner
    fields = {"llm_width": inner, "queries": length, "output_width": width}
    stage.parts["image_projection"].fields |= fields
    stage.parts["text_encoder"].fields |= {"positions": length, "width": width}
    stage.data.caption_length = length
    stage.outputs = {"image": Output("image_projection", "text_encoder", PLACE)}
    trained = ("signal_tokens", "image_projection")
    shapes = networks.shapes(networks.model(stage))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32),
        {part: shapes[part] for part in trained},
    )
    told = {"stage": dataclasses.asdict(stage), "base": {"llm": about["base"]["llm"]}}
    checkpoint.save_base(folder / "drawn/final", params, told)
    return folder / "drawn"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture, a clip and a sound."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.png").write_bytes(served.picture())
    (folder / "a.wav").write_bytes(served.sound(1.0))
    gray_video.write(folder / "a.mp4", 8)
    return {"image": folder / "a.png", "video": folder / "a.mp4", "speech": folder / "a.wav"}


@pytest.fixture(scope="module")
def engine(restored):
    made = Scheduler(restored, OPTIONS, load=modalities.load)
    made.start()
    yield made
    made.stop(0.0)


@pytest.fixture(scope="module")
def easel(restored):
    base = decoder_base.of_stage(restored.stage, "image")
    assert base is not None
    made = Easel({"image": base}, Style(steps=2, batch=2, queue=4), None, [(16, 24)])
    made.warm_up()
    yield made
    made.close()


@pytest.fixture(scope="module")
def site(engine, easel, restored):
    with served.decoders() as workers:
        card = served.Card("mini", ("image", "video", "speech"), 0, OPTIONS.max_tokens)
        ears = hearing.by_default(restored)
        made = served.service(engine, workers, card=card, easel=easel, ears=ears)
        with served.running(app.create(made)) as url:
            yield url, made


@pytest.fixture(scope="module")
def client(site):
    return openai.OpenAI(base_url=f"{site[0]}/v1", api_key="none", max_retries=0, timeout=120)


def asked(files, count: int) -> list[Request]:
    """Questions with any of the files, in any order, greedy and drawn."""
    rng, made = np.random.default_rng(5), []
    for number in range(count):
        names = rng.permutation(sorted(files))[: int(rng.integers(0, 4))]
        media = tuple((str(name), str(files[name])) for name in names)
        words = QUESTIONS[number % len(QUESTIONS)]
        sampling = Sampling(float(rng.choice([0.0, 2.0])), seed=number, logprobs=2)
        made.append(Request(str(number), Example(str(number), media, words), sampling))
    return made


def same(one, other) -> bool:
    """Whether two answers are equal to the last bit, pictures included."""
    plain = [dataclasses.replace(x, pictures=()) for x in (one, other)]
    drawn = [[(p.modality, p.embeddings.tobytes()) for p in x.pictures] for x in (one, other)]
    return plain[0] == plain[1] and drawn[0] == drawn[1]


def test_an_answer_is_the_one_alone_with_real_encoders(engine, files):
    requests = asked(files, 15)
    solo = [engine.submit(one).result(60) for one in requests]
    assert len({one.text for one in solo}) > 5
    assert {True, False} == {bool(one.pictures) for one in solo}
    rng = np.random.default_rng(1)
    for _ in range(20):
        mix = rng.integers(0, len(requests), 5)
        tickets = [engine.submit(requests[number]) for number in mix]
        for number, ticket in zip(mix, tickets):
            assert same(ticket.result(60), solo[number]), requests[number]
    metrics = engine.metrics()
    assert metrics["compilations_since_warm_up_total"] == 0
    assert metrics["pictures_read_total"] > 0 and metrics["context_cache_hits_total"] > 0


def test_a_kept_context_gives_the_same_answer(engine, files):
    """As a prefill of its own: to the last bit, whatever the sampling."""
    for one in asked(files, 8):
        kept = engine.submit(one).result(60)
        engine._slots.contexts.clear()
        assert same(engine.submit(one).result(60), kept)


def test_pictures_are_those_of_the_assistant(engine, restored, files):
    """Which reads answers in another program, whose media stand in tables of their own."""
    model = Assistant(restored, rows=1, max_tokens=OPTIONS.max_tokens)
    found = 0
    for one in [one for one in asked(files, 12) if one.sampling.temperature == 0]:
        (wanted,) = model.replies([one.example])
        ours = engine.submit(one).result(60)
        assert ours.text == wanted.text(model.family)
        assert len(ours.pictures) == len(wanted.pictures[:4])
        for picture, other in zip(ours.pictures, wanted.pictures):
            np.testing.assert_allclose(picture.embeddings, other.embeddings, atol=1e-4)
        found += len(ours.pictures)
    assert found


def part(kind: str, content: bytes) -> dict:
    packed = base64.b64encode(content).decode()
    if kind == "input_audio":
        return {"type": kind, kind: {"data": packed, "format": "wav"}}
    return {"type": kind, kind: {"url": f"data:;base64,{packed}"}}


@pytest.fixture(scope="module")
def question(files):
    kinds = {"image": "image_url", "video": "video_url", "speech": "input_audio"}
    parts = [part(kinds[name], file.read_bytes()) for name, file in files.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTIONS[1]}]}]


def test_one_request_with_a_picture_a_clip_and_speech(client, engine, files, question):
    """Its answer is the engine's own, and a stream's pieces join to it."""
    media = tuple((name, str(file)) for name, file in files.items())
    example = Example("a", media, QUESTIONS[1], task="dialogue")
    alone = engine.submit(Request("a", example, Sampling(1.5, seed=4))).result(60)
    how = {"model": "mini", "messages": question, "temperature": 1.5, "seed": 4}
    whole = client.chat.completions.create(**how)
    assert whole.choices[0].message.content == alone.text
    assert whole.choices[0].finish_reason == alone.finish_reason
    assert whole.usage.prompt_tokens == alone.usage.prompt_tokens > 72
    options = {"include_usage": True}
    pieces = list(client.chat.completions.create(**how, stream=True, stream_options=options))
    told = [one.choices[0].delta.content or "" for one in pieces if one.choices]
    assert "".join(told) == alone.text
    assert pieces[-1].usage == whole.usage


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_the_server_gives_end_at_its_bound(client, engine, field):
    """The bound is told with the model, and an answer that it ends says 'length'."""
    most = client.models.retrieve("mini").model_extra["max_tokens"]
    how = {"model": "mini", "temperature": 0, field: 10**6}
    for words in QUESTIONS:
        found = client.chat.completions.create(**how, messages=[{"role": "user", "content": words}])
        if found.choices[0].finish_reason == "length":
            break
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == most == OPTIONS.max_tokens


def test_a_chat_that_is_too_long_says_so_as_openai_does(client):
    words = [{"role": "user", "content": "红色的圆在左边" * 200}]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="mini", messages=words)
    assert raised.value.code == "context_length_exceeded" and raised.value.param == "messages"
    assert re.search(r"^The chat takes \d+ tokens.*--length$", raised.value.body["message"])


def test_speech_is_transcribed(client, files):
    found = client.audio.transcriptions.create(
        model="mini", file=files["speech"], response_format="verbose_json"
    )
    assert found.duration == pytest.approx(1.0, abs=0.02)
    assert [one.word for one in found.words] == [s for s in found.text if not s.isspace()]


@pytest.fixture(scope="module")
def drawing(client):
    """A question whose greedy answer holds a picture."""
    for words in QUESTIONS:
        messages = [{"role": "user", "content": words}]
        how = {"model": "mini", "messages": messages, "temperature": 0, "seed": 5}
        found = client.chat.completions.create(**how)
        if "images" in (found.choices[0].message.model_extra or {}):
            return how, found
    raise AssertionError("no answer holds a picture")


def opened(url: str) -> Image.Image:
    kind, _, packed = url.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(packed)))


def test_answers_hold_drawn_pictures(client, drawing, easel, engine):
    how, found = drawing
    shown = found.choices[0].message.model_extra["images"]
    answer = engine.submit(Request("a", Example("a", (), how["messages"][0]["content"]))).result(60)
    assert len(shown) == len(answer.pictures) > 0 and {one["type"] for one in shown} == {
        "image_url"
    }
    size = easel.size(None, "image")
    for number, (one, picture) in enumerate(zip(shown, answer.pictures)):
        wanted = easel.draw(picture, 5 + number, size).result(60)
        assert opened(one["image_url"]["url"]).size == size[::-1]
        assert base64.b64decode(one["image_url"]["url"].partition(",")[2]) == wanted
    pieces = list(client.chat.completions.create(**how, stream=True))
    deltas = [one.choices[0].delta.model_extra or {} for one in pieces]
    assert [image for one in deltas for image in one.get("images", [])] == shown
    assert pieces[-1].choices[0].finish_reason == found.choices[0].finish_reason


def test_several_answers_draw_with_seeds_of_their_own(client, drawing):
    how, first = drawing
    found = client.chat.completions.create(**how, n=2)
    pictures = [one.message.model_extra["images"] for one in found.choices]
    assert pictures[0] == first.choices[0].message.model_extra["images"] != pictures[1]


def test_images_are_generated(client, drawing):
    prompt = drawing[0]["messages"][0]["content"]
    how = {"model": "mini", "prompt": prompt, "extra_body": {"seed": 9}}
    found = client.images.generate(**how, n=2, size="24x16")
    contents = [base64.b64decode(one.b64_json) for one in found.data]
    assert [Image.open(io.BytesIO(one)).size for one in contents] == [(24, 16)] * 2
    assert contents[0] != contents[1]
    again = client.images.generate(
        model="mini", prompt=prompt, size="24x16", extra_body={"seed": 10}
    )
    assert base64.b64decode(again.data[0].b64_json) == contents[1]


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"size": "32x32"}, "size", "invalid_value"),
        ({"size": "wide"}, "size", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"prompt": " "}, "prompt", "invalid_value"),
        ({"response_format": "url"}, "response_format", "invalid_value"),
        ({"output_format": "webp"}, "output_format", "invalid_value"),
        ({"background": "transparent"}, "background", "unsupported_parameter"),
        ({"model": "dall-e-3"}, "model", "model_not_found"),
    ],
)
def test_images_that_cannot_be_drawn_are_refused(client, changes, param, code):
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(**({"model": "mini", "prompt": "a"} | changes))
    assert caught.value.status_code in (400, 404)
    assert (caught.value.param, caught.value.code) == (param, code)
    if param == "size":
        assert "24x16" in caught.value.message


def test_a_prompt_that_draws_nothing_is_told(client, engine):
    words = next(
        one
        for one in (f"{question}{number}" for number in range(20) for question in QUESTIONS)
        if not engine.submit(Request("a", Example("a", (), one, task="draw"))).result(60).pictures
    )
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="mini", prompt=words)
    assert caught.value.code == "no_picture"


def count(url: str) -> str:
    """Compilations of this process so far, those of other tests among them."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        told = answer.read().decode()
    return re.search(r"xllm_compilations_since_warm_up_total (\S+)", told)[1]


def test_decoding_goes_on_while_pictures_are_drawn(client, site, drawing, easel, monkeypatch):
    """An answer of words comes while a picture is being drawn, and neither compiles anything."""
    real = easel._renderers["image"].gradually
    begun = []
    compiled = count(site[0])

    def slow(*arguments, **options):
        begun.append(time.monotonic())
        for one in real(*arguments, **options):
            time.sleep(1.0)
            yield one

    monkeypatch.setattr(easel._renderers["image"], "gradually", slow)
    ended = []
    stream = client.chat.completions.create(**drawing[0], stream=True)
    following = iter(stream)
    next(following)
    served.wait_for(lambda: bool(begun))
    words = client.chat.completions.create(
        model="mini", messages=drawing[0]["messages"], temperature=0, max_tokens=2
    )
    ended.append(time.monotonic())
    list(following)
    assert words.usage.completion_tokens == 2
    assert ended[0] < time.monotonic() - 0.5, "the words waited for the picture"
    assert count(site[0]) == compiled
