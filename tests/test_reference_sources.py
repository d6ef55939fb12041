"""The reference repository's JSON files and VSDial-CN, features included."""

import base64
import io
import json
import pathlib

import numpy as np
import pytest
import soundfile
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import cif_features, image, speech
from xllm_jax.data.sources import reference, vsdial_cn


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=4), "utf-8")
    return str(path)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (90, 90, 90)).save(path)


def features(path, tokens=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(0).normal(size=(tokens, 512)).astype(np.float32))


def sound(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(8000) / 9), 16000)


def test_captions(tmp_path):
    picture(tmp_path / "all/a.jpg")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (30, 30, 30)).save(buffer, "PNG")
    packed = base64.urlsafe_b64encode(buffer.getvalue()).decode()
    rows = [
        {"image": "/raid/x/a.jpg", "caption": "一只猫", "image_id": "a", "dataset": "cc3m_zh"},
        {"image": packed, "caption": ["狗", "犬"], "image_id": "b", "dataset": "MUGE_zh"},
        {"image_id": "a", "caption_zh": "一只很大的猫"},
        {"image": "a.jpg", "caption": [""], "dataset": "x"},
        {"image": "@@@", "caption": "狗", "dataset": "MUGE_zh"},
        {"picture": "a.jpg", "caption": "狗"},
        "text",
    ]
    found = reference.examples(write(tmp_path / "a.json", rows), images=f"{tmp_path}/all")
    assert [found[i].answer for i in range(3)] == ["一只猫", "狗", "一只很大的猫"]
    assert found[1].references == ("狗", "犬")
    grays = [round(np.asarray(image.read(found[i].media[0][1])).mean()) for i in range(3)]
    assert grays == [90, 30, 90]
    reasons = ("an empty caption", "is not base64", r"image: missing key", "not an object")
    for place, reason in enumerate(reasons, start=3):
        with pytest.raises(UserError, match=reason):
            found[place]
    films = reference.examples(str(tmp_path / "a.json"), videos=f"{tmp_path}/films")
    assert films[2].media == (("video", f"{tmp_path}/films/a.mp4"),)
    assert films[2].task == "video_caption"


ASR = {
    "speech_feats_path": "/raid/x/17.npy",
    "target_text": "厨房用品",
    "utterance_id": "IC1",
    "length": 4,
}
VSD = {
    "speech_feats_path": "/raid/x/18.npy",
    "image_path": "/raid/y/COCO_train2014_000000000007.jpg",
    "question_text": "它是什么颜色的？",
    "answer_text": "红色",
    "history_text": "问题：有猫吗？回复：有问题：大吗？回复：不大",
}


def test_speech_features(tmp_path):
    features(tmp_path / "npy/17.npy")
    features(tmp_path / "npy/18.npy", 7)
    picture(tmp_path / "coco/train2014/COCO_train2014_000000000007.jpg")
    file = write(tmp_path / "train.json", [ASR, VSD, {**ASR, "image": "COCO_train2014_7.jpg"}])
    folders = {"features": f"{tmp_path}/npy", "images": f"{tmp_path}/coco"}
    heard, seen, both = reference.examples(str(tmp_path), **folders)
    assert (heard.answer, heard.transcript, heard.task) == ("厨房用品", "厨房用品", "asr")
    assert cif_features.load(heard.media[0][1]).shape == (4, 512)
    assert [name for name, _ in seen.media] == ["image", "cif"]
    assert (seen.answer, seen.transcript, seen.task) == ("红色", "它是什么颜色的", "spoken_vqa")
    assert seen.history == (("有猫吗？", "有"), ("大吗？", "不大"))
    image.read(seen.media[0][1])
    assert cif_features.load(seen.media[1][1]).shape == (7, 512)
    assert [name for name, _ in both.media] == ["image", "cif"] and both.task == "asr"
    masr = reference.examples(file, kind="masr", **folders)[1]
    assert (masr.answer, masr.task, masr.history) == ("它是什么颜色的", "asr", ())


