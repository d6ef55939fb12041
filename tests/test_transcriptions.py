"""Transcriptions by file and in real time: formats, times, and the same text both ways."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import openai
import pytest
import served
import small_runs
import soundfile
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.media.paths import Carried
from xllm_jax.inference import load_run
from xllm_jax.inference.transcriber import Transcriber
from xllm_jax.serve import hearing, transcriptions
from xllm_jax.serve.hearing import Character
from xllm_jax.serve.security import PROTOCOL, Keys

KEY = "sk-0123456789abcdef"
RATE = 16_000


@pytest.fixture(scope="module")
def server():
    with (
        served.decoders() as workers,
        served.fake(workers, keys=Keys([KEY]), ears=served.FakeEars()) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """`[samples]` int16 whose loudness changes."""
    rng = np.random.default_rng(seed)
    count = int(seconds * RATE)
    level = np.repeat(rng.uniform(50, 9000, count // 1600 + 1), 1600)[:count]
    return (level * rng.uniform(-1, 1, count)).astype("<i2")


def packed(samples: np.ndarray, form: str = "WAV") -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, RATE, format=form)
    return content.getvalue()


def transcribe(client, content: bytes, form: str):
    file = ("a.wav", content)
    return client.audio.transcriptions.create(model="mini", file=file, response_format=form)


def test_all_formats_tell_the_same(client):
    content = packed(noise(1.0))
    told = transcribe(client, content, "verbose_json")
    assert transcribe(client, content, "json").text == told.text and len(told.text) == 6
    assert transcribe(client, content, "text") == f"{told.text}\n"
    assert [one.word for one in told.words] == list(told.text)
    assert [one.start for one in told.words] == [0, 0.16, 0.32, 0.48, 0.64, 0.8]
    assert abs(told.duration - 1.0) < 0.01 and told.segments[0].text == told.text
    lines = transcribe(client, content, "srt").splitlines()
    assert lines[:3] == ["1", "00:00:00,000 --> 00:00:00,960", told.text]
    assert transcribe(client, packed(noise(1.0), "FLAC"), "json").text == told.text


@pytest.mark.parametrize(
    "fields, content, field",
    [
        ({"response_format": "vtt"}, b"x", "response_format"),
        ({"stream": "true"}, b"x", "stream"),
        ({}, b"", "file"),
        ({}, b"no sound", "file"),
        ({}, packed(noise(3.5)), "file"),
        ({"a" * n: "b" for n in range(1, 30)}, b"x", None),
        ({"prompt": "b" * 10_000}, b"x", None),
    ],
    ids=range(7),
)
def test_wrong_forms(client, fields, content, field):
    with pytest.raises(openai.BadRequestError) as error:
        client.post(
            "/audio/transcriptions",
            body={"model": "mini"} | fields,
            files={"file": ("../../a", content)},
            options={"headers": {"content-type": "multipart/form-data"}},
            cast_to=object,
        )
    assert error.value.param == field


def test_no_form_at_all(client):
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/audio/transcriptions", body={"model": "mini"}, cast_to=object)
    assert error.value.status_code == 415


def test_a_model_that_hears_nothing(server, client):
    ears, server[2].ears = server[2].ears, None
    try:
        with pytest.raises(openai.BadRequestError, match="hears no speech"):
            transcribe(client, packed(noise(0.5)), "json")
    finally:
        server[2].ears = ears


def test_subtitles_end_at_sentences_and_pauses_and_when_they_are_full():
    said = [Character(sign, n * 0.2, n * 0.2 + 0.2) for n, sign in enumerate("一二。三四")]
    said += [Character("五", 1.0, 2.2)] + [Character("六", 2.2, 2.3)] * 20
    texts = ["".join(one.text for one in cue) for cue in transcriptions.cues(said)]
    assert texts == ["一二。", "三四", "五" + "六" * 15, "六" * 5]
    late = [Character("一", 3723.0005, 3723.9996)]
    assert transcriptions.srt(late) == "1\n01:02:03,000 --> 01:02:04,000\n一\n"


def test_an_llm_that_writes_another_number_of_characters():
    """They are spread over the firings, whose last one is the end's."""
    even = hearing.heard("你 好", [0.2, 0.6, 0.9], None, 1.0)
    assert [(c.text, c.start, c.end) for c in even.characters] == [("你", 0, 0.2), ("好", 0.2, 0.6)]
    more = hearing.heard("一二三四", [0.2, 0.6, 0.9], None, 1.0).characters
    np.testing.assert_allclose([c.end for c in more], [0.1, 0.2, 0.4, 0.6], atol=1e-9)
    assert hearing.heard("", [], None, 1.0).characters == ()
    assert hearing.heard("一", [], None, 1.0).characters == (Character("一", 0, 1.0),)


