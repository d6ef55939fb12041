"""Every reader on annotation files that are broken at random: no traceback, no hang, one line each.

Each mutation opens the set as training does, draws its records and plans their prompts. Whatever is
raised but UserError, or takes seconds, fails with the seed of the mutation and the file it made.
"""

import json
import os
import random
import time
from collections import Counter

import pytest
import reader_fixtures as fixtures
from small_stage import TOKENIZER

from xllm_jax.core import lookup
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.data import mixture
from xllm_jax.data.batching import batch_format
from xllm_jax.data.record import Mode, Record, Skipped
from xllm_jax.prepare import manifest, preparation, shard

MUTATIONS = 5100
SECONDS = 5.0  # of one mutation, however loaded the machine is
CASES = {
    name: (name, "", {})
    for name in (
        *("activitynet", "ai_challenger", "captions_folder", "cc3m", "coco", "flickr30k"),
        *("instructions", "msrvtt", "sbu", "selection", "table", "visdial", "visual_genome"),
        *("webdataset", "wukong", "aishell", "llava_test", "vqav2"),
    )
} | {
    "aishell_2": ("aishell", "", {}),
    "instructions_by_line": ("instructions", "", {}),
    "minigpt4": ("instructions", "", {}),
    "visdial spoken": ("visdial", "", {"kind": "spoken", "history": True}),
    "visual_genome questions": ("visual_genome", "", {"kind": "questions"}),
    "activitynet whole": ("activitynet", "", {"kind": "whole"}),
    "vsdial_cn": ("vsdial_cn", "", {}),
    "reference captions": ("reference", "captions.json", {"images": "images"}),
    "reference asr": ("reference", "asr.json", {"features": "features"}),
    "reference vsd": ("reference", "vsd.json", {"audio": "audio", "images": "images"}),
    "reference packed": ("reference", "packed.json", {}),
    "captions json": ("captions_folder", "", {}),
    "captions csv": ("captions_folder", "", {}),
    "sbu json": ("sbu", "", {}),
    "flickr30k karpathy": ("flickr30k", "", {}),
    "requests": ("requests", "", {"reader": "table"}),
    "nextgpt": ("nextgpt", "", {}),
}
MAKERS = {"visdial spoken": "visdial", "vsdial_cn": "visdial", "activitynet whole": "activitynet"}
MAKERS |= {"visual_genome questions": "visual_genome", "flickr30k karpathy": "flickr30k"}
MAKERS |= {"requests": "table"}
MEDIA = (".jpg", ".flac", ".wav", ".mp4", ".lock")

