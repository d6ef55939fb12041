"""The web page in a real browser: what a visitor does, with an engine that answers at once.

Skipped where there is no Chromium: `apt-get install chromium`.
"""

from __future__ import annotations

import dataclasses
import mimetypes
import shutil

import gray_video
import numpy as np
import pytest
import served
import soundfile
from fake_engine import FakeEngine
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.media import speech
from xllm_jax.inference.replies import Picture
from xllm_jax.serve import app, page, page_messages
from xllm_jax.serve.security import Keys

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
KEY = "sk-0123456789abcdef"
DATA = Data(image={"size": 64}, video={"frames": 4})
FAKED = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
LIMITS = dataclasses.replace(
    served.LIMITS,
    media=16,
    frames=600,
    pixels=10_000_000,  # what a camera of Chromium's shows
    medium=20_000_000,
    body=50_000_000,
    bodies=100_000_000,
)
WAIT = 60_000  # milliseconds, on a busy machine
ABORTED = "The user aborted a request."  # a recording that is attached is no longer played
SHOWN = "[...document.querySelectorAll('#chat .bot img')].map(one => one.naturalWidth)"
RECORD = {"image": ["capture photo"], "video": ["start recording"] * 2}
SIZES = {"wide": (1280, 800), "narrow": (390, 844)}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    # Gradio makes event loops of its own, and leaves what they hold to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|copy keyword is deprecated)"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def site():
    """(address, engine) of a server with its page, for anybody."""
    engine = FakeEngine()
    engine.start()
    with served.decoders() as workers:
        made = served.service(engine, workers, LIMITS, ears=served.FakeEars())
        add = page.Adder(made, Keys(), "", lambda file: workers.seen(file, DATA))
        with served.running(app.create(made, page=add)) as url:
            add.url = url
            yield url, engine, made


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        made = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *FAKED])
        yield made
        made.close()


@pytest.fixture
def tab(chromium, site):
    """The page in a fresh tab; in the end nothing was wrong on its console, and nothing came from
    elsewhere."""
    made = chromium.new_page(viewport=dict(zip(("width", "height"), SIZES["wide"])))
    wrong, asked = [], []
    made.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("request", lambda request: asked.append(request.url))
    made.set_default_timeout(WAIT)
    made.goto(site[0])
    made.wait_for_selector("#ask textarea")
    yield made
    made.close()
    assert [one for one in wrong if one != ABORTED] == []
    strange = {url for url in asked if not url.startswith((site[0], "data:", "blob:"))}
    assert strange == set()


def say(tab, text: str) -> None:
    tab.wait_for_selector("#ask [data-testid=submit-button]")  # not while an answer comes
    tab.fill("#ask textarea", text)
    tab.keyboard.press("Enter")


def last(tab) -> str:
    """The last thing that the model said."""
    found = tab.locator("#chat .bot .message, #chat .message.bot").all_inner_texts()
    return found[-1] if found else ""


