"""Small real files in the layout of every published set: what each reader is tried on."""

from __future__ import annotations

import base64
import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from small_datasets import Picture, Rows
from test_video import write as write_film

COUNT = 5
TEXTS = tuple(f"红色的圆在左边{number}" for number in range(COUNT))
NUMBERS = range(1, COUNT + 1)


def picture(path: Path | None = None) -> bytes:
    """A JPEG of 24 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (200, 40, 40)).save(buffer, "JPEG")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def sound(path: Path) -> None:
    """Half a second of a tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(8000) / 9) / 2, 16000)


def film(path: Path) -> None:
    """A second of video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_film(path, 10, size=(32, 32))


def write(path: Path, value: object) -> None:
    """Text as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    path.write_text(text, "utf-8")


def pictures(folder: Path, *names: str) -> None:
    """Images of these names, or 1.jpg … n.jpg."""
    for name in names or [f"{number}.jpg" for number in NUMBERS]:
        picture(folder / name)


def activitynet(root: Path) -> None:
    spans = [[0, 0.5], [0.2, 0.9]]
    rows = {"v_a": {"duration": 1.0, "timestamps": spans, "sentences": list(TEXTS[:2])}}
    write(root / "train.json", rows)
    film(root / "videos/v_a.mp4")


def ai_challenger(root: Path) -> None:
    rows = [{"url": "", "image_id": f"{n}.jpg", "caption": [t]} for n, t in zip(NUMBERS, TEXTS)]
    write(root / "caption_train_annotations_20170902.json", rows)
    pictures(root / "caption_train_images_20170902")


def aishell(root: Path) -> None:
    lines = [f"U{n} {' '.join(text)}" for n, text in zip(NUMBERS, TEXTS)]
    write(root / "transcript/aishell_transcript_v0.8.txt", "\n".join(lines))
    for number in NUMBERS:
        sound(root / f"wav/train/S1/U{number}.wav")


def aishell_2(root: Path) -> None:
    write(root / "trans.txt", "\n".join(f"U{n}\t{t}" for n, t in zip(NUMBERS, TEXTS)))
    write(root / "wav.scp", "\n".join(f"U{n}\twav/U{n}.wav" for n in NUMBERS))
    for number in NUMBERS:
        sound(root / f"wav/U{number}.wav")


def captions_folder(root: Path) -> None:
    pictures(root)
    for number, text in zip(NUMBERS, TEXTS):
        write(root / f"{number}.txt", text)


def cc3m(root: Path) -> None:
    lines = "".join(f"{text}\thttp://x/{n}\n" for n, text in zip(NUMBERS, TEXTS))
    write(root / "Train_GCC-training.tsv", lines)
    pictures(root / "training", *(f"{number}.jpg" for number in range(COUNT)))


def coco(root: Path) -> None:
    about = [{"id": number, "file_name": f"{number}.jpg"} for number in NUMBERS]
    said = [{"image_id": number, "caption": text} for number, text in zip(NUMBERS, TEXTS)]
    file = root / "annotations/captions_train2017.json"
    write(file, {"images": about, "annotations": said})
    pictures(root / "train2017")


def flickr30k(root: Path) -> None:
    lines = [f"{number}.jpg#0\t{text}" for number, text in zip(NUMBERS, TEXTS)]
    write(root / "results_20130124.token", "\n".join(lines))
    pictures(root / "flickr30k-images")


def instructions(root: Path) -> None:
    """Two images in one talk, two rounds about a video, a spoken question about an image."""
    pictures(root)
    sound(root / "a.flac")
    film(root / "a.mp4")
    asked = [("<image>和<image>？", TEXTS[0]), ("<video>看", TEXTS[1]), ("几个？", TEXTS[2])]
    asked.append(("<image><speech>", TEXTS[3]))
    said = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in asked]
    rows = [
        {"id": "two", "image": ["1.jpg", "2.jpg"], "conversations": said[0]},
        {"id": "film", "video": "a.mp4", "conversations": said[1] + said[2]},
        {"id": "asked", "image": "3.jpg", "speech": "a.flac", "conversations": said[3]},
    ]
    rows[2]["transcript"] = TEXTS[3]
    write(root / "train.json", rows)


