"""Published layouts through the stages' own source tables and the whole pipeline."""

import io
import json
import tarfile
from importlib import resources

import av
import numpy as np
import pytest
from PIL import Image

from xllm_jax.configs import sources
from xllm_jax.core.stage import Data
from xllm_jax.data.pipeline import Pipeline

BACKBONES = resources.files("xllm_jax") / "data" / "synthetic_world" / "backbones"


def jpeg(path=None):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(buffer, "JPEG")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    path.write_text(text, "utf-8")


def pack(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def root(tmp_path):
    """The seven sets of stage 2, one good caption each, and two broken records in CC3M's tar."""
    good = [("0.jpg", jpeg()), ("0.txt", b"cc3m")]
    broken = [("1.jpg", jpeg()[:200]), ("1.txt", b"cut"), ("2.jpg", jpeg()), ("2.txt", b" ")]
    pack(tmp_path / "cc3m/00000.tar", good + broken)
    about = {"images": [{"id": 1, "file_name": "1.jpg"}]}
    said = {"annotations": [{"image_id": 1, "caption": "coco"}]}
    write(tmp_path / "coco/annotations/captions_train2017.json", about | said)
    jpeg(tmp_path / "coco/train2017/1.jpg")
    write(tmp_path / "flickr30k/results_20130124.token", "1.jpg#0\tflickr\n")
    jpeg(tmp_path / "flickr30k/flickr30k-images/1.jpg")
    write(tmp_path / "sbu/SBU_captioned_photo_dataset_urls.txt", "http://x/1.jpg\n")
    write(tmp_path / "sbu/SBU_captioned_photo_dataset_captions.txt", "sbu\n")
    jpeg(tmp_path / "sbu/images/1.jpg")
    row = {"image_id": "1.jpg", "caption": ["challenger"]}
    write(tmp_path / "ai_challenger/caption_train_annotations_20170902.json", [row])
    jpeg(tmp_path / "ai_challenger/caption_train_images_20170902/1.jpg")
    write(tmp_path / "wukong/wukong_100m_0.csv", "url,caption\nhttp://x,wukong\n")
    jpeg(tmp_path / "wukong/images/wukong_100m_0/0.jpg")
    region = {"image_id": 1, "region_id": 1, "phrase": "genome"}
    regions = [{"id": 1, "regions": [region]}]
    write(tmp_path / "visual_genome/region_descriptions.json", regions)
    jpeg(tmp_path / "visual_genome/VG_100K/1.jpg")
    return tmp_path


def test_every_set_of_stage_2_reaches_a_batch(root, tmp_path):
    listed = tmp_path / "quarantine.jsonl"
    data = Data(
        root=str(root),
        batch_format="image_text_pairs",
        sources=sources.image_text_pairs(),
        vocabulary=str(BACKBONES / "bert" / "vocab.txt"),
        examples=4,
        image={"size": 16},
        max_bad_share=0.5,
    )
    steps = list(Pipeline(data, train=False, quarantine=listed).iterate())
    read = [member[2] for _, info in steps for member in info["members"]]
    wanted = {"cc3m", "coco", "flickr", "sbu", "challenger", "wukong", "genome"}
    assert len(read) == 7 and {example.answer for example in read} == wanted
    assert sum(batch.weights.sum() for batch, _ in steps) == 7
    bad = [json.loads(line) for line in listed.read_text("utf-8").splitlines()]
    tar = f"{root}/cc3m/00000.tar"
    assert sorted(line["file"].split(":")[0] for line in bad) == [tar, tar]
    assert {line["reason"].split(" (")[0] for line in bad} == {
        "cannot be read as an image",
        "has an empty caption",
    }


def test_clips_and_dialogues_reach_a_batch(tmp_path):
    with (tmp_path / "v_a.mp4").open("wb") as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for _ in range(30):
            gray = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8))
            for packet in stream.encode(gray):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    rows = {"v_a": {"duration": 3.0, "timestamps": [[0, 1], [1, 3]], "sentences": ["红圆", "蓝圆"]}}
    write(tmp_path / "activitynet/train.json", rows)
    (tmp_path / "v_a.mp4").rename(tmp_path / "activitynet/v_a.mp4")
    features = {"speech_feats_path": "1.npy", "target_text": "红圆"}
    write(tmp_path / "vsdial_cn/train_vsdial_zh.json", [features])
    data = Data(
        root=str(tmp_path),
        sources={name: sources.INSTRUCTIONS[name] for name in ("activitynet", "vsdial_cn")},
        tokenizer=str(BACKBONES / "llm"),
        examples=3,
        rows=3,
        items={"video": 2},
        embeddings={"video": 4},
        image={"size": 16},
        video={"frames": 2},
        max_bad_share=0.5,
    )
    listed = tmp_path / "quarantine.jsonl"
    steps = list(Pipeline(data, train=False, quarantine=listed).iterate())
    read = [member[2].answer for _, info in steps for member in info["members"]]
    assert read == ["红圆", "蓝圆"]
    (bad,) = [json.loads(line) for line in listed.read_text("utf-8").splitlines()]
    assert "cif" in bad["reason"]
