"""Readers of image captions at scale: tars, tables and lists of links, read row by row."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.media import image
from xllm_jax.data.record import Skipped
from xllm_jax.data.rows import json_spans, lazy
from xllm_jax.data.sources import cc3m, sbu, table, webdataset, wukong


def picture(shade, path=None):
    """A JPEG of one gray; its bytes, or a file."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(buffer, "JPEG")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def shades(examples):
    """The gray of each example's image, read through its path."""
    found = []
    for example in examples:
        ((modality, path),) = example.media
        assert modality == "image" and example.task == "caption"
        assert example.references == (example.answer,)
        found.append(round(np.asarray(image.read(path)).mean()))
    assert len({example.key for example in examples}) == len(examples)
    return found


def said(examples):
    return [example.answer for example in examples]


def pack(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def tars(root):
    """Two tars as img2dataset makes them; one sample has no image, one a caption in JSON only."""
    members = []
    for number, caption in enumerate(("一只猫", "两只狗")):
        name = f"{number:09d}"
        about = json.dumps({"caption": caption, "url": "http://x/y.jpg"}).encode()
        members += [(f"{name}.jpg", picture(50 * number)), (f"{name}.json", about)]
        members += [(f"{name}.txt", caption.encode())]
    pack(root / "00000.tar", [*members, ("000000002.txt", b"gone")])
    pack(
        root / "00001.tar",
        [("000010000.json", b'{"caption": "\\u4e09"}'), ("000010000.webp", picture(150))],
    )


def test_tars_are_read_in_place(tmp_path):
    tars(tmp_path)
    for _ in range(2):  # the second time by the kept index
        found = webdataset.examples(str(tmp_path))
        assert said(found) == ["一只猫", "两只狗", "三"]
        assert shades(found) == [0, 50, 150]
    kept = sorted((tmp_path / ".index").iterdir())
    assert [one.name for one in kept] == ["00000.npy", "00001.npy"]
    pack(tmp_path / "00001.tar", [("a.png", picture(200)), ("a.txt", b"new, and the index is old")])
    assert shades(webdataset.examples(str(tmp_path)))[2] == 200


def test_tars_of_a_split_and_other_readers(tmp_path):
    tars(tmp_path / "val")
    for reader in (cc3m, sbu, wukong, webdataset):
        assert len(reader.examples(str(tmp_path), "val")) == 3


def test_tars_one_folder_deeper(tmp_path):
    for folder in ("0", "1", "val"):
        tars(tmp_path / folder)
    found = wukong.examples(str(tmp_path))
    assert shades(found) == [0, 50, 150] * 2 and found[3].key == "1/00000/0"


def test_broken_tars(tmp_path):
    with pytest.raises(UserError, match="has no tar files"):
        webdataset.examples(str(tmp_path))
    tars(tmp_path)
    whole = (tmp_path / "00000.tar").read_bytes()
    for broken in (whole[:700], b"not a tar", whole[:600] + b"x" * 4000):
        (tmp_path / "00000.tar").write_bytes(broken)
        with pytest.raises(UserError, match=r"00000\.tar: is a damaged tar"):
            webdataset.examples(str(tmp_path))


def test_broken_samples_of_a_tar_cost_one_record(tmp_path):
    texts = (b"fine", b" \n", b"\xff\xfe", b"{", b'{"title": "x"}')
    ends = ("txt", "txt", "txt", "json", "json")
    members = []
    for number, (text, end) in enumerate(zip(texts, ends)):
        members += [(f"{number}.jpg", picture(0)), (f"{number}.{end}", text)]
    pack(tmp_path / "set/0.tar", members)
    found = {"set": mixture.read("set", Source("webdataset", "set"), str(tmp_path))}
    drawn = mixture.in_order(found, {"set": None})
    reasons = [one.reason for one in drawn if isinstance(one, Skipped)]
    assert len(drawn) == 5 and all(one.bad for one in drawn[1:])
    wanted = ("empty caption", "not UTF-8", "broken JSON", "missing key")
    assert all(word in reason for word, reason in zip(wanted, reasons, strict=True))


def conceptual(root):
    lines = ["a cat\thttp://x/0", "a dog\thttp://x/1", 'a "bird\thttp://x/2', "dead\thttp://x/3"]
    (root / "Train_GCC-training.tsv").write_text("\n".join(lines), "utf-8")
    for row, name in enumerate(("0_4567", "1.jpg", "00000/000000002.jpg")):
        picture(60 * row, root / "training" / name)
    (root / "training" / "notes.md").write_text("no image")


def test_cc3m(tmp_path):
    conceptual(tmp_path)
    found = cc3m.examples(str(tmp_path))
    assert said(found) == ["a cat", "a dog", 'a "bird']
    assert shades(found) == [0, 60, 120]
    (tmp_path / "zh.txt").write_text("猫\n狗\n鸟\n没有\n", "utf-8")
    assert said(cc3m.examples(str(tmp_path), captions=str(tmp_path / "zh.txt")))[2] == "鸟"
    (tmp_path / "zh.txt").write_text("猫\n", "utf-8")
    with pytest.raises(UserError, match="has 1 lines for 4"):
        cc3m.examples(str(tmp_path), captions=str(tmp_path / "zh.txt"))
    with pytest.raises(UserError, match="no such file"):
        cc3m.examples(str(tmp_path), "val")
    with pytest.raises(UserError, match="no split 'test'"):
        cc3m.examples(str(tmp_path), "test")


def test_cc3m_rows_that_are_broken(tmp_path):
    conceptual(tmp_path)
    (tmp_path / "Train_GCC-training.tsv").write_bytes(b"no tab\n \thttp://x\n\xff\thttp://x\n")
    found = cc3m.examples(str(tmp_path))
    for row, reason in enumerate(("has no tab", "empty caption", "not UTF-8")):
        with pytest.raises(UserError, match=reason):
            found[row]
    for name in ("0_4567", "1.jpg", "00000/000000002.jpg"):
        (tmp_path / "training" / name).unlink()
    with pytest.raises(UserError, match="has no images of the 3 rows"):
        cc3m.examples(str(tmp_path))


@pytest.mark.parametrize("form", ["json", "lines"])
def test_sbu(form, tmp_path):
    links = [f"http://static.flickr.com/1/{name}.jpg" for name in ("44_b0", "43_aa", "45_dead")]
    captions = ["a lake", "a hill", "a road"]
    if form == "json":
        whole = {"image_urls": links, "captions": captions, "user_ids": ["a", "b", "c"]}
        (tmp_path / sbu.JSON).write_text(json.dumps(whole))
    else:
        (tmp_path / sbu.LINKS).write_text("\n".join(links))
        (tmp_path / sbu.TEXTS).write_text("\n".join(captions))
    picture(10, tmp_path / "images/44_b0.jpg")
    picture(90, tmp_path / "images/43_aa.jpg")
    found = sbu.examples(str(tmp_path))
    assert (said(found), shades(found)) == (["a lake", "a hill"], [10, 90])
    with pytest.raises(UserError, match="no split 'val'"):
        sbu.examples(str(tmp_path), "val")


def test_sbu_lists_that_do_not_match(tmp_path):
    (tmp_path / sbu.JSON).write_text(json.dumps({"image_urls": ["a"], "captions": []}))
    with pytest.raises(UserError, match="has 0 captions for 1 links"):
        sbu.examples(str(tmp_path))
    (tmp_path / sbu.JSON).write_text('{"image_urls": [')
    with pytest.raises(UserError, match="the file is cut off at byte 16"):
        sbu.examples(str(tmp_path))


def test_wukong(tmp_path):
    rows = 'url,caption\nhttp://x/a,"红色,的\n花"\nhttp://x/b,死链\nhttp://x/c,"说""好"""\n'
    (tmp_path / "wukong_100m_0.csv").write_text(rows, "utf-8")
    (tmp_path / "wukong_100m_1.csv").write_text("url,caption\nhttp://x/d,山\n", "utf-8")
    for name, shade in (("0/00000.jpg", 30), ("0/00002.jpg", 60), ("1/0.png", 90)):
        picture(shade, tmp_path / f"images/wukong_100m_{name}")
    found = wukong.examples(str(tmp_path))
    assert said(found) == ["红色,的\n花", '说"好"', "山"]
    assert shades(found) == [30, 60, 90]
    (tmp_path / "wukong_test.csv").write_text("dir,caption\nt/1.jpg,树\nt/2.jpg\n", "utf-8")
    picture(120, tmp_path / "images/t/1.jpg")
    named = wukong.examples(str(tmp_path), "test")
    assert shades([named[0]]) == [120]
    with pytest.raises(UserError, match="has 1 fields for 2 columns"):
        named[1]
    for part in (0, 1):  # one alone is left out with a warning, see test_mirrors.py
        (tmp_path / f"wukong_100m_{part}.csv").write_text("link,text\na,b\n")
    with pytest.raises(UserError, match=r"no column 'caption'.*link, text"):
        wukong.examples(str(tmp_path))
    with pytest.raises(UserError, match="no such files"):
        wukong.examples(str(tmp_path), "val")


def test_wukong_as_its_download_script_leaves_it(tmp_path):
    (tmp_path / "wukong_release").mkdir()
    (tmp_path / "wukong_release/wukong_100m_7.csv").write_text("url,caption\na,山\nb,水\n", "utf-8")
    picture(30, tmp_path / "Data/wukong_100m_7/1.jpeg")
    found = wukong.examples(str(tmp_path))
    assert (said(found), shades(found)) == (["水"], [30])


def test_table(tmp_path):
    (tmp_path / "train.tsv").write_text("title\tfilepath\n猫\ta/1.jpg\n狗\t\n\t2.jpg\n", "utf-8")
    picture(70, tmp_path / "a/1.jpg")
    found = table.examples(str(tmp_path))
    assert (said([found[0]]), shades([found[0]])) == (["猫"], [70])
    for row, reason in ((1, "names no image"), (2, "empty caption")):
        with pytest.raises(UserError, match=reason):
            found[row]
    assert said([table.examples(str(tmp_path / "train.tsv"))[0]]) == ["猫"]
    with pytest.raises(UserError, match="no column 'caption'"):
        table.examples(str(tmp_path), caption="caption")
    with pytest.raises(UserError, match=r"val\.csv: no such file"):
        table.examples(str(tmp_path), "val")


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 20])
def test_offsets_do_not_depend_on_how_much_is_read_at_once(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_spans, "CHUNK", chunk)
    rows = [{"a": '值，]\\"{'}, 12, [], {"b": [1, {"c": "}"}]}, 3.5]
    for name, text in (
        ("a.json", json.dumps(rows, ensure_ascii=False, indent=4)),
        ("b.json", "\ufeff" + json.dumps(rows)),
        ("c.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"),
    ):
        (tmp_path / name).write_text(text, "utf-8")
        assert list(lazy.Rows(tmp_path / name)) == rows
    monkeypatch.setattr(lazy, "CHUNK", chunk)
    (tmp_path / "t.csv").write_text('a,b\r\n1,"x\r\ny"\r\n\r\n2,"\n"\n3,""""', "utf-8")
    values = [row["b"] for row in lazy.Table(tmp_path / "t.csv", ("a",))]
    assert values == ["x\r\ny", "\n", '"']


