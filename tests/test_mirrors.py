"""Mirrors of published sets are read under the names that they have there."""

import json
import shutil

import pytest
import reader_fixtures as fixtures

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture


def said(reader, root, split="train", **options):
    found = mixture.read("a", Source(reader, str(root), split, options), "")
    return sorted((one.answer, *(path.rsplit("/", 1)[1] for _, path in one.media)) for one in found)


def renamed(root, old, new):
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root / old, root / new)


# {case: (reader, maker, {file: its name in the mirror})}
MSRVTT = "train_val_videodatainfo.json"
COCO = "annotations/captions_train2017.json"
MOVED = {
    "CLIP4Clip": (
        "msrvtt", "msrvtt", {MSRVTT: "MSRVTT_data.json", "TrainValVideo": "MSRVTT_Videos"}
    ),
    "CLIP4Clip, deeper": ("msrvtt", "msrvtt", {MSRVTT: "msrvtt_data/MSRVTT_data.json"}),
    "COCO beside": ("coco", "coco", {COCO: "captions_train2017.json"}),
    "COCO deeper": ("coco", "coco", {COCO: f"annotations_trainval2017/{COCO}"}),
    "ActivityNet of a hub": (
        "activitynet", "activitynet", {"train.json": "activitynet_captions_train.json"}
    ),
    "ActivityNet, deeper": ("activitynet", "activitynet", {"train.json": "captions/train.json"}),
    "AISHELL-1 above": (
        "aishell", "aishell",
        {"transcript": "data_aishell/transcript", "wav": "data_aishell/wav"},
    ),
    "AISHELL-2 above": (
        "aishell", "aishell_2",
        {name: f"iOS/data/{name}" for name in ("trans.txt", "wav.scp", "wav")},
    ),
    "CC3M of img2dataset": ("cc3m", "cc3m", {"Train_GCC-training.tsv": "cc3m.tsv"}),
    "Flickr30k deeper": (
        "flickr30k", "flickr30k", {"results_20130124.token": "flickr30k/results_20130124.token"}
    ),
    "SBU deeper": (
        "sbu", "sbu",
        {f"SBU_captioned_photo_dataset_{n}.txt": f"dataset/SBU_captioned_photo_dataset_{n}.txt"
         for n in ("urls", "captions")},
    ),
    "Visual Genome's versions": (
        "visual_genome", "visual_genome",
        {"region_descriptions.json": "region_descriptions_v1.2.json", "VG_100K": "images2"},
    ),
    "VisDial 0.9": (
        "visdial", "visdial", {"visdial_1.0_train.json": "visdial/visdial_0.9_train.json"}
    ),
    "LLaVA's own": ("instructions", "instructions", {"train.json": "llava_v1_5_mix665k.json"}),
    "MiniGPT-4 above": (
        "instructions", "minigpt4",
        {name: f"cc_sbu_align/{name}" for name in ("filter_cap.json", "image")},
    ),
    "Wukong deeper": ("wukong", "wukong", {"wukong_100m_0.csv": "wukong/wukong_100m_0.csv"}),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVED)
def test_other_names(case, tmp_path):
    reader, maker, names = MOVED[case]
    getattr(fixtures, maker)(tmp_path)
    wanted = said(reader, tmp_path)
    for old, new in names.items():
        renamed(tmp_path, old, new)
    assert said(reader, tmp_path) == wanted and wanted


def test_a_first_line_that_names_the_columns(tmp_path):
    fixtures.cc3m(tmp_path)
    wanted = said("cc3m", tmp_path)
    file = tmp_path / "Train_GCC-training.tsv"
    (tmp_path / "cc3m.tsv").write_text("caption\turl\n" + file.read_text("utf-8"), "utf-8")
    file.unlink()
    assert said("cc3m", tmp_path) == wanted
    (tmp_path / "zh.txt").write_text("\n".join(fixtures.TEXTS[::-1]), "utf-8")
    turned = said("cc3m", tmp_path, captions=str(tmp_path / "zh.txt"))
    assert [answer for answer, _ in turned] == [answer for answer, _ in wanted]


