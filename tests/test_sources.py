"""Every reader gives back what the world's generator knows, and names the place of each mistake."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import soundfile

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import speech
from xllm_jax.data.sources import (
    aishell,
    captions_folder,
    coco,
    instructions,
    msrvtt,
    visdial,
    visual_genome,
)
from xllm_jax.data.synthetic_world import annotations, build, language, plan

SIZES = plan.WorldSizes(12, 6, 8, 9, 10, 4, 2, 2, 2, 10, 16, 8, 8, 9, 10)
SPLITS = plan.SPLITS


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build.build(tmp_path_factory.mktemp("worlds") / "world", SIZES, workers=0)


@pytest.fixture(scope="module")
def truth():
    return {split: plan.plan_split(0, split, SIZES) for split in SPLITS}


def check(examples):
    assert len({example.key for example in examples}) == len(examples)
    for example in examples:
        assert all(pathlib.Path(path).is_file() for _, path in example.media), example
    return examples


@pytest.mark.parametrize("split", SPLITS)
def test_coco(root, truth, split):
    found = check(coco.examples(f"{root}/coco", split))
    pictures = truth[split].pictures
    wanted = [
        (picture.file_name, caption, picture.captions, picture.caption_tags)
        for picture in pictures
        for caption in (picture.captions if split == "train" else picture.captions[:1])
    ]
    assert wanted == [
        (pathlib.Path(e.media[0][1]).name, e.answer, e.references, e.tags) for e in found
    ]
    assert {(e.task, e.instruction, e.media[0][0]) for e in found} == {("caption", "", "image")}
    assert len(coco.examples(f"{root}/coco", split, per_caption=False)) == len(pictures)


@pytest.mark.parametrize("split", SPLITS)
def test_visual_genome(root, truth, split):
    pictures = [p for p in truth[split].pictures if p.file_name.endswith("jpg")]
    found = check(visual_genome.examples(f"{root}/visual_genome", split))
    wanted = [(p.image_id, phrase, p.regions) for p in pictures for phrase in p.regions]
    assert wanted == [
        (int(pathlib.Path(e.media[0][1]).stem), e.answer, e.references) for e in found
    ]
    assert {e.task for e in found} == {"region"}
    found = check(visual_genome.examples(f"{root}/visual_genome", split, kind="questions"))
    wanted = [
        (p.image_id, q.text, q.answer, q.kind, q.unseen) for p in pictures for q in p.questions
    ]
    assert wanted == [
        (
            int(pathlib.Path(e.media[0][1]).stem),
            e.instruction,
            e.answer,
            e.tags[0],
            "unseen_wording" in e.tags,
        )
        for e in found
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_aishell(root, truth, split):
    found = check(aishell.examples(f"{root}/aishell", split))
    wanted = sorted((u.name, u.text, u.text, u.tags) for u in truth[split].utterances)
    assert wanted == [(e.key, e.answer, e.transcript, e.tags) for e in found]


def test_aishell_2(tmp_path):
    (tmp_path / "wav.scp").write_text("IC1\twav/C1/IC1.wav\nIC2\twav/C1/IC2.wav\n", "utf-8")
    (tmp_path / "trans.txt").write_text("IC1\t厨房用品\nIC3\t没有声音\n", "utf-8")
    (found,) = aishell.examples(str(tmp_path))
    assert (found.key, found.answer) == ("IC1", "厨房用品")
    assert found.media == (("speech", str(tmp_path / "wav/C1/IC1.wav")),)
    (tmp_path / "wav/C1").mkdir(parents=True)
    soundfile.write(tmp_path / "wav/C1/IC1.wav", np.sin(np.arange(8000) / 9), 16000)
    assert speech.load(found.media[0][1]).shape == (48, 80)
    shutil.copytree(tmp_path, tmp_path / "dev", ignore=shutil.ignore_patterns("dev"))
    (heard,) = aishell.examples(str(tmp_path), "val")
    assert heard.media == (("speech", str(tmp_path / "dev/wav/C1/IC1.wav")),)


@pytest.mark.parametrize("split", SPLITS)
def test_visdial(root, truth, split):
    talks = truth[split].dialogues
    found = check(visdial.examples(f"{root}/visdial", split))
    wanted = []
    for talk in talks:
        said = [(q.text, q.answer) for q in talk.rounds]
        wanted += [(talk.picture.file_name, *said[i], tuple(said[:i])) for i in range(len(said))]
    assert wanted == [
        (pathlib.Path(e.media[0][1]).name, e.instruction, e.answer, e.history) for e in found
    ]
    spoken = [(q, v) for talk in talks for q, v in zip(talk.rounds, talk.voices) if v]
    found = check(visdial.examples(f"{root}/visdial", split, kind="spoken"))
    assert [(language.spoken(q.text), q.answer, v.unseen) for q, v in spoken] == [
        (e.transcript, e.answer, "unseen_voice" in e.tags) for e in found
    ]
    assert all(tuple(name for name, _ in e.media) == ("image", "speech") for e in found)
    beside = check(visdial.examples(f"{root}/visdial", split, kind="asr_image"))
    assert [one.media for one in beside] == [one.media for one in found]
    found = check(visdial.examples(f"{root}/visdial", split, kind="asr"))
    told = [(one.key, one.answer, one.task, one.transcript) for one in beside]
    assert told == [(one.key, one.answer, one.task, one.transcript) for one in found]
    assert [language.spoken(q.text) for q, _ in spoken] == [e.answer for e in found]
    assert {e.task for e in found} == {"asr"}


def test_visdial_finds_published_image_names(root, tmp_path):
    data = json.loads((root / "visdial/visdial_1.0_val.json").read_text("utf-8"))
    (tmp_path / "visdial_1.0_val.json").write_text(json.dumps(data), "utf-8")
    (tmp_path / "VisualDialog_val2018").mkdir()
    for talk in data["data"]["dialogs"]:
        name = f"VisualDialog_val2018_{talk['image_id']:012d}.jpg"
        (tmp_path / "VisualDialog_val2018" / name).write_bytes(b"x")
    assert check(visdial.examples(str(tmp_path), "val"))


@pytest.mark.parametrize("split", SPLITS)
def test_msrvtt(root, truth, split):
    found = check(msrvtt.examples(f"{root}/msrvtt", split))
    wanted = [
        (f"video{video.number}", caption, video.captions, video.tags)
        for video in truth[split].videos
        for caption in (video.captions if split == "train" else video.captions[:1])
    ]
    assert wanted == [
        (pathlib.Path(e.media[0][1]).stem, e.answer, e.references, e.tags) for e in found
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_instructions(root, truth, split):
    found = check(instructions.examples(f"{root}/instructions", split))
    scenes = {p.file_name: p.scene for p in truth[split].pictures}
    texts = {u.name: u.text for u in truth[split].utterances}
    for talk in truth[split].dialogues:
        for number, asked in enumerate(talk.rounds):
            name = pathlib.Path(annotations.speech_name(talk, number)).stem
            texts[name] = language.spoken(asked.text)
    clips = {f"video{v.number}": v.clip for v in truth[split].videos}
    for example in found:
        media = {name: pathlib.Path(path) for name, path in example.media}
        assert example.instruction and not set("<>") & set(example.instruction)
        if example.task == "caption":
            scene = scenes[media["image"].name]
            assert language.parse_objects(example.answer) == set(scene.objects)
        elif example.task == "asr":
            assert example.answer == example.transcript == texts[media["speech"].stem]
        elif example.task == "video_caption":
            clip = clips[media["video"].stem]
            assert language.parse_motion(example.answer)[3] == clip.motion
        elif example.task == "spoken_vqa":
            assert list(media) == ["image", "speech"] and example.transcript
        elif example.task == "dialogue":
            assert len(example.history) == int(example.key.rsplit("-", 1)[1])
    tasks = {"caption", "asr", "video_caption", "spoken_vqa", "dialogue", "vqa"}
    assert {example.task for example in found} == tasks


@pytest.mark.parametrize("modality", ("image", "video", "speech"))
def test_instructions_about_one_modality(root, modality):
    everything = instructions.examples(f"{root}/instructions", "train")
    wanted = [e for e in everything if {kind for kind, _ in e.media} == {modality}]
    assert wanted and len(wanted) < len(everything)
    assert list(instructions.examples(f"{root}/instructions", "train", modality=modality)) == wanted


def test_instructions_of_other_publishers(tmp_path):
    record = {
        "id": "a",
        "image": ["1.jpg", "2.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\n和<image>\n哪个大？"},
            {"from": "gpt", "value": "第一个"},
            {"from": "human", "value": "什么颜色？"},
            {"from": "gpt", "value": "红色"},
        ],
    }
    (tmp_path / "train.json").write_text(json.dumps([record]), "utf-8")
    first, second = instructions.examples(str(tmp_path))
    assert first.media == (("image", f"{tmp_path}/1.jpg"), ("image", f"{tmp_path}/2.jpg"))
    assert (second.instruction, second.answer, second.task) == ("什么颜色？", "红色", "dialogue")
    assert second.history == ((first.instruction, "第一个"),)
    lines = [json.dumps(record), "", json.dumps({**record, "id": "b"}, ensure_ascii=False)]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines), "utf-8")
    assert [e.key for e in instructions.examples(f"{tmp_path}/talks.jsonl")] == [
        "a-0",
        "a-1",
        "b-0",
        "b-1",
    ]
    (tmp_path / "val.jsonl").write_text(lines[0] + '\n{"id": ', "utf-8")
    found = instructions.examples(str(tmp_path), "val")
    assert [found[place].key for place in range(2)] == ["a-0", "a-1"] and len(found) == 3
    with pytest.raises(UserError, match=r"val\.jsonl: \[1\]: the file ends inside record 1"):
        found[2]
    (tmp_path / "filter_cap.json").write_text(
        json.dumps({"annotations": [{"image_id": "7", "caption": "一只猫"}]}), "utf-8"
    )
    (cat,) = instructions.examples(str(tmp_path))
    assert (cat.answer, cat.media) == ("一只猫", (("image", f"{tmp_path}/image/7.jpg"),))


FOLDERS = {
    "captions.jsonl": "\n".join(
        json.dumps({"image": image, "caption": caption})
        for image, caption in (("a.jpg", "红"), ("a.jpg", "大"), ("b/c.png", "绿"))
    ),
    "captions.json": json.dumps({"a.jpg": ["红", "大"], "b/c.png": "绿"}),
    "captions.csv": 'image,caption\na.jpg,红\na.jpg,"大"\nb/c.png,绿\n',
    "captions.tsv": "caption\timage\n红\ta.jpg\n大\ta.jpg\n绿\tb/c.png\n",
    "": "",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_captions_folder(name, tmp_path):
    (tmp_path / "b").mkdir()
    for file in ("a.jpg", "b/c.png", "lonely.jpg"):
        (tmp_path / file).write_bytes(b"x")
    if name:
        (tmp_path / name).write_text(FOLDERS[name], "utf-8")
    else:
        (tmp_path / "a.txt").write_text("红\n大\n", "utf-8")
        (tmp_path / "b/c.txt").write_text("绿", "utf-8")
    found = check(captions_folder.examples(str(tmp_path)))
    pictures = [(pathlib.Path(e.media[0][1]).relative_to(tmp_path).as_posix()) for e in found]
    assert pictures == ["a.jpg", "a.jpg", "b/c.png"]
    assert [(e.answer, e.references) for e in found] == [
        ("红", ("红", "大")),
        ("大", ("红", "大")),
        ("绿", ("绿",)),
    ]
    assert len(captions_folder.examples(str(tmp_path), per_caption=False)) == 2


# Mistakes: (reader, options, file, how it is broken, what the message must say)


def without(*path):
    def change(file):
        data = json.loads(file.read_text("utf-8"))
        spot = data
        for step in path[:-1]:
            spot = spot[step]
        del spot[path[-1]]
        file.write_text(json.dumps(data), "utf-8")

    return change


def with_value(value, *path):
    def change(file):
        data = json.loads(file.read_text("utf-8"))
        spot = data
        for step in path[:-1]:
            spot = spot[step]
        spot[path[-1]] = value
        file.write_text(json.dumps(data), "utf-8")

    return change


def cut(file):
    file.write_text(file.read_text("utf-8")[:-40], "utf-8")


def gone(file):
    file.unlink()


def folder_gone(file):
    shutil.rmtree(file)


CAPTIONS, VISDIAL = "coco/annotations/captions_train.json", "visdial/visdial_1.0_train.json"
REGIONS = "visual_genome/train/region_descriptions.json"
QUESTIONS = "visual_genome/train/question_answers.json"
VIDEOS, TALKS = "msrvtt/train_val_videodatainfo.json", "instructions/train.json"
WORDS = "aishell/transcript/aishell_transcript_v0.8.txt"
MISTAKES = [
    (coco, {}, CAPTIONS, gone, r"captions_train\.json: no such file"),
    (coco, {}, CAPTIONS, cut, r"captions_train\.json: .*the file ends inside record"),
    (
        coco,
        {},
        CAPTIONS,
        without("annotations", 3, "caption"),
        r"annotations\[3\]\.caption: missing",
    ),
    (coco, {}, CAPTIONS, without("images", 0), r"annotations\[0\]: image 1 is not in the list"),
    (
        coco,
        {},
        CAPTIONS,
        with_value(5, "annotations", 2, "caption"),
        r"\[2\]\.caption: is a number",
    ),
    (coco, {}, "coco/train", folder_gone, r"coco/train: no such folder"),
    (visual_genome, {}, REGIONS, without(1, "regions"), r"json: \[1\]\.regions: missing key"),
    (
        visual_genome,
        {"kind": "questions"},
        QUESTIONS,
        without(2, "qas", 1, "answer"),
        r"\[2\]\.qas\[1\]",
    ),
    (visual_genome, {"kind": "x"}, QUESTIONS, cut, r"kind: unknown kind 'x'.*questions"),
    (visdial, {}, VISDIAL, without("data", "answers"), r"data\.answers: is missing"),
    (
        visdial,
        {},
        VISDIAL,
        with_value(999, "data", "dialogs", 1, "dialog", 0, "question"),
        r"\[1\].*999",
    ),
    (visdial, {}, "coco/train/000000000002.jpg", gone, r"dialogs\[1\]: no image file of number 2"),
    (msrvtt, {}, VIDEOS, without("sentences", 0, "caption"), r"sentences\[0\]\.caption: missing"),
    (msrvtt, {}, VIDEOS, with_value([], "videos"), r"sentences\[0\]: video0 is not in the list"),
    (instructions, {}, TALKS, without(1, "conversations", 1), r"\[1\]\.conversations: \d+ turns"),
    (instructions, {}, TALKS, without(0, "image"), r"\[0\]: slots .* do not match"),
    (
        instructions,
        {},
        TALKS,
        with_value("gpt", 0, "conversations", 0, "from"),
        r"is 'gpt', not 'human'",
    ),
    (aishell, {}, WORDS, gone, r"aishell_transcript_v0\.8\.txt: no such file"),
    (
        aishell,
        {},
        WORDS,
        lambda file: file.write_text("A B\nC\n"),
        r"line 2 has a name and nothing",
    ),
    (aishell, {}, WORDS, lambda file: file.write_text("A B\n"), r"no utterances with a transcript"),
    (aishell, {}, WORDS, lambda file: file.write_bytes(b"A \xff\n"), r"is not UTF-8"),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_are_named(root, tmp_path, number):
    reader, options, file, breaks, message = MISTAKES[number]
    name = reader.__name__.rsplit(".", 1)[1]
    for folder in {name, "coco"}:
        shutil.copytree(root / folder, tmp_path / folder)
    breaks(tmp_path / file)
    with pytest.raises(UserError, match=message):
        list(reader.examples(str(tmp_path / name), **options))


FOLDER_MISTAKES = [
    ("captions.json", '["a.jpg"]', r"\[0\]: is a text, not an object"),
    ("captions.json", '{"a.jpg": 3}', r"a\.jpg: has no caption"),
    (
        "captions.jsonl",
        '{"image": "a.jpg", "caption": "b"}\n{"image',
        r"the file ends inside record 1",
    ),
    ("captions.csv", "picture,caption\na,b\n", r"no column 'image'.*picture"),
    ("captions.tsv", "image\tcaption\na.jpg\n", r"row 2: has 1 fields for 2 columns"),
    ("other.json", "{}", r"has no captioned images"),
]


@pytest.mark.parametrize(("name", "text", "message"), FOLDER_MISTAKES)
def test_folder_mistakes_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(UserError, match=message):
        list(captions_folder.examples(str(tmp_path)))


def test_splits_that_a_set_does_not_have(tmp_path):
    for reader in (visual_genome, captions_folder):
        with pytest.raises(UserError, match="no such folder"):
            reader.examples(str(tmp_path), "test")