def instructions_by_line(root: Path) -> None:
    """The same, one conversation a line."""
    instructions(root)
    rows = json.loads((root / "train.json").read_text("utf-8"))
    write(root / "train.jsonl", "\n".join(map(json.dumps, rows)))
    (root / "train.json").unlink()


def hugging_face(root: Path) -> None:
    """A folder of Parquet files, which the stand-in of `datasets` neither writes nor reads."""
    import datasets

    if not hasattr(datasets, "Dataset"):
        return
    media = [{"bytes": picture(), "path": None} for _ in NUMBERS]
    kinds = {"image": datasets.Image(), "caption": datasets.Value("string")}
    rows = {"image": media, "caption": list(TEXTS)}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    made.to_parquet(root / "train-00000-of-00001.parquet")


def hugging_face_rows() -> Rows:
    """What the stand-in of `datasets` gives in their place."""
    rows = [{"image": {"bytes": picture(), "path": None}, "caption": text} for text in TEXTS]
    return Rows(rows, {"image": Picture(), "caption": None})


def llava_test(root: Path) -> None:
    asked = [{"question_id": n, "image": f"{n}.jpg", "text": "什么？"} for n in NUMBERS]
    said = [{"question_id": n, "text": text} for n, text in zip(NUMBERS, TEXTS)]
    write(root / "qa90_questions.jsonl", "\n".join(map(json.dumps, asked)))
    write(root / "qa90_gpt4_answer.jsonl", "\n".join(map(json.dumps, said)))
    pictures(root / "images")