def session(server, key: str = KEY, **options):
    url = f"{server[0].replace('http', 'ws')}/v1/realtime/transcriptions"
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return connect(url, additional_headers=headers, open_timeout=60, **options)


def told(opened, kind: str) -> dict:
    """The first message of a kind; others that may come before it are looked at, too."""
    while True:
        found = json.loads(opened.recv(60))
        assert found["type"] in (kind, "transcription.delta"), found
        if found["type"] == kind:
            return found


@pytest.mark.parametrize("way", ["binary", "json"])
def test_pieces_give_the_text_of_the_whole(server, client, way):
    samples = noise(2.0)
    with session(server) as opened:
        for piece in np.array_split(samples, 23):
            content = piece.tobytes()
            message = {"type": "input_audio_buffer.append"}
            message["audio"] = base64.b64encode(content).decode()
            opened.send(content if way == "binary" else json.dumps(message))
        early = told(opened, "transcription.delta")
        opened.send(json.dumps({"type": "input_audio_buffer.commit"}))
        last = told(opened, "transcription.completed")
        whole = transcribe(client, packed(samples), "verbose_json")
        assert last["text"] == whole.text and len(last["text"]) > len(early["text"]) > 0
        assert [one["start"] for one in last["words"]] == [one.start for one in whole.words]
        # The same connection takes another utterance, which begins anew.
        opened.send(noise(0.6, 1).tobytes())
        opened.send(json.dumps({"type": "input_audio_buffer.commit"}))
        again = told(opened, "transcription.completed")
        assert again["text"] == transcribe(client, packed(noise(0.6, 1)), "json").text
        opened.send(noise(0.3).tobytes())
        opened.send(json.dumps({"type": "input_audio_buffer.clear"}))
        opened.send(json.dumps({"type": "input_audio_buffer.commit"}))
        assert told(opened, "error")["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "message, code",
    [
        ("no json", 1008),
        ("[" * 10_000, 1008),
        (json.dumps({"type": "input_audio_buffer.append", "audio": "?"}), 1008),
        (json.dumps({"type": "response.create"}), 1008),
        (b"\0" * (RATE * 2 * 4), 1009),
        (b"\0" * 2_000_000, 1009),
    ],
    ids=range(6),
)
def test_what_a_session_must_not(server, message, code):
    with session(server) as opened:
        with pytest.raises(ConnectionClosed) as closed:
            opened.send(message)
            while True:
                opened.recv(60)
        assert closed.value.rcvd is None or closed.value.rcvd.code == code


def test_a_session_needs_a_key_and_a_page_of_this_server(server):
    with session(server, "", subprotocols=["realtime", f"{PROTOCOL}{KEY}"]) as opened:
        assert opened.subprotocol == "realtime"
    for key, options in (("", {}), ("wrong", {}), (KEY, {"origin": "http://evil.test"})):
        with pytest.raises(InvalidStatus):
            session(server, key, **options)


def test_a_client_that_leaves_ends_its_session(server):
    with session(server) as opened:
        opened.send(noise(1.0).tobytes())
        served.wait_for(lambda: b"xllm_realtime_sessions 1.0" in server[2].metrics.text())
        opened.socket.close()
    served.wait_for(lambda: b"xllm_realtime_sessions 0.0" in server[2].metrics.text())


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """A stage-1 run with random parameters, and a world's test sentences."""
    folder = tmp_path_factory.mktemp("ears")
    characters = small_runs.write_characters(folder / "characters.txt", ["红色的圆在左边"])
    return load_run.load_run(small_runs.stage1(folder, characters))


def test_the_asr_model_writes_a_character_for_each_firing(heard):
    """Its text is that of the recognizer, and its times are those of CIF, in order."""
    file = Carried("a", packed(noise(1.6)))
    ears = hearing.ASREars(heard, modalities.load)
    features = ears.load(file)
    times, texts = ears.times(features)
    expected = Transcriber(heard, rows=1).transcribe([Example("a", (("speech", file),))])
    assert "".join(texts) == expected[0] and len(times) == len(texts) > 0
    assert times == sorted(times) and times[0] > 0 and times[-1] <= 1.6 + 0.08
    assert ears.hop == 0.08
    steps = np.asarray(times) / 0.08
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-6)
