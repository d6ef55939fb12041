"""Data sets of TFDS and Hugging Face: rows with named columns, media still encoded."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small_datasets
import soundfile
import tensorflow_datasets
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import image, reach, speech
from xllm_jax.data.rows import columns
from xllm_jax.data.sources import hugging_face, tfds


def picture(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def sound():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(8000) / 9), 16000, format="FLAC")
    return buffer.getvalue()


def gray(example):
    return round(np.asarray(image.read(example.media[0][1])).mean())


SHARD = "tiny_set-train.array_record-00000-of-00001"
FORM = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS data set of three rows, written without TensorFlow."""
    root = tmp_path_factory.mktemp("tfds")
    folder = root / "tiny_set" / "1.0.0"
    folder.mkdir(parents=True)
    features = tensorflow_datasets.features
    features.FeaturesDict(
        {
            "image": features.Image(shape=(None, None, 3)),
            "captions": features.Sequence({"text": features.Text()}),
            "audio": features.Tensor(shape=(None,), dtype=np.int64),
            "title": features.Text(),
        }
    ).save_config(folder)
    writer = ArrayRecordWriter(str(folder / SHARD), "group_size:1")
    samples = (8000 * np.sin(np.arange(8000) / 9)).astype(int)
    for number in range(3):
        row = tf_example_pb2.Example()
        row.features.feature["image"].bytes_list.value.append(picture(40 * number))
        texts = [f"第{number}只猫".encode(), b"two"]
        row.features.feature["captions/text"].bytes_list.value.extend(texts)
        row.features.feature["audio"].int64_list.value.extend(samples)
        row.features.feature["title"].bytes_list.value.append(b"" if number else b"\xe7\x8c\xab")
        writer.write(row.SerializeToString())
    writer.close()
    split = {"name": "train", "shardLengths": ["3"], "numBytes": "9", "filepathTemplate": FORM}
    about = {"name": "tiny_set", "version": "1.0.0", "fileFormat": "array_record"}
    (folder / "dataset_info.json").write_text(json.dumps({**about, "splits": [split]}))
    return root


def test_tfds_images(prepared):
    for path, name in ((prepared, "tiny_set"), (prepared / "tiny_set/1.0.0", "")):
        found = tfds.examples(str(path), name=name, image="image", answer="captions.text")
        assert [gray(example) for example in found] == [0, 40, 80]
        assert found[2].references == ("第2只猫", "two") and found[2].answer == "第2只猫"
        assert found[1].media[0][1] == "tiny_set/1.0.0/train[1].image"
        assert {example.task for example in found} == {"caption"}
    assert len(tfds.examples(str(prepared), "train[1:]", name="tiny_set", answer="title")) == 2


