"""Files are split at newline characters only: not at what Unicode calls a line or a page end."""

import ast
import io
import json
import pathlib

import pytest

from xllm_jax.core import log
from xllm_jax.core.stage import Source
from xllm_jax.core.text_lines import split_lines
from xllm_jax.data import mixture
from xllm_jax.data.quarantine import Quarantine
from xllm_jax.data.record import Skipped
from xllm_jax.data.text.characters import CharacterVocabulary
from xllm_jax.data.text.wordpiece import WordPiece
from xllm_jax.evaluation import demo_suite

ROOT = pathlib.Path(__file__).parents[1]
OTHERS = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"  # where str.splitlines ends a line, too
TEXT = "红" + "x".join(OTHERS) + "圆"


def test_lines_are_those_of_an_opened_file():
    for text in ("", "a", "a\n", "\n", "a\n\nb\r\nc", f"{OTHERS}\n{OTHERS}"):
        opened = [line.rstrip("\r\n") for line in io.StringIO(text, newline="\n")]
        assert split_lines(text) == opened


def test_nothing_splits_a_text_at_other_characters():
    for folder in ("xllm_jax", "launch", "configs", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                assert getattr(node, "attr", "") != "splitlines", f"{file}:{node.lineno}"


def written(folder, **files):
    for name, text in files.items():
        file = folder / name.replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")


def talk(text):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    return json.dumps({"id": "a", "conversations": turns}, ensure_ascii=False)


READERS = {
    "instructions": {"train__jsonl": f"{talk(TEXT)}\n{talk(TEXT)}\n"},
    "captions_folder": {"captions__tsv": f"image\tcaption\na.jpg\t{TEXT}\nb.jpg\t{TEXT}\n"},
    "captions_folder jsonl": {
        "captions__jsonl": "\n".join(
            json.dumps({"image": name, "caption": TEXT}, ensure_ascii=False) for name in "ab"
        )
    },
    "captions_folder texts": {"a__jpg": "x", "a__txt": f"{TEXT}\n{TEXT}\n"},
    "table": {"train__csv": f"filepath,title\na.jpg,{TEXT}\nb.jpg,{TEXT}\n"},
    "flickr30k": {
        "results_20130124__token": f"a.jpg#0\t{TEXT}\na.jpg#1\t{TEXT}\n",
        "images/a__jpg": "",
    },
}


@pytest.mark.parametrize("case", READERS)
def test_a_caption_stays_whole(case, tmp_path):
    written(tmp_path, **READERS[case])
    found = mixture.read("a", Source(case.split()[0], str(tmp_path)), "")
    assert [one.answer for one in found] == [TEXT, TEXT]


def test_a_transcript_stays_whole(tmp_path):
    """The characters themselves are spaces between words, and go as those do."""
    lines = f"U1 红{OTHERS}色\nU2 圆{OTHERS}形\n"
    written(tmp_path, **{"transcript/a__txt": lines})
    for name in ("U1", "U2"):
        written(tmp_path, **{f"wav/train/S/{name}__wav": "RIFF"})
    found = mixture.read("a", Source("aishell", str(tmp_path)), "")
    assert [one.transcript for one in found] == ["红色", "圆形"]


def test_vocabularies_keep_their_ids(tmp_path):
    (tmp_path / "characters.txt").write_text("红 9\n\u2028 8\n\u3000 7\n圆 6\n", "utf-8")
    found = CharacterVocabulary.load(tmp_path / "characters.txt")
    assert found.characters == ("红", "\u2028", "\u3000", "圆")
    assert found.encode("圆")[0] == found.encode("红")[0] + 3
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "\x0c", "猫"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
    assert WordPiece(tmp_path).encode("猫") == [6]


def test_lists_of_a_run_keep_their_lines(tmp_path):
    listed = Quarantine(tmp_path / "quarantine.jsonl", 1.0)
    name = f"a{OTHERS}b.jpg"
    listed.add(2, [Skipped(name, "broken", True), Skipped("c", "broken", True)], drawn=4)
    again = Quarantine(tmp_path / "quarantine.jsonl", 1.0, drawn=8)
    assert again.counts == {name: 1, "c": 1}
    assert (tmp_path / "quarantine.jsonl").read_text("utf-8").count("\n") == 2


def test_curves_keep_their_lines(tmp_path):
    lines = [{"step": step, f"loss{OTHERS}": 1.0} for step in (1, 2)]
    folder = tmp_path / "a"
    folder.mkdir()
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines)
    (folder / "metrics.jsonl").write_text(text, "utf-8")
    named = {"step": 1, "loss": 0.5, "name": TEXT}
    (tmp_path / "b").mkdir()
    written(tmp_path, **{"b/metrics__jsonl": json.dumps(named, ensure_ascii=False) + "\n"})
    assert demo_suite.curves(tmp_path)["b"] == [[1, 0.5]]
    log.Log(folder, "a", 4, start=1).close()
    assert (folder / "metrics.jsonl").read_text("utf-8") == text[: text.index("\n") + 1]
