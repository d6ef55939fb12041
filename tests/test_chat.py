"""Chat completions by OpenAI's own client: parts in any order, streams, sampling, errors."""

from __future__ import annotations

import base64
import hashlib
import threading

import httpx2
import openai
import pytest
import served

from xllm_jax.core.errors import UserError
from xllm_jax.serve.request import Sampling, TimedOut

RED, BLUE = served.picture(), served.picture(color="blue")
BEEP = served.sound()


@pytest.fixture(scope="module")
def workers():
    with served.decoders() as made:
        yield made


@pytest.fixture(scope="module")
def server(workers):
    with served.fake(workers) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:6]


def data(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image(content: bytes = RED) -> dict:
    return {"type": "image_url", "image_url": {"url": data(content)}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def ask(client, content, **options):
    options = {"temperature": 0} | options
    messages = content if isinstance(content, list) and "role" in content[0] else None
    messages = messages or [{"role": "user", "content": content}]
    return client.chat.completions.create(model="mini", messages=messages, **options)


def answer(client, content, **options) -> str:
    return ask(client, content, **options).choices[0].message.content


def test_a_question_is_answered(client, server):
    found = ask(client, "图中有什么？")
    assert found.choices[0].message.content == "ANSWER|图中有什么？|"
    assert found.choices[0].finish_reason == "stop" and found.model == "mini"
    assert found.usage.completion_tokens == len("ANSWER|图中有什么？|")
    assert found.usage.prompt_tokens == 6 and found.usage.total_tokens == 6 + 14


def test_files_go_where_the_model_has_learned_to_read_them(client):
    """Before or behind all words they carry no marker, whatever the side they came from."""
    bare = base64.b64encode(BEEP).decode()
    heard = {"type": "input_audio", "input_audio": {"data": bare, "format": "wav"}}
    linked = {"type": "audio_url", "audio_url": {"url": data(BEEP, "audio/wav")}}
    plain = {"type": "image_url", "image_url": base64.b64encode(BLUE).decode()}
    files = f"image:{digest(RED)},speech:{digest(BEEP)},image:{digest(BLUE)}"
    assert answer(client, [image(), heard, plain, text("问")]) == f"ANSWER|问|{files}"
    assert answer(client, [text("问"), image(), linked, plain]) == f"ANSWER|问|{files}"


def test_files_between_words_stay_there(client):
    content = [image(), text("像"), image(BLUE), text("吗？")]
    files = f"image:{digest(RED)},image:{digest(BLUE)}"
    assert answer(client, content) == f"ANSWER|<image>像<image>吗？|{files}"


def test_a_marker_in_the_words_is_no_file(client):
    content = [text("a<image>b"), image(), text("<speech>c")]
    assert answer(client, content) == f"ANSWER|a< image>b<image><speech>c|image:{digest(RED)}"


def test_files_without_words_get_the_instruction_that_fits_them(client):
    heard = {"type": "input_audio", "input_audio": {"data": base64.b64encode(BEEP).decode()}}
    assert answer(client, [image()]).startswith("ANSWER|请描述这张图。|")
    assert answer(client, [heard]).startswith("ANSWER|请识别语音内容。|")
    assert answer(client, [image(), heard]).startswith("ANSWER|请回答语音中的问题。|")


def test_rounds_and_what_the_system_says(client):
    messages = [
        {"role": "system", "content": "简短"},
        {"role": "user", "content": [image(), text("一")]},
        {"role": "assistant", "content": "红"},
        {"role": "user", "content": "二"},
    ]
    assert answer(client, messages) == f"ANSWER|简短\n一>红/二|image:{digest(RED)}"


def test_a_clip(client, tmp_path):
    import gray_video

    clip = gray_video.write(tmp_path / "v.mp4", 8).read_bytes()
    part = {"type": "video_url", "video_url": {"url": data(clip, "video/mp4")}}
    assert answer(client, [part, text("?")]) == f"ANSWER|?|video:{digest(clip)}"


def test_a_stream_is_the_answer_in_pieces_with_usage(client):
    pieces = list(ask(client, "问", stream=True, n=2, stream_options={"include_usage": True}))
    texts = ["", ""]
    for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["ANSWER|问|"] * 2 and len(pieces) > 20
    assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens == 18
    ends = [c.finish_reason for p in pieces for c in p.choices if c.finish_reason]
    assert ends == ["stop", "stop"]


def test_sampling_goes_to_the_engine_as_it_was_asked(client, server):
    options = dict(temperature=0.5, top_p=0.25, seed=7, stop=["x", "y"], n=2)
    ask(client, "s", max_completion_tokens=3, extra_body={"top_k": 5}, **options)
    first = Sampling(0.5, 0.25, 5, 7, 3, ("x", "y"), None)
    assert [one.sampling for one in server[1].asked[-2:]] == [
        first,
        Sampling(0.5, 0.25, 5, 8, 3, ("x", "y"), None),
    ]


def test_a_seed_gives_the_same_answers_and_several_differ(client):
    found = [ask(client, "s", temperature=1, seed=3, n=3) for _ in range(2)]
    texts = [[choice.message.content for choice in one.choices] for one in found]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert answer(client, "s", temperature=1) != answer(client, "s", temperature=1)


def test_stop_and_length(client):
    cut = ask(client, "abc", stop="c").choices[0]
    assert (cut.message.content, cut.finish_reason) == ("ANSWER|ab", "stop")
    short = ask(client, "abc", max_tokens=2).choices[0]
    assert (short.message.content, short.finish_reason) == ("AN", "length")


def test_log_probabilities(client):
    told = ask(client, "问", logprobs=True, top_logprobs=2, max_tokens=8).choices[0].logprobs
    assert "".join(one.token for one in told.content) == "ANSWER|问"
    assert told.content[-1].bytes == list("问".encode()) and told.content[0].logprob == -0.5
    assert [other.logprob for other in told.content[0].top_logprobs] == [-1, -2]
    pieces = ask(client, "问", logprobs=True, max_tokens=3, stream=True)
    tokens = [t.token for p in pieces for c in p.choices if c.logprobs for t in c.logprobs.content]
    assert tokens == ["A", "N", "S"]
    assert ask(client, "问").choices[0].logprobs is None


def test_models(client):
    (only,) = client.models.list().data
    assert only.id == "mini" and client.models.retrieve("mini").modalities[0] == "image"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "options, field",
    [
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 100}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1000}, "logprobs"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "assistant", "content": [image()]}]}, "messages[0]"),
        ({"messages": "a"}, "messages"),
        ({"model": 3}, "model"),
    ],
)
def test_a_wrong_field_is_named(client, options, field):
    asked = {"model": "mini", "messages": [{"role": "user", "content": "a"}]} | options
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/chat/completions", body=asked, cast_to=object)
    assert error.value.param == field and error.value.type == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine_have_their_status(client, server, stream):
    engine = server[1]
    try:
        engine.fail = lambda _: TimedOut("waited too long")
        with pytest.raises(openai.InternalServerError) as error:
            list(ask(client, "a", stream=stream))
        assert error.value.status_code == 503 and "waited too long" in error.value.message
        place = "messages[0].content[0]"
        engine.fail = lambda asked: UserError("is broken", field=asked.example.media[0][1])
        with pytest.raises(openai.BadRequestError) as error:
            list(ask(client, [image()], stream=stream))
        assert error.value.param == place
        assert error.value.body["message"] == f"{place}: is broken"
    finally:
        engine.fail = lambda _: None


def test_more_than_the_engine_takes_is_refused_with_429(workers):
    with (
        served.fake(workers, pause=0.1, most=1) as (url, engine, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        first = threading.Thread(target=answer, args=(client, "a"))
        first.start()
        served.wait_for(lambda: bool(engine.running))
        with pytest.raises(openai.RateLimitError) as error:
            ask(client, "b")
        assert error.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):  # neither of two answers, if one is refused
            ask(client, "b", n=2)
        first.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_slot_back(workers, stream):
    with served.fake(workers, pause=0.05) as (url, engine, _):
        body = {"messages": [{"role": "user", "content": "a" * 500}], "stream": stream}
        with (
            httpx2.Client() as client,
            pytest.raises(httpx2.ReadTimeout),
            client.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=0.4) as answer,
        ):
            for _ in answer.iter_lines():
                if stream:
                    raise httpx2.ReadTimeout("as if")
        served.wait_for(lambda: engine.cancelled == 1 and not engine.running, 3)