def test_sounds_take_the_place_of_features(tmp_path):
    sound(tmp_path / "wav/C1/IC1.wav")
    sound(tmp_path / "wav/18.flac")
    file = write(tmp_path / "a.json", [ASR, VSD, {**ASR, "utterance_id": "IC2"}])
    found = reference.examples(file, audio=f"{tmp_path}/wav")
    for index in (0, 1):
        modality, path = found[index].media[-1]
        assert modality == "speech" and speech.load(path).shape[1] == 80
    with pytest.raises(UserError, match=r"\[2\]: no sound file of 17\.npy"):
        found[2]


def test_rows_that_are_broken(tmp_path):
    rows = [
        {**ASR, "target_text": " "},
        {**VSD, "history_text": "问题：有猫吗？"},
        {**VSD, "answer_text": 3},
        {"speech_feats_path": "1.npy"},
    ]
    found = reference.examples(write(tmp_path / "a.json", rows))
    reasons = ("empty text", "question without an answer", "is a number", "missing key")
    for place, reason in enumerate(reasons):
        with pytest.raises(UserError, match=reason):
            found[place]
    with pytest.raises(UserError, match=r"val\.json: no such file"):
        reference.examples(str(tmp_path), "val")
    with pytest.raises(UserError, match="unknown kind 'x'"):
        reference.examples(str(tmp_path), kind="x")
    with pytest.raises(UserError, match="no such folder"):
        reference.examples(str(tmp_path / "a.json"), audio=f"{tmp_path}/none")


BROKEN = {
    "cannot be read as features": b"text",
    "no such file": None,
    r"shape \(4, 80\)": np.zeros((4, 80), np.float32),
    r"shape \(512,\)": np.zeros(512, np.float32),
    "holds no token": np.zeros((0, 512), np.float32),
    "not finite": np.full((2, 512), np.nan, np.float32),
    "not finite ": np.zeros((2, 512), np.int32),
    "cannot be read as features ": np.asarray([{}], object),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_features(message, tmp_path):
    content = BROKEN[message]
    if isinstance(content, bytes):
        (tmp_path / "a.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "a.npy", content)
    with pytest.raises(UserError, match=message.strip()):
        cif_features.load(tmp_path / "a.npy")


def test_vsdial_cn(tmp_path):
    picture(tmp_path / "images/COCO_train2014_000000000007.jpg")
    features(tmp_path / "features/18.npy")
    features(tmp_path / "features/17.npy")
    write(tmp_path / "train_vsdial_asr_zh_new.json", [ASR])
    write(tmp_path / "train_vsdial_zh_nocap_new.json", [VSD])
    (heard,) = vsdial_cn.examples(str(tmp_path), kind="asr")
    (seen,) = vsdial_cn.examples(str(tmp_path))
    (masr,) = vsdial_cn.examples(str(tmp_path), kind="masr")
    assert [heard.answer, seen.answer, masr.answer] == ["厨房用品", "红色", "它是什么颜色的"]
    for example in (heard, seen, masr):
        assert all(pathlib.Path(path).is_file() for _, path in example.media)
    sound(tmp_path / "audio/18.wav")
    (seen,) = vsdial_cn.examples(str(tmp_path))
    assert [name for name, _ in seen.media] == ["image", "speech"]
    talk = {
        "image_id": 7,
        "caption": "",
        "dialog": [{"question": 0, "answer": 0, "speech": "q.wav"}],
    }
    data = {"questions": ["有人吗？"], "answers": ["没有"], "dialogs": [talk]}
    write(tmp_path / "visdial_1.0_train.json", {"data": data})
    (asked,) = vsdial_cn.examples(str(tmp_path))
    assert (asked.transcript, asked.answer) == ("有人吗", "没有")
    with pytest.raises(UserError, match=r"val_vsdial_zh\*\.json: no such file"):
        vsdial_cn.examples(str(tmp_path), "val")
    with pytest.raises(UserError, match="unknown kind 'dialogue'"):
        vsdial_cn.examples(str(tmp_path), kind="dialogue")