def vqav2(root: Path) -> None:
    asked = [{"question_id": 10 * n, "image_id": n, "question": "什么？"} for n in NUMBERS]
    said = [
        {
            "question_id": 10 * n,
            "answers": [{"answer": text}] * 10,
            "multiple_choice_answer": text,
            "answer_type": "other",
        }
        for n, text in zip(NUMBERS, TEXTS)
    ][::-1]
    write(root / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": asked})
    write(root / "v2_mscoco_train2014_annotations.json", {"annotations": said})
    pictures(root / "train2014", *(f"COCO_train2014_{n:012d}.jpg" for n in NUMBERS))


def minigpt4(root: Path) -> None:
    captions = [{"image_id": str(n), "caption": text} for n, text in zip(NUMBERS, TEXTS)]
    write(root / "filter_cap.json", {"annotations": captions})
    pictures(root / "image")


def msrvtt(root: Path) -> None:
    videos = [{"video_id": f"video{n}", "split": "train"} for n in (1, 2)]
    said = [{"video_id": f"video{n % 2 + 1}", "caption": t} for n, t in enumerate(TEXTS)]
    write(root / "train_val_videodatainfo.json", {"videos": videos, "sentences": said})
    for number in (1, 2):
        film(root / f"TrainValVideo/video{number}.mp4")


def reference(root: Path) -> None:
    """The forms of the reference repository, one after the other, each with a file of its own."""
    pictures(root / "images")
    captions = [
        {"image": f"/x/{n}.jpg", "caption": t, "image_id": str(n), "dataset": "cc3m_zh"}
        for n, t in zip(NUMBERS, TEXTS)
    ]
    write(root / "captions.json", captions)
    heard = [
        {"speech_feats_path": f"/x/{n}.npy", "target_text": t, "utterance_id": f"U{n}"}
        for n, t in zip(NUMBERS, TEXTS)
    ]
    write(root / "asr.json", heard)
    seen = [
        {
            "speech_feats_path": f"/x/{n}.npy",
            "image_path": f"/x/{n}.jpg",
            "question_text": "几个？",
            "answer_text": text,
            "history_text": "问题：有吗？回复：有",
        }
        for n, text in zip(NUMBERS, TEXTS)
    ]
    write(root / "vsd.json", seen)
    pairs = [{key: row[key] for key in ("speech_feats_path", "target_text")} for row in heard]
    write(root / "masr.json", [{**row, "image": f"/x/{n}.jpg"} for n, row in zip(NUMBERS, pairs)])
    asked = [{"image_id": str(n), "caption_zh": text} for n, text in zip(NUMBERS, TEXTS)]
    write(root / "instructions.json", asked)
    write(root / "clips.json", asked[:2])
    film(root / "videos/1.mp4")
    film(root / "videos/2.mp4")
    packed = base64.urlsafe_b64encode(picture()).decode()
    write(
        root / "packed.json", [{**row, "image": packed, "dataset": "MUGE_zh"} for row in captions]
    )
    for number in NUMBERS:
        sound(root / f"audio/{number}.wav")
        features = root / f"features/{number}.npy"
        features.parent.mkdir(exist_ok=True)
        np.save(features, np.random.default_rng(number).normal(size=(4, 512)).astype("f4"))


def sbu(root: Path) -> None:
    links = "\n".join(f"http://x/{number}.jpg" for number in NUMBERS)
    write(root / "SBU_captioned_photo_dataset_urls.txt", links)
    write(root / "SBU_captioned_photo_dataset_captions.txt", "\n".join(TEXTS))
    pictures(root / "images")


def table(root: Path) -> None:
    pictures(root)
    with (root / "train.csv").open("w", newline="") as file:
        rows = zip((f"{number}.jpg" for number in NUMBERS), TEXTS)
        csv.writer(file).writerows([("filepath", "title"), *rows])


def visdial(root: Path) -> None:
    rounds = [{"question": n, "answer": n, "speech": f"audio/{n}.flac"} for n in range(2)]
    talks = [{"image_id": number, "caption": "", "dialog": rounds} for number in NUMBERS]
    data = {"questions": ["红色吗？", "几个？"], "answers": list(TEXTS[:2]), "dialogs": talks}
    write(root / "visdial_1.0_train.json", {"data": data})
    pictures(root / "images", *(f"COCO_train2014_{number:012d}.jpg" for number in NUMBERS))
    for number in range(2):
        sound(root / f"audio/{number}.flac")


def visual_genome(root: Path) -> None:
    regions = [
        {"id": n, "regions": [{"image_id": n, "region_id": n, "phrase": text}]}
        for n, text in zip(NUMBERS, TEXTS)
    ]
    asked = [
        {"id": n, "qas": [{"image_id": n, "qa_id": n, "question": "什么？", "answer": text}]}
        for n, text in zip(NUMBERS, TEXTS)
    ]
    write(root / "region_descriptions.json", regions)
    write(root / "question_answers.json", asked)
    pictures(root / "VG_100K")


def webdataset(root: Path) -> None:
    with tarfile.open(root / "00000.tar", "w") as archive:
        for number, text in zip(NUMBERS, TEXTS):
            for name, content in ((f"{number}.jpg", picture()), (f"{number}.txt", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def wukong(root: Path) -> None:
    lines = "".join(f"http://x/{n},{text}\n" for n, text in zip(NUMBERS, TEXTS))
    write(root / "wukong_100m_0.csv", "url,caption\n" + lines)
    pictures(root / "images/wukong_100m_0", *(f"{number}.jpg" for number in range(COUNT)))


def selection(root: Path) -> None:
    table(root)
    one = {"reader": "table", "path": ".", "split": "train", "options": {}}
    write(root / "selection.json", {"sources": {"a": one}, "instructions": ["请描述图。"]})
    np.save(root / "train.npy", np.asarray([[0, 3, 0], [0, 1, -1]], np.int64))


def nextgpt(root: Path) -> None:
    turns = [
        {"from": "human", "value": "画图", "input_modality": "text"},
        {"from": "gpt", "value": "好的", "caption": "圆", "output_modality": "image"},
    ]
    second = {"image_captions": "方块", "conversations": [
        {"from": "human", "value": "画"}, {"from": "gpt", "value": "好 <image>"}]}  # fmt: skip
    records = [{"mm_name": "a", "conversation": turns * 2}, second, {"conversation": turns}]
    write(root / "train.json", records)
