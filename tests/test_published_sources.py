"""Readers of published sets that have a layout of their own, on small real files in that layout."""

import json
import pathlib

import av
import numpy as np
import pytest
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import image, video
from xllm_jax.data.sources import activitynet, ai_challenger, flickr30k, llava_test


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade,) * 3).save(path)


def opened(examples):
    """Examples with unique keys, whose images can be read."""
    examples = list(examples)
    assert len({example.key for example in examples}) == len(examples)
    for example in examples:
        for modality, path in example.media:
            if modality == "image":
                image.read(path)
    return examples


def names(examples):
    return [pathlib.Path(example.media[0][1]).name for example in examples]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def flickr(root, form):
    rows = [("1.jpg", "A cat ."), ("1.jpg", "Cats | here ."), ("22.jpg", "A dog .")]
    if form == "token":
        lines = [f"{name}#{number % 2}\t{text}" for number, (name, text) in enumerate(rows)]
        (root / "results_20130124.token").write_text("\n".join(lines) + "\n", "utf-8")
    else:
        lines = [f"{name}| {number % 2}| {text}" for number, (name, text) in enumerate(rows)]
        lines[2] = "22.jpg| 4   A dog ."  # the published table has one such row
        lines = ["image_name| comment_number| comment", *lines]
        (root / "results.csv").write_text("\n".join(lines), "utf-8")
    for name in ("1.jpg", "22.jpg"):
        picture(root / "flickr30k-images" / name)


@pytest.mark.parametrize("form", ["token", "csv"])
def test_flickr30k(form, tmp_path):
    flickr(tmp_path, form)
    found = opened(flickr30k.examples(str(tmp_path)))
    assert [e.answer for e in found] == ["A cat .", "Cats | here .", "A dog ."]
    assert names(found) == ["1.jpg", "1.jpg", "22.jpg"]
    assert found[1].references == ("A cat .", "Cats | here .")
    assert len(flickr30k.examples(str(tmp_path), per_caption=False)) == 2
    with pytest.raises(UserError, match="which images are 'val'"):
        flickr30k.examples(str(tmp_path), "val")
    listed = [{"filename": "1.jpg", "split": "train"}, {"filename": "22.jpg", "split": "val"}]
    write(tmp_path / "dataset_flickr30k.json", {"images": listed})
    assert names(opened(flickr30k.examples(str(tmp_path), "val"))) == ["22.jpg"]
    (tmp_path / "val.txt").write_text("1\n")
    assert names(opened(flickr30k.examples(str(tmp_path), "val"))) == ["1.jpg"]
    (tmp_path / "zh").write_text("1.jpg#0\t狗\n1.jpg#1\t\n", "utf-8")
    translated = flickr30k.examples(str(tmp_path), captions=str(tmp_path / "zh"))
    assert translated[0].references == ("狗",)
    with pytest.raises(UserError, match=r"1\.jpg: has an empty caption"):
        translated[1]


def test_flickr30k_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"results_20130124\.token: no such file"):
        flickr30k.examples(str(tmp_path))
    (tmp_path / "results_20130124.token").write_text("1.jpg A cat\n")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="row 1: is not a name"):
        flickr30k.examples(str(tmp_path))


def test_ai_challenger(tmp_path):
    rows = [
        {"url": "http://x/1", "image_id": "a.jpg", "caption": ["一个人", " 两个人\n"]},
        {"url": "http://x/2", "image_id": "b.jpg", "caption": ["山"]},
        {"url": "http://x/3", "image_id": "c.jpg", "caption": ["山", " "]},
        {"url": "http://x/4", "caption": []},
    ]
    folder = tmp_path / "ai_challenger_caption_train_20170902"
    write(folder / "caption_train_annotations_20170902.json", rows)
    for name in ("a.jpg", "b.jpg"):
        picture(folder / "caption_train_images_20170902" / name)
    found = ai_challenger.examples(str(tmp_path))
    assert len(found) == 6
    good = opened(found[number] for number in range(3))
    assert [e.answer for e in good] == ["一个人", "两个人", "山"]
    assert good[0].references == ("一个人", "两个人") and names(good)[2] == "b.jpg"
    for place, reason in ((3, r"\[2\]: has an empty"), (5, r"\[3\]\.image_id: missing key")):
        with pytest.raises(UserError, match=reason):
            found[place]
    assert len(ai_challenger.examples(str(tmp_path), per_caption=False)) == 4
    with pytest.raises(UserError, match="no such file"):
        ai_challenger.examples(str(tmp_path), "val")
    (folder / "caption_train_annotations_20170902.json").write_text('[{"image_id": "a')
    with pytest.raises(UserError, match="the file ends inside record 0"):
        ai_challenger.examples(str(tmp_path))[0]