def test_tfds_reads_a_set_of_the_catalogue_without_its_code(prepared, tmp_path, monkeypatch):
    """The code of coco_captions needs TensorFlow; the files that it made do not."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    folder, old = tmp_path / "coco_captions/2014/1.1.0", prepared / "tiny_set/1.0.0"
    shutil.copytree(old, folder)
    (folder / SHARD).rename(folder / SHARD.replace("tiny_set", "coco_captions"))
    about = json.loads((old / "dataset_info.json").read_text())
    about |= {"name": "coco_captions", "configName": "2014", "version": "1.1.0"}
    (folder / "dataset_info.json").write_text(json.dumps(about))
    for name in ("coco_captions", "coco_captions/2014:1.1.0"):
        found = tfds.examples(str(tmp_path), name=name, image="image", answer="captions.text")
        assert [gray(example) for example in found] == [0, 40, 80]
    with pytest.raises(UserError, match=r"is not prepared.*tfds build coco_captions/2017"):
        tfds.examples(str(tmp_path), name="coco_captions/2017", image="image")


def test_tfds_sound_and_empty_text(prepared):
    found = tfds.examples(str(prepared), name="tiny_set", speech="audio", answer="title")
    assert (found[0].answer, found[0].transcript, found[0].task) == ("猫", "猫", "asr")
    assert speech.load(found[0].media[0][1]).shape == (48, 80)
    with pytest.raises(UserError, match=r"train\[1\]\.title: is empty"):
        found[1]


def test_tfds_mistakes(prepared, tmp_path):
    wrong = {
        "no data set 'nothing_like_it'": {"name": "nothing_like_it"},
        "has no split 'val'.*train": {"name": "tiny_set", "split": "val"},
        "no column 'picture'.*captions, image": {"name": "tiny_set", "image": "picture"},
        "Name the data set by the option": {},
    }
    for message, options in wrong.items():
        with pytest.raises(UserError, match=message):
            tfds.examples(str(prepared), **options)
    with pytest.raises(UserError, match=r"is not prepared.*tfds build mnist"):
        tfds.examples(str(tmp_path), name="mnist")


def test_tfds_features_that_need_tensorflow(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as where it is not installed
    known = json.loads((prepared / "tiny_set/1.0.0/features.json").read_text())
    kind = "tensorflow_datasets.core.features.audio_feature.Audio"
    sampled = {"sampleRate": "16000", "dtype": "int64", "encoding": "none", "shape": {}}
    known["featuresDict"]["features"]["audio"] = {"pythonClassName": kind, "audio": sampled}
    (tmp_path / "features.json").write_text(json.dumps(known))
    about = (prepared / "tiny_set/1.0.0/dataset_info.json").read_text()
    (tmp_path / "dataset_info.json").write_text(about)
    with pytest.raises(UserError, match="reads with TensorFlow alone"):
        tfds.examples(str(tmp_path), speech="audio")


def test_tfds_reads_without_tensorflow(prepared):
    code = (
        "import sys; from xllm_jax.data.sources import tfds\n"
        f"rows = tfds.examples({str(prepared)!r}, name='tiny_set', image='image', answer='title')\n"
        "assert rows[0].media and not {'tensorflow', 'torch', 'jax'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The package `datasets`, of which the reader's calls are kept in `asked`."""
    rows = [
        {"image": {"bytes": picture(20), "path": "x"}, "audio": {"bytes": sound(), "path": None}},
        {"image": {"bytes": None, "path": str(tmp_path / "b.png")}, "audio": None},
    ]
    for row, text in zip(rows, ("猫", ["狗", "犬"])):
        row |= {"caption": text, "question": "这是什么？"}
    media = {"image": small_datasets.Picture(), "audio": small_datasets.Audio()}
    whole = small_datasets.Rows(rows, {**media, "caption": None, "question": None})
    module = small_datasets.package(whole)
    monkeypatch.setitem(sys.modules, "datasets", module)
    (tmp_path / "b.png").write_bytes(picture(70))
    return module


def test_hugging_face_by_name(library, tmp_path):
    found = hugging_face.examples(
        str(tmp_path), "val", name="a/b", config="zh", image="image", answer="caption"
    )
    assert library.asked == [("a/b", "zh", str(tmp_path))]
    assert [gray(example) for example in found] == [20, 70]
    assert [example.references for example in found] == [("猫",), ("狗", "犬")]
    assert found[0].media[0][1] == "a/b/val[0].image"
    asked = hugging_face.examples(
        str(tmp_path), name="a/b", image="image", question="question", answer="caption"
    )
    assert (asked[0].instruction, asked[0].task) == ("这是什么？", "vqa")


