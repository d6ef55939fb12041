"""The report's and the audit's page show hostile captions, names and answers as words."""

from __future__ import annotations

import copy
import html.parser
from collections import Counter

import numpy as np
import pytest

from xllm_jax import report
from xllm_jax.audit import Audit, page
from xllm_jax.audit.counts import Counts
from xllm_jax.audit.samples import Medium, Sample
from xllm_jax.audit.supervision import Supervision
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.evaluation import measure, scorers

HOSTILE = (
    "<script>document.title='in'</script>",
    '"><img src=x onerror="document.title=\'in\'">',
    "' onmouseover='document.title=1' x='",
    "javascript:document.title='in'",
    "</style></title><script>1</script>",
    "<a href=javascript:1>图中</a>",
    "<svg/onload=1>",
    "&lt;b&gt;",
    "\u202egpj.exe",
    "\udcff.jpg",
)
OUR_TAGS = """html head meta title style body h1 h2 p div table thead tbody tr th td article dl dt
dd footer img audio span figure figcaption b svg line text polyline rect mark"""
OUR_ATTRIBUTES = """lang charset name content http-equiv class alt src controls preload viewbox role
aria-label points x y x1 x2 y1 y2 text-anchor width height fill opacity"""


class Read(html.parser.HTMLParser):
    """Everything but words that a page holds, as a browser reads it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.words = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def check(text: str, said: tuple[str, ...]) -> None:
    """Only our own tags and attributes, nothing that is loaded or run, every hostile text shown."""
    read = Read(text)
    assert read.tags.keys() <= set(OUR_TAGS.split())
    assert {name for name, _ in read.attributes} <= set(OUR_ATTRIBUTES.split())
    assert all(v.startswith("data:") for name, v in read.attributes if name == "src")
    policy = next(v for name, v in read.attributes if name == "content" and "default-src" in v)
    assert "default-src 'none'" in policy and "script" not in policy
    words = "".join(read.words)
    for one in said:
        assert one in words, one


@pytest.fixture(scope="module")
def results():
    examples = [
        Example(text, (("image", text), (text, text)), text, text, tags=(text,) * 5)
        for text in HOSTILE
    ]
    tasks = (
        measure.Task("vqa", HOSTILE[0], tuple(examples), scorers.short_answer),
        measure.Task("caption", HOSTILE[1], tuple(examples), scorers.caption),
    )
    found = {f"{t.name}@after": measure.measure(t, lambda e: list(HOSTILE)) for t in tasks}
    for one in found.values():
        one["metrics"]["accuracy" if "accuracy" in one["metrics"] else "cider"]["groups"] = {
            text: {"value": 0.5, "low": 0.1, "high": 0.9, "samples": 7} for text in HOSTILE
        }
    return {
        "measures": found,
        "curves": {text: [[0, 3.0], [1, 2.0]] for text in HOSTILE},
        "timings": dict.fromkeys(HOSTILE, 1.0),
        "settings": {text: text for text in HOSTILE},
    }


def test_the_report_shows_hostile_texts_as_words(results, tmp_path):
    report.write(copy.deepcopy(results), tmp_path)
    text = (tmp_path / "report.html").read_text("utf-8")
    check(text, HOSTILE[:-1])
    assert "\\udcff.jpg" in text


def test_the_audit_shows_hostile_texts_as_words(tmp_path):
    kinds = modalities.MODALITIES
    samples = tuple(
        Sample(
            text,
            text,
            text,
            (
                Medium(text, np.zeros((4, 4, 3), np.uint8), text, kinds["image"]),
                Medium("speech", np.random.rand(9, 8).astype(np.float32), text, kinds["speech"]),
            ),
            (("words", text), ("learnt", text), ("slot", text), ("special", text)),
            {text: 3},
        )
        for text in HOSTILE
    )
    counts = Counts({})
    counts.skipped.update(HOSTILE)
    counts.lengths |= {text: [1, 2, 3] for text in HOSTILE}
    sources = {text: Supervision(3, 3, 0, 5, Counter()) for text in HOSTILE}
    file = page.write(Audit(HOSTILE[0], sources, counts, samples), tmp_path)
    check(file.read_text("utf-8"), HOSTILE[:-1])