def film(path, seconds=4):
    """Ten frames a second, 6 grays apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for number in range(10 * seconds):
            gray = np.full((32, 32, 3), 6 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(gray)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def brightness(example):
    frames = video.load(example.media[0][1], {"frames": 2, "size": 16})
    gray = frames[..., 0].mean(axis=(1, 2)) * image.STD[0] + image.MEAN[0]
    return np.round(gray * 255 / 6).astype(int).tolist()


def test_activitynet(tmp_path):
    spans = [[0, 2.0], [1.0, 4], [3, 3], [1]]
    said = ["他走路。", "他跑步。", "他站着。", "他坐着。"]
    rows = {
        "v_one": {"duration": 4.0, "timestamps": spans, "sentences": said},
        "v_gone": {"duration": 4.0, "timestamps": [[0, 1]], "sentences": ["没有"]},
        "v_two": {"duration": 4.0, "timestamps": [[0, 1]], "sentences": [" "]},
    }
    write(tmp_path / "train.json", rows)
    film(tmp_path / "videos/v_one.mp4")
    (tmp_path / "videos/v_two.mp4").write_bytes(b"x")
    found = activitynet.examples(str(tmp_path))
    assert len(found) == 5
    first, second = found[0], found[1]
    assert (first.key, first.answer, first.task) == ("v_one#0", "他走路。", "video_caption")
    assert brightness(first) == [5, 15]
    assert brightness(second) == [17, 32]
    reasons = ((2, "lasts from 3.0 s to 3.0 s"), (3, "no start and end"), (4, "empty sentence"))
    for place, reason in reasons:
        with pytest.raises(UserError, match=reason):
            found[place]
    whole = activitynet.examples(str(tmp_path), kind="whole")
    assert (len(whole), whole[0].answer) == (2, "".join(said))
    assert brightness(whole[0]) == [10, 30]


def test_activitynet_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"val_1\.json: no such file"):
        activitynet.examples(str(tmp_path), "val")
    with pytest.raises(UserError, match="unknown kind 'x'"):
        activitynet.examples(str(tmp_path), kind="x")
    write(tmp_path / "train.json", [])
    with pytest.raises(UserError, match="not an object"):
        activitynet.examples(str(tmp_path))
    write(tmp_path / "train.json", {"v_a": {}})
    with pytest.raises(UserError, match=r"has no videos of train\.json"):
        activitynet.examples(str(tmp_path))


def test_llava_test(tmp_path):
    kinds = ("conv", "detail", "complex")
    asked = [
        {"question_id": n, "image": f"{n // 3:012d}.jpg", "text": f"问{n}？", "category": kind}
        for n, kind in enumerate(kinds * 2)
    ]
    asked.append({"question_id": 6, "image": "x.jpg", "text": " "})
    lines = [json.dumps(row) for row in asked]
    (tmp_path / "qa90_questions.jsonl").write_text("\n".join([*lines, "{broken"]))
    picture(tmp_path / "images/000000000000.jpg")
    picture(tmp_path / "images/COCO_val2014_000000000001.jpg")
    found = llava_test.examples(str(tmp_path))
    good = opened(found[number] for number in range(6))
    assert [e.tags for e in good] == [("conv",), ("detail",), ("complex",)] * 2
    assert (good[4].instruction, good[4].answer, good[4].task) == ("问4？", "", "dialogue")
    for place, reason in ((6, "has an empty text"), (7, "the file ends inside record 7")):
        with pytest.raises(UserError, match=reason):
            found[place]
    replies = [json.dumps({"question_id": n, "text": f"答{n}"}) for n in range(6)]
    (tmp_path / "qa90_gpt4_answer.jsonl").write_text("\n".join(replies))
    assert llava_test.examples(str(tmp_path))[4].answer == "答4"
    with pytest.raises(UserError, match="no split 'train'"):
        llava_test.examples(str(tmp_path), "train")
    with pytest.raises(UserError, match="no such file"):
        llava_test.examples(str(tmp_path), questions=str(tmp_path / "zh.jsonl"))
