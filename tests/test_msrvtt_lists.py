"""CLIP4Clip's lists say which videos of MSR-VTT are of a split."""

import reader_fixtures as fixtures

from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.record import Record

# As the publisher's file has them: the number tells the split.
PUBLISHED = {"train": (1, 2, 3), "validate": (6513,), "test": (7010, 7011, 9000)}


def whole(root, folder="."):
    data = {"videos": [], "sentences": []}
    for split, numbers in PUBLISHED.items():
        for number in numbers:
            data["videos"].append({"video_id": f"video{number}", "split": split, "id": number})
            for text in ("a", "b"):
                row = {"video_id": f"video{number}", "caption": f"{text}{number}", "sen_id": 1}
                data["sentences"].append(row)
    fixtures.write(root / folder / "MSRVTT_data.json", data)


def table(root, name, *rows):
    fixtures.write(root / name, "\n".join(rows) + "\n")


def said(root, split, **options):
    """([(answer, video)] of a split, reasons of what cannot be read)."""
    source = Source("msrvtt", str(root), split, options)
    every = list(mixture.in_order({"a": mixture.read("a", source, "")}, {"a": None}))
    read = [one.example for one in every if isinstance(one, Record)]
    names = [(one.answer, one.media[0][1].rsplit("/", 1)[1]) for one in read]
    return sorted(names), [one.reason for one in every if not isinstance(one, Record)]


def of(*numbers):
    return sorted((f"{text}{n}", f"video{n}.mp4") for n in numbers for text in "ab")


TEST = (
    "key,vid_key,video_id,sentence",
    'ret0,msr9000,video9000,"a man, who sings"',
    "ret1,msr7011,video7011,a dog runs",
)


def test_the_lists_of_clip4clip(tmp_path):
    whole(tmp_path)
    table(
        tmp_path, "MSRVTT_train.9k.csv", "video_id", *(f"video{n}" for n in (1, 2, 3, 6513, 7010))
    )
    table(tmp_path, "MSRVTT_train.7k.csv", "video_id", "video1")
    table(tmp_path, "MSRVTT_JSFUSION_test.csv", *TEST)
    assert said(tmp_path, "train") == (of(1, 2, 3, 6513, 7010), [])
    wanted = [("a dog runs", "video7011.mp4"), ("a man, who sings", "video9000.mp4")]
    assert said(tmp_path, "test") == (wanted, [])
    train = {video for _, video in said(tmp_path, "train")[0]}
    assert not train & {video for _, video in wanted}


def test_the_smaller_list_and_a_split_without_one(tmp_path):
    """What is left of 'val' are the publisher's videos that no other list names."""
    whole(tmp_path, "msrvtt_data")
    table(tmp_path, "msrvtt_data/MSRVTT_train.7k.csv", "video_id", "video1", "video7010")
    table(tmp_path, "msrvtt_data/MSRVTT_JSFUSION_test.csv", *TEST)
    assert said(tmp_path, "train") == (of(1, 7010), [])
    assert said(tmp_path, "val", per_caption=True) == (of(6513), [])


def test_videos_of_a_test_list_are_no_training_videos(tmp_path):
    whole(tmp_path)
    table(tmp_path, "MSRVTT_JSFUSION_test.csv", *TEST, "ret2,msr2,video2.mp4,a cat")
    assert said(tmp_path, "train") == (of(1, 3), [])


def test_a_test_list_needs_no_other_file(tmp_path):
    table(tmp_path, "MSRVTT_JSFUSION_test.csv", *TEST)
    fixtures.film(tmp_path / "MSRVTT_Videos/video9000.mp4")
    source = Source("msrvtt", str(tmp_path), "test")
    (first, second) = mixture.read("a", source, "")
    assert first.media == (("video", str(tmp_path / "MSRVTT_Videos/video9000.mp4")),)
    assert first.references == ("a man, who sings",) and first.task == "video_caption"
    assert second.key == "video7011"


def test_broken_rows_of_a_list_cost_themselves(tmp_path):
    whole(tmp_path)
    table(tmp_path, "MSRVTT_train.9k.csv", "video_id", "video1", "video2,3", " ,", "video3")
    table(tmp_path, "MSRVTT_JSFUSION_test.csv", *TEST, "ret2,msr1,,x", "ret3,m,video1, ", "ret4")
    found, reasons = said(tmp_path, "train")
    assert found == of(1, 3) and len(reasons) == 2
    found, reasons = said(tmp_path, "test")
    assert len(found) == 2 and len(reasons) == 3
    assert sorted(reasons)[1:] == ["has an empty caption", "names no video"]


def test_sentences_of_one_video(tmp_path):
    table(tmp_path, "MSRVTT_val.csv", "video_id,sentence", "video1,a", "video2,c", "video1,b")
    (first, second) = mixture.read("a", Source("msrvtt", str(tmp_path), "val"), "")
    assert (first.answer, first.references, second.answer) == ("a", ("a", "b"), "c")
    each = [("a", "video1.mp4"), ("b", "video1.mp4"), ("c", "video2.mp4")]
    assert said(tmp_path, "val", per_caption=True) == (each, [])