def until(tab, true) -> None:
    for _ in range(WAIT // 100):
        if true():
            return
        tab.wait_for_timeout(100)
    raise AssertionError(f"waited in vain; the chat says {last(tab)!r}")


def upload(tab, *files) -> None:
    tab.set_input_files("#ask input[type=file]", [str(file) for file in files])
    tab.wait_for_selector("#ask .thumbnail-item, #ask .thumbnails")


def every_format(folder) -> dict:
    """{a file of each format that a server takes: its modality}."""
    noise = np.random.default_rng(0)
    pixels = noise.integers(0, 255, (24, 32, 3), np.uint8)
    samples = noise.uniform(-0.3, 0.3, 8000)
    made = {}
    for suffix in ("jpg", "png", "webp", "bmp", "gif", "tiff"):
        Image.fromarray(pixels).save(folder / f"a.{suffix}")
        made[folder / f"a.{suffix}"] = "image"
    for suffix, codec in (("mkv", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")):
        made[gray_video.write(folder / f"b.{suffix}", 8, codec)] = "video"
    for suffix in ("wav", "flac", "ogg", "mp3", "aiff"):
        soundfile.write(folder / f"c.{suffix}", samples, 16_000)
        made[folder / f"c.{suffix}"] = "speech"
    return made


def test_a_picture_is_uploaded_and_asked_about(tab, site, tmp_path):
    (tmp_path / "红.png").write_bytes(served.picture())
    upload(tab, tmp_path / "红.png")
    say(tab, "图中有什么？")
    until(tab, lambda: "ANSWER|图中有什么？|image:" in last(tab))
    say(tab, "二")
    until(tab, lambda: "二|image:" in last(tab))
    asked = site[1].asked[-1].example
    assert len(asked.media) == 1 and asked.history[0][0] == "图中有什么？"


def test_what_it_heard_and_saw(tab, site, tmp_path):
    (tmp_path / "a.wav").write_bytes(served.sound())
    upload(tab, tmp_path / "a.wav", gray_video.write(tmp_path / "v.mp4", 8))
    say(tab, "?")
    until(tab, lambda: "speech:" in last(tab) and "video:" in last(tab))
    said = served.FakeEars().times(speech.load(tmp_path / "a.wav"))[1]
    assert tab.input_value("#heard textarea") == "".join(said) != ""
    until(tab, lambda: tab.locator("#seen img").count() >= 4)


def test_an_answer_comes_in_pieces_and_stops(tab, site):
    engine = site[1]
    engine.pause = 0.1
    try:
        say(tab, "a" * 300)
        until(tab, lambda: "ANSW" in last(tab))
        assert "a" * 300 not in last(tab)
        tab.click("#ask .stop-button, #ask [data-testid=stop-button]")
        until(tab, lambda: not engine.running)
        assert engine.cancelled >= 1
    finally:
        engine.pause = 0.0
    say(tab, "b")
    until(tab, lambda: engine.asked[-1].example.instruction == "b" and not engine.running)


def test_retry_and_undo(tab, site):
    say(tab, "c")
    until(tab, lambda: "ANSWER|c|" in last(tab))
    before = len(site[1].asked)
    tab.click("#chat [aria-label=Retry], #chat [title=Retry]")
    until(tab, lambda: len(site[1].asked) == before + 1)
    until(tab, lambda: "ANSWER|c|" in last(tab))
    tab.click("#chat [aria-label=Undo], #chat [title=Undo]")
    until(tab, lambda: last(tab) == "")
    assert tab.input_value("#ask textarea") == "c"


def test_drawn_pictures_are_shown(tab, site):
    """Below their words; the chat goes on with the words alone."""
    _, engine, made = site
    made.easel, engine.pictures = served.FakeEasel(), (Picture("image", "blue"),)
    try:
        say(tab, "k")
        until(tab, lambda: tab.locator("#chat .bot img").count() == 1)
        until(tab, lambda: tab.evaluate(SHOWN) == [24])
        engine.pictures = ()
        say(tab, "l")
        until(tab, lambda: "/l|" in last(tab))
        assert engine.asked[-1].example.history[0][1].startswith("ANSWER|k|")
        assert engine.asked[-1].example.media == ()
    finally:
        made.easel, engine.pictures = None, ()


def test_markup_of_an_answer_is_shown_as_words(tab, site):
    """No element of it is made, and nothing that it names is loaded."""
    engine, words = site[1], "<img src=x onerror=\"document.title='in'\"><b>1</b>&amp;"
    engine.text = words
    try:
        say(tab, "f")
        until(tab, lambda: last(tab) == words)
        assert tab.locator("#chat .bot img[src=x], #chat .bot b").count() == 0
        engine.text = ""
        say(tab, "g")
        until(tab, lambda: engine.asked[-1].example.instruction == "g")
        assert engine.asked[-1].example.history[0][1] == words
    finally:
        engine.text = ""


def test_what_the_server_refuses_is_told(tab, site, tmp_path):
    """In the answer's place, by the file's name; the chat goes on without it."""
    (tmp_path / "large.png").write_bytes(served.picture(4000, 4000))
    upload(tab, tmp_path / "large.png")
    say(tab, "d")
    until(tab, lambda: "large.png: has 16,000,000 pixels" in tab.inner_text("#chat"))
    assert "Error" not in tab.inner_text("body")
    say(tab, "e")
    until(tab, lambda: "ANSWER|e|" in last(tab))
    asked = site[1].asked[-1].example
    assert (asked.instruction, asked.media, asked.history) == ("e", (), ())


def test_files_of_all_formats(tab, site, tmp_path):
    given = every_format(tmp_path)
    upload(tab, *given)
    tab.wait_for_function(
        f"document.querySelectorAll('#ask .thumbnail-item').length == {len(given)}"
    )
    say(tab, "g")
    until(tab, lambda: "ANSWER|g|" in last(tab))
    taken = [(name, file.content) for name, file in site[1].asked[-1].example.media]
    assert taken == [(name, file.read_bytes()) for file, name in given.items()]


def test_speech_is_recorded(tab, site):
    tab.click("#ask [data-testid=microphone-button]")
    tab.click("#ask .record-button")
    tab.wait_for_timeout(1500)
    tab.locator("#ask .stop-button").dispatch_event("click")  # it pulses: never at rest
    tab.click("#ask [aria-label='Attach audio']")
    tab.wait_for_selector("#ask .thumbnail-item")
    say(tab, "h")
    until(tab, lambda: "ANSWER|h|speech:" in last(tab))
    assert tab.input_value("#heard textarea") != ""


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_camera_records(tab, site, kind):
    """The recording joins the question, and is asked about once."""
    tab.click("#camera button:has-text('Camera')")
    tab.locator("#camera button:has-text('Access')").nth(("image", "video").index(kind)).click()
    for button in RECORD[kind]:
        tab.wait_for_selector(f"#camera [aria-label='{button}']")
        tab.wait_for_timeout(4000)  # a camera needs a while, and so does something to see
        tab.locator(f"#camera [aria-label='{button}']").dispatch_event("click")
    tab.wait_for_selector("#ask .thumbnail-item")
    say(tab, "i")
    until(tab, lambda: f"ANSWER|i|{kind}:" in last(tab))
    say(tab, "j")
    until(tab, lambda: f"/j|{kind}:" in last(tab))
    assert len(site[1].asked[-1].example.media) == 1


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_cut_off(tab, size):
    """Whole width on a screen and on a telephone; the question is always within reach."""
    width, height = SIZES[size]
    tab.set_viewport_size({"width": width, "height": height})
    tab.wait_for_timeout(300)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    box = tab.locator("#ask").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_a_page_behind_keys(chromium):
    engine = FakeEngine()
    engine.start()
    with served.decoders() as workers:
        made, keys = served.service(engine, workers), Keys([KEY])
        add = page.Adder(made, keys, "", lambda file: [])
        with served.running(app.create(made, keys, page=add)) as url:
            add.url = url
            tab = chromium.new_page()
            tab.set_default_timeout(WAIT)
            tab.goto(url)
            for key in ("wrong", KEY):
                tab.fill("input[type=password]", key)
                tab.fill("input[type=text], input:not([type]), textarea", "me")
                tab.click("button:has-text('Login')")
                tab.wait_for_timeout(500)
                if key == "wrong":
                    assert tab.locator("#ask").count() == 0
            tab.wait_for_selector("#ask textarea")
            say(tab, "e")
            until(tab, lambda: "ANSWER|e|" in last(tab))
            tab.close()


def test_examples_come_from_a_world(tmp_path):
    for place in ("coco/test/a.jpg", "msrvtt/TestVideo/v.mp4", "aishell/wav/test/S1/u.flac"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    assert page.examples(str(tmp_path), ("image",)) == []
    (tmp_path / "world.json").touch()
    found = page.examples(str(tmp_path), ("image", "speech"))
    assert [row[0]["files"][0].rpartition(".")[2] for row in found] == ["jpg", "flac"]
    assert page.examples("", ("image",)) == []


def test_the_history_of_a_chat_in_openai_form(tmp_path):
    (tmp_path / "a.png").write_bytes(served.picture())
    file = {"type": "file", "file": {"path": str(tmp_path / "a.png")}}
    said = [{"type": "text", "text": "一"}]
    history = [
        {"role": "user", "content": [file]},
        {"role": "user", "content": said},
        {"role": "assistant", "content": "红"},
    ]
    user, assistant = page_messages.past(history)
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert user["content"][0]["image_url"]["url"].startswith("data:;base64,")
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": "红"}]}


@pytest.mark.parametrize("content", [b"", b"words"])
def test_a_file_that_is_none_costs_its_own_question_alone(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    file = {"type": "file", "file": {"path": str(tmp_path / "bad.png")}}
    refused = {"role": "assistant", "content": "x", "metadata": {"title": page_messages.REFUSED}}
    asked = [{"role": "user", "content": word} for word in ("一", "二")]
    answer = {"role": "assistant", "content": "红"}
    history = [asked[0], answer, {"role": "user", "content": [file]}, refused, asked[1]]
    found = page_messages.past(history)
    assert [message["content"][0]["text"] for message in found] == ["一", "红", "二"]
    assert page_messages.past([{"role": "user", "content": [file]}, refused, asked[1]]) == found[2:]


def test_files_are_known_on_a_machine_with_a_short_list_of_types(tmp_path, monkeypatch):
    """Python's own list has neither FLAC nor WebP nor Matroska."""
    known = mimetypes.MimeTypes(filenames=())
    monkeypatch.setattr(mimetypes, "_db", known)
    page_messages.register_types()
    slots = {"image": "image", "video": "video", "speech": "audio"}
    for file, modality in every_format(tmp_path).items():
        assert page_messages.kind(str(file)) == slots[modality], file
        assert mimetypes.guess_type(file.name)[0].startswith(f"{slots[modality]}/")
    for kind, suffixes in page_messages.TYPES.items():
        assert all(known.guess_type(f"a{one}")[0].startswith(f"{kind}/") for one in suffixes)


def test_what_is_no_medium_is_named(tmp_path):
    (tmp_path / "b.webm").touch()
    with pytest.raises(UserError, match=r"b\.webm: is empty"):
        page_messages.parts("?", [str(tmp_path / "b.webm")])
    (tmp_path / "a.png").write_text("words")
    with pytest.raises(UserError, match=r"a\.png: is of no format"):
        page_messages.parts("?", [str(tmp_path / "a.png")])


def test_places_of_files_become_their_names():
    messages = [{"role": "user", "content": [{"type": "image_url", "name": "a.png"}]}]
    told = "messages[0].content[0]: is empty"
    assert page_messages.named(told, messages) == "a.png: is empty"
    for other in ("messages[1].content[0]: is empty", "messages[0].role: is none", "n: is 0"):
        assert page_messages.named(other, messages) == other