@pytest.mark.parametrize("other", ["url,caption\nhttp://x,红\n", "\n", "url,text\na,b\n"])
def test_a_part_of_wukong_without_images(other, tmp_path, caplog):
    fixtures.wukong(tmp_path)
    wanted = said("wukong", tmp_path)
    (tmp_path / "wukong_100m_1.csv").write_text(other, "utf-8")
    assert said("wukong", tmp_path) == wanted
    assert "wukong_100m_1.csv: left out" in caplog.text
    for file in (tmp_path / "images/wukong_100m_0").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="has no images of the 5 rows"):
        said("wukong", tmp_path)


def test_flickr30k_of_the_hub(tmp_path):
    fixtures.pictures(tmp_path / "flickr30k-images", "1.jpg", "2.jpg")
    rows = ['raw,sentids,split,filename,img_id', '"[""a, b"", ""c""]","[0, 1]",train,1.jpg,0',
            '"[""d"", ""e""]","[2, 3]",test,2.jpg,1', '[,[],train,1.jpg,2']  # fmt: skip
    (tmp_path / "flickr_annotations_30k.csv").write_text("\n".join(rows))
    train = mixture.read("a", Source("flickr30k", str(tmp_path)), "")
    assert [train[n].answer for n in range(2)] == ["a, b", "c"]
    assert train[0].references == ("a, b", "c") and len(train) == 3
    assert train[0].media == (("image", f"{tmp_path}/flickr30k-images/1.jpg"),)
    with pytest.raises(UserError, match=r"row 4\.raw: broken JSON"):
        train[2]
    test = mixture.read("a", Source("flickr30k", str(tmp_path), "test"), "")
    assert (test[0].answer, test[0].references) == ("d", ("d", "e"))
    assert len(test) == 2  # a broken row is reported in every split


def test_labels_of_cc3m_do_not_stand_for_its_list(tmp_path):
    fixtures.cc3m(tmp_path)
    wanted = said("cc3m", tmp_path)
    labels = tmp_path / "Image_Labels_Subset_Train_GCC-Labels-training.tsv"
    labels.write_text("another\thttp://x\ta,b\t/m/1\t0.9\n")
    assert said("cc3m", tmp_path) == wanted


def test_videos_without_their_prefix(tmp_path):
    fixtures.activitynet(tmp_path)
    wanted = [answer for answer, _ in said("activitynet", tmp_path)]
    renamed(tmp_path, "videos/v_a.mp4", "videos/a.mp4")
    assert [answer for answer, _ in said("activitynet", tmp_path)] == wanted


SPLITS = {"train": "video12", "val": "video6600", "test": "video9999"}


@pytest.mark.parametrize("form", ["videodatainfo", "MSR_VTT.json"])
def test_the_number_of_a_video_says_its_split(form, tmp_path):
    names = ("images", "id", "annotations", "image_id")
    if form == "videodatainfo":
        names, form = ("videos", "video_id", "sentences", "video_id"), "MSRVTT_data.json"
    videos, own, sentences, key = names
    data = {videos: [{own: name} for name in SPLITS.values()]}
    data[sentences] = [{key: name, "caption": split} for split, name in SPLITS.items()]
    fixtures.write(tmp_path / "annotation" / form, data)
    for split, name in SPLITS.items():
        assert said("msrvtt", tmp_path, split) == [(split, f"{name}.mp4")]


LISTS = {"train": "msrvtt_train_9k.json", "val": "cap_val.json", "test": "msrvtt_test_1k.json"}


