"""CSV row for row as the csv module reads it; TSV by tabs and newlines alone."""

import csv
import json
import random

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.record import Skipped
from xllm_jax.data.rows import csv_rows, lazy
from xllm_jax.data.sources import captions_folder, table, wukong

PIECES = ["a", "b c", ",", '"', '""', "\n", "\r\n", "\r", "猫", " ", "\t", "\x0c", "\u2028", "'"]


def reference(path):
    """Rows of the csv module, None where it refuses one; empty ones left out."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        while True:
            try:
                rows.append(next(reader))
            except csv.Error:
                rows.append(None)
            except StopIteration:
                return [row for row in rows if row != []]


def ours(path):
    lines = lazy.Lines(path, quoted=True)
    found = []
    for index in range(len(lines)):
        try:
            found.append(csv_rows.fields(lines[index], ""))
        except UserError:
            found.append(None)
    return found


@pytest.fixture
def limit():
    """A small limit of the csv module, so that rows beyond it occur, too."""
    before = csv.field_size_limit(12)
    yield
    csv.field_size_limit(before)


@pytest.mark.usefixtures("limit")
def test_rows_are_those_of_the_csv_module(tmp_path):
    draw, path, refused = random.Random(0), tmp_path / "a.csv", 0
    for _ in range(1500):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(40)))
        path.write_bytes(text.encode())
        wanted = reference(path)
        refused += None in wanted
        assert ours(path) == wanted, text
    assert refused > 20


def test_a_field_beyond_the_limit_costs_its_row(tmp_path):
    path = tmp_path / "train.csv"
    long = "x" * 140_000
    path.write_text(f'filepath,title\na.jpg,猫\nb.jpg,"{long}"\nc.jpg,狗\n', "utf-8")
    found = {"a": mixture.read("a", Source("table", str(path)), "")}
    first, second, third = mixture.in_order(found, {"a": None})
    assert (first.example.answer, third.example.answer) == ("猫", "狗")
    assert isinstance(second, Skipped) and "field larger than field limit" in second.reason


INCHES = 'filepath,title\na.jpg,a 5" pipe\nb.jpg,a cat\nc.jpg,a dog\nd.jpg,a 7" record\n'


def test_an_inch_mark_in_a_csv(tmp_path):
    (tmp_path / "train.csv").write_text(INCHES)
    said = [one.answer for one in table.examples(str(tmp_path))]
    assert said == ['a 5" pipe', "a cat", "a dog", 'a 7" record']
    (tmp_path / "captions.csv").write_text(INCHES.replace("filepath,title", "image,caption"))
    assert [one.answer for one in captions_folder.examples(str(tmp_path))] == said
    (tmp_path / "wukong_100m_0.csv").write_text(INCHES.replace("filepath,title", "dir,caption"))
    (tmp_path / "images").mkdir()
    assert [one.answer for one in wukong.examples(str(tmp_path))] == said


TABS = 'image\tcaption\na.jpg\t"Stop" sign on a wall\nb.jpg\t"an open quote\nc.jpg\ta cat, red\n'


def test_quotes_in_a_tsv_are_letters(tmp_path):
    (tmp_path / "captions.tsv").write_text(TABS)
    (tmp_path / "train.TSV").write_text(TABS)
    for found in (
        captions_folder.examples(str(tmp_path)),
        table.examples(str(tmp_path / "train.TSV"), image="image", caption="caption"),
    ):
        said = [one.answer for one in found]
        assert said == ['"Stop" sign on a wall', '"an open quote', "a cat, red"]


def test_a_row_that_is_not_complete_costs_that_row(tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,x\nb.jpg\n,y\nc.jpg,z\n")
    found = {"a": mixture.read("a", Source("captions_folder", str(tmp_path)), "")}
    drawn = mixture.in_order(found, {"a": None})
    reasons = [one.reason for one in drawn if isinstance(one, Skipped)]
    assert reasons == ["has 1 fields for 2 columns", "names no image"]
    assert [one.example.answer for one in drawn[:2]] == ["x", "z"]


def test_a_mark_of_utf8_before_a_quoted_header(tmp_path):
    text = '\ufefffilepath,title\na.jpg,"one\nline, more"\n'
    (tmp_path / "train.csv").write_text(text.replace("filepath", '"filepath"'), "utf-8")
    (found,) = table.examples(str(tmp_path))
    assert json.dumps(found.answer) == '"one\\nline, more"'