def test_broken_json_lists(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, {"b": "\xff"}, 3]')
    rows = lazy.Rows(tmp_path / "a.json")
    assert (rows[0], rows[2], len(rows)) == ({"a": 1}, 3, 3)
    with pytest.raises(UserError, match=r"\[1\]: is not UTF-8"):
        rows[1]
    for text in ('{"a": 1}', "", '[{"a": 1} {"a": 2}]'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"not a JSON list|broken JSON"):
            lazy.Rows(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('[{"a": 1}')
    cut = lazy.Rows(tmp_path / "a.json")
    assert (cut[0], len(cut)) == ({"a": 1}, 2)
    with pytest.raises(UserError, match="the file ends inside record 1"):
        cut[1]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match="broken JSON"):
        lazy.Rows(tmp_path / "a.jsonl")[1]


def test_a_large_table_takes_few_bytes_a_row(tmp_path):
    count = 200_000
    (tmp_path / "train.tsv").write_text("filepath\ttitle\n" + "a/1.jpg\t猫\n" * count, "utf-8")
    found = mixture.read("big", Source("table", "train.tsv"), str(tmp_path))
    assert len(found) == count
    held = vars(lazy.Lines(tmp_path / "train.tsv")).values()
    assert sum(one.nbytes for one in held if isinstance(one, np.ndarray)) < 20 * count
    assert found[-1].key == f"train-{count - 1}"