# What takes the place of a value of JSON, or stands anywhere in a text.
VALUES = (
    *(None, True, 0, -1, 10**30, 1.5, "", " ", "x" * 300, "../x", "/dev/zero", "a\0b", "\ud800"),
    *("\u2028", "<image>", "#t=1,2", "::5:7", [], {}, [None], {"a": {}}, [[[]]], "9" * 400),
)
TOKENS = (
    *(b'"', b"\0", b"\n", b"\r", b"\t", b",", b"{", b"}", b"[", b"]", b"\\", b"\xff", b"#", b" "),
    *(b'\\ud800"', b"null", b"NaN", b"-1e999", b"9" * 5000, b"[" * 3000, b'"' + b"x" * 140_000),
    *(b"x" * 300, "\u2028".encode(), b"\x1c", b"<video>", b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n\n"),
)


def captions_json(root):
    fixtures.pictures(root)
    fixtures.write(
        root / "captions.json", {f"{n}.jpg": t for n, t in zip(range(1, 6), "红黄蓝绿白")}
    )


def captions_csv(root):
    fixtures.pictures(root)
    rows = "".join(f'{n}.jpg,"{t}, {t}"\n' for n, t in zip(range(1, 6), fixtures.TEXTS))
    fixtures.write(root / "captions.csv", "image,caption\n" + rows)


def sbu_json(root):
    fixtures.sbu(root)
    names = ("urls", "captions")
    files = [root / f"SBU_captioned_photo_dataset_{name}.txt" for name in names]
    links, said = ([*file.read_text("utf-8").split("\n")] for file in files)
    fixtures.write(root / "sbu-captions-all.json", {"image_urls": links, "captions": said})
    for file in files:
        file.unlink()


def make(case, root):
    root.mkdir()
    own = globals().get(case.replace(" ", "_"))
    name = MAKERS.get(case, case.split()[0] if case.startswith("reference") else case)
    (own or getattr(fixtures, name))(root)
    if case == "flickr30k karpathy":
        images = [{"filename": f"{n}.jpg", "split": "train"} for n in range(1, 6)]
        fixtures.write(root / "dataset_flickr30k.json", {"images": images})
    reader, inside, options = CASES[case]
    options = {k: f"{root}/{v}" if k in ("images", "features", "audio") else v
               for k, v in options.items()}  # fmt: skip
    split = "test" if reader == "llava_test" else "train"
    return Source(reader, str(root / inside) if inside else str(root), split, options)


def annotations(source, root):
    """The files whose mutation a reader may meet."""
    if source.reader == "reference":
        return [root / source.path]
    list(mixture.read("a", source, ""))  # which makes the indexes of tars
    every = (p for p in sorted(root.rglob("*")) if p.is_file())
    return [path for path in every if path.suffix not in MEDIA]


def nodes(value, path=()):
    """Paths of every value in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(one, (*path, key))


def changed_json(draw, content):
    """A value is replaced, taken away or doubled."""
    whole = json.loads(content)
    path = draw.choice(list(nodes(whole))[1:] or [()])
    if not path:
        return json.dumps(draw.choice(VALUES)).encode()
    *above, last = path
    inside = whole
    for key in above:
        inside = inside[key]
    how = draw.randrange(5)
    if how == 0:
        del inside[last]
    elif how == 1 and isinstance(inside, list):
        inside.insert(draw.randrange(len(inside) + 1), draw.choice(VALUES))
    elif how == 2 and isinstance(inside, dict):
        inside[draw.choice(("id", "image", "caption", "split", *inside))] = inside.pop(last)
    else:
        inside[last] = draw.choice(VALUES)
    return json.dumps(whole, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def changed_bytes(draw, content):
    """Bytes are turned, taken away, doubled, or stand where they do not belong."""
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.choice((1, 1, 2, 8, 40)))
    how = draw.randrange(6)
    if how == 0:
        return content[:start]
    if how == 1:
        return content[:start] + content[end:]
    if how == 2:
        return content[:end] + content[start:]
    if how == 3:
        turned = bytes(byte ^ 1 << draw.randrange(8) for byte in content[start:end])
        return content[:start] + turned + content[end:]
    return content[:start] + draw.choice(TOKENS) + content[start if how == 4 else end :]


def mutated(draw, content):
    """Some changes, one after the other."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        try:
            content = draw.choice((changed_json, changed_bytes))(draw, content)
        except (ValueError, RecursionError):  # no JSON, or no longer
            content = changed_bytes(draw, content)
    return content


@pytest.fixture(scope="module")
def form():
    items = {"image": 2, "video": 1, "speech": 1}
    data = Data(
        tokenizer=str(TOKENIZER),
        examples=2,
        rows=2,
        length=160,
        answers=40,
        items=items,
        embeddings={"image": 3, "video": 3, "speech": 16},
        frames=(64,),
        image={"size": 32},
        video={"frames": 2},
    )
    return batch_format.find(data)


def through(source, form):
    """Opens, draws and plans; returns what became of the set."""
    try:
        found = {"a": mixture.read("a", source, "")}
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    drawn = mixture.in_order(found, {"a": None})[:40]
    form.plan([one for one in drawn if isinstance(one, Record)], Mode())
    lost = [one for one in drawn if isinstance(one, Skipped)]
    assert all(one.reason and one.bad for one in lost)
    return "records lost" if lost else "read"


def test_no_reader_is_forgotten():
    made_up = {
        "layout",
        "captioned_list",
        "msrvtt_lists",
        "world_edits",
        "world_requests",
        "world_scenes",
        "world_text",
    }  # no readers, three without files, and one of no file but the world's own description
    library = {"hugging_face"}  # whose package reads the files
    readers = {reader for reader, _, _ in CASES.values()} | {"prepared", "tfds"}
    assert set(lookup.choices(mixture.READERS)) == readers | made_up | library


@pytest.mark.parametrize("reader", ["prepared", "tfds"])
def test_mutations_of_a_prepared_set(reader, form, tmp_path):
    fixtures.table(tmp_path)
    plan = preparation.make("a_set", Source("table", str(tmp_path)), str(tmp_path / "set"), 2)
    for number in plan.shards.todo():
        shard.write(plan, number, plan.examples())
    manifest.finish(plan)
    options = {"image": "image", "answer": "answer"} if reader == "tfds" else {"kind": ""}
    source = Source(reader, str(tmp_path / "set"), "train", options)
    names = ("dataset_info.json", "features.json", "train.plan.json")
    shards = (tmp_path / "set").glob("*.array_record*")
    mutate(source, [*(tmp_path / "set" / name for name in names), *shards], form, range(150))


def mutate(source, files, form, numbers):
    """Mutates one of the files for each number, and reads the set; returns {outcome: count}."""
    outcomes = dict.fromkeys(("refused", "records lost", "read"), 0)
    whole = {file: file.read_bytes() for file in files}
    for number in numbers:
        draw = random.Random(number)
        file = draw.choice(files)
        content, stamp = mutated(draw, whole[file]), file.stat().st_mtime_ns
        file.write_bytes(content)
        began = time.monotonic()
        try:
            outcomes[through(source, form)] += 1
        except Exception as error:
            pytest.fail(f"mutation {number} of {file} ({content[:300]!r}): {error!r}")
        finally:
            file.write_bytes(whole[file])
            os.utime(file, ns=(stamp, stamp))  # so that indexes of tars fit again
        taken = time.monotonic() - began
        assert taken < SECONDS, f"mutation {number} of {file} took {taken:.1f} s"
    return outcomes


def test_mutations(tmp_path, form):
    outcomes = Counter()
    for first, case in enumerate(CASES):
        source = make(case, tmp_path / str(first))
        files = annotations(source, tmp_path / str(first))
        assert files, case
        outcomes.update(mutate(source, files, form, range(first, MUTATIONS, len(CASES))))
    assert sum(outcomes.values()) == MUTATIONS
    assert min(outcomes.values()) > MUTATIONS // 20, outcomes  # all three happen often