@pytest.mark.parametrize("split", LISTS)
def test_lists_of_videos(split, tmp_path):
    rows = [{"video": "video1.mp4", "caption": ["a", "b"]}, {"video": "video2.mp4", "caption": "c"}]
    fixtures.write(tmp_path / LISTS[split], rows)
    fixtures.film(tmp_path / "videos/all/video2.mp4")
    wanted = [("a", "video1.mp4"), ("b", "video1.mp4"), ("c", "video2.mp4")]
    assert said("msrvtt", tmp_path, split, per_caption=True) == wanted
    (found,) = [
        one for one in mixture.read("a", Source("msrvtt", str(tmp_path), split), "")
        if one.answer == "c"
    ]  # fmt: skip
    assert found.media == (("video", str(tmp_path / "videos/all/video2.mp4")),)
    assert found.task == "video_caption"


def karpathy(root, name):
    images = [
        {"filename": "1.jpg", "filepath": "val2014", "split": "restval", "sentences": ["a", "b"]},
        {"filename": "2.jpg", "filepath": "train2014", "split": "train", "sentences": ["c"]},
        {"filename": "3.jpg", "filepath": "val2014", "split": "test", "sentences": ["d"]},
    ]
    for image in images:
        image["sentences"] = [{"raw": f" {text} ."} for text in image["sentences"]]
        if "flickr" in name:
            image.pop("filepath")
    fixtures.write(root / name, {"images": images, "dataset": "x"})


@pytest.mark.parametrize("reader", ["coco", "flickr30k"])
def test_karpathy(reader, tmp_path):
    karpathy(tmp_path, f"dataset_{reader}.json")
    for name in ("flickr30k-images/1.jpg", "val2014/1.jpg", "train2014/2.jpg", "val2014/3.jpg"):
        fixtures.picture(tmp_path / name)
    train = mixture.read("a", Source(reader, str(tmp_path)), "")
    assert [one.answer for one in train] == ["a .", "b .", "c ."]
    assert train[0].references == ("a .", "b .")
    folder = "val2014" if reader == "coco" else "flickr30k-images"
    assert train[0].media == (("image", f"{tmp_path}/{folder}/1.jpg"),)
    assert said(reader, tmp_path, "test") == [("d .", "3.jpg")]
    with pytest.raises(UserError, match="has no captions"):
        said(reader, tmp_path, "val")


@pytest.mark.parametrize(
    ("reader", "name"),
    [("coco", "coco_karpathy_train.json"), ("flickr30k", "flickr30k_train.json")],
)
def test_lists_of_images(reader, name, tmp_path):
    rows = [
        {"image": "flickr30k-images/1.jpg", "caption": "a", "image_id": "x_1"},
        {"image": "flickr30k-images/1.jpg", "caption": "b", "image_id": "x_1"},
        {"image": "flickr30k-images/2.jpg", "caption": " ", "image_id": "x_2"},
    ]
    fixtures.pictures(tmp_path / "flickr30k-images", "1.jpg", "2.jpg")
    fixtures.write(tmp_path / name, rows)
    found = mixture.read("a", Source(reader, str(tmp_path)), "")
    assert [found[place].answer for place in range(2)] == ["a", "b"] and len(found) == 3
    assert found[0].media == (("image", f"{tmp_path}/flickr30k-images/1.jpg"),)
    with pytest.raises(UserError, match=r"\[2\]: has an empty caption"):
        found[2]


READERS = (
    *("activitynet", "ai_challenger", "aishell", "cc3m", "coco", "flickr30k", "instructions"),
    *("llava_test", "msrvtt", "sbu", "table", "visdial", "visual_genome", "vsdial_cn", "wukong"),
    "vqav2",
)


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_names_what_it_found(reader, tmp_path):
    (tmp_path / "some_mirror.json").write_text(json.dumps([1]))
    (tmp_path / "VG_100K").mkdir()
    for split in ("train", "test"):
        with pytest.raises(UserError) as told:
            said(reader, tmp_path, split)
        if "has no split" not in str(told.value) and "no such folder" not in str(told.value):
            assert "some_mirror.json" in str(told.value)