def test_hugging_face_on_disk(library, tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    found = hugging_face.examples(str(tmp_path), speech="audio", answer="caption")
    assert library.asked == [str(tmp_path)]
    assert speech.load(found[0].media[0][1]).shape == (48, 80)
    assert (found[0].transcript, found[0].task) == ("猫", "asr")
    with pytest.raises(UserError, match=r"\[1\]\.audio: is neither bytes nor a path"):
        found[1]
    with pytest.raises(UserError, match="has no splits, so no 'val'"):
        hugging_face.examples(str(tmp_path), "val", answer="caption")


@pytest.mark.parametrize("name", ["{out}/a.parquet", "{folder}/../out/a.parquet", "{out}"])
def test_a_description_names_no_file_outside(library, name, tmp_path):
    """`data_files` of README.md can be any path; they are looked at before anything is read."""
    folder, out = tmp_path / "set", tmp_path / "out"
    folder.mkdir()
    library.named = {"train": [str(folder / "a"), name.format(folder=folder, out=out)]}
    with reach.Reach([str(folder)]).holding(), pytest.raises(UserError, match="lies outside of"):
        hugging_face.examples(str(folder), answer="caption")
    assert library.asked == []
    with reach.Reach([str(folder), str(out)]).holding():
        assert len(hugging_face.examples(str(folder), answer="caption")) == 2


@pytest.mark.parametrize("name", ["https://x.test/a.csv", "zip://a.csv::/etc/a.zip", "hf://a/b"])
def test_a_description_names_no_other_machine(library, name, tmp_path):
    library.named = {"train": [name]}
    with pytest.raises(UserError, match="is no file of this folder"):
        hugging_face.examples(str(tmp_path), answer="caption")
    assert library.asked == []


@pytest.mark.parametrize("where", ["split", "file", "link"])
def test_a_saved_set_names_no_file_outside(library, where, tmp_path):
    folder, out = tmp_path / "set", tmp_path / "out"
    for one in (folder / "train", out):
        one.mkdir(parents=True)
    splits = ["../out" if where == "split" else "train"]
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    files = [{"filename": "../../out/a.arrow" if where == "file" else "a.arrow"}]
    (folder / "train/state.json").write_text(json.dumps({"_data_files": files}))
    if where == "link":
        (folder / "train/a.arrow").symlink_to(out / "a.arrow")
    with reach.Reach([str(folder)]).holding(), pytest.raises(UserError, match="outside of"):
        hugging_face.examples(str(folder), answer="caption")
    assert library.asked == []


def test_hugging_face_mistakes(library, tmp_path):
    wrong = {
        "no/such is not on the hub": {"name": "no/such"},
        r"a/broken: cannot be opened \(row 7\)": {"name": "a/broken"},
        "no split 'test'.*train, validation": {"name": "a/b", "split": "test"},
        "no column 'text'.*caption": {"name": "a/b", "answer": "text"},
    }
    for message, options in wrong.items():
        with pytest.raises(UserError, match=message):
            hugging_face.examples(str(tmp_path), **options)
    with pytest.raises(UserError, match="no such folder"):
        hugging_face.examples(str(tmp_path / "none"), answer="caption")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The real package `datasets` without a network, and a set of two rows."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    package = pytest.importorskip("datasets", reason="pip install datasets")
    package.disable_progress_bars()
    rows = {
        "image": [{"bytes": picture(20), "path": None}, {"bytes": picture(70), "path": None}],
        "caption": [["猫", "喵"], ["狗"]],
    }
    texts = package.Features({"image": package.Image(), "caption": [package.Value("string")]})
    return package, package.Dataset.from_dict(rows, features=texts)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("form", ["parquet", "saved", "saved splits", "json", "folder of images"])
def test_hugging_face_with_its_own_package(hub, tmp_path, form):
    package, rows = hub
    folder, options, split = tmp_path / "set", {"image": "image", "answer": "caption"}, "train"
    folder.mkdir()
    if form == "parquet":
        rows.to_parquet(folder / "train.parquet")
    elif form == "saved":
        rows.save_to_disk(folder)
    elif form == "saved splits":
        package.DatasetDict({"train": rows, "validation": rows}).save_to_disk(folder)
        split = "val"
    else:
        name = {"json": "image", "folder of images": "file_name"}[form]
        place = folder if form == "folder of images" else tmp_path
        named = [(20, ["猫", "喵"]), (70, ["狗"])]
        for shade, _ in named:
            (place / f"{shade}.png").write_bytes(picture(shade))
        start = "" if place == folder else f"{place}/"
        lines = [{name: f"{start}{shade}.png", "caption": texts} for shade, texts in named]
        file = folder / ("train.jsonl" if form == "json" else "metadata.jsonl")
        file.write_text("\n".join(json.dumps(line) for line in lines))
    found = hugging_face.examples(str(folder), split, **options)
    assert [example.references for example in found] == [("猫", "喵"), ("狗",)]
    assert [gray(example) for example in found] == [20, 70]
    with pytest.raises(UserError, match=r"no column 'text'.*caption, image"):
        hugging_face.examples(str(folder), split, image="image", answer="text")


@pytest.mark.filterwarnings("default")
def test_hugging_face_tells_what_is_broken(hub, tmp_path):
    wrong = {"train.json": r"JSON parse error", "train.parquet": r"Parquet file size is 2 bytes"}
    for name, message in wrong.items():
        (tmp_path / name[6:]).mkdir()
        (tmp_path / name[6:] / name).write_bytes(b"{x")
        with pytest.raises(UserError, match=message):
            hugging_face.examples(str(tmp_path / name[6:]), answer="text")


def test_hugging_face_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets"):
        hugging_face.examples(str(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": b"", "text": "a"}, r"row\.image: is neither bytes nor a path"),
        ({"image": b"x", "text": b"\xff"}, "not UTF-8"),
        ({"image": b"x", "text": 3}, "is a number, not a text"),
        ({"image": b"x", "text": []}, r"row\.text: has no text"),
        ({"text": "a"}, r"row\.image: missing value"),
    ],
)
def test_broken_rows(row, message):
    with pytest.raises(UserError, match=message):
        columns.example(row, columns.Columns({"image": "image"}, answer="text"), "0", "row", 0)
