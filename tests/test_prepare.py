"""Prepared sets: what a reader gave comes back, shards are atomic, nothing is done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import soundfile
from PIL import Image
from test_video import write as write_video

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data.media import image, paths, video
from xllm_jax.data.sources import instructions, prepared, tfds
from xllm_jax.prepare import engine, manifest, preparation, shard

ROOT = Path(__file__).parents[1]
COUNT = 10


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A captioned folder as a table; one picture is broken, one missing, one caption empty."""
    root = tmp_path_factory.mktemp("table")
    lines = ["filepath\ttitle"]
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 255, (9, 9, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        lines.append(f"{number}.png\t{'' if number == 8 else f'第{number}张图'}")
    (root / "3.png").write_bytes(b"broken")
    (root / "5.png").unlink()
    (root / "train.tsv").write_text("\n".join(lines), "utf-8")
    return root


REJECTED = {3: "cannot be read as an image", 5: "no such image file", 8: "caption"}
GOOD = [number for number in range(COUNT) if number not in REJECTED]


def planned(table, output, per_shard=4, **changes):
    source = Source("table", str(table), **changes)
    return preparation.make("pictures", source, str(output), per_shard)


def write_all(made):
    found = made.examples()
    return [shard.write(made, number, found) for number in made.shards.todo()]


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def written(table, tmp_path_factory):
    """The set of the table, prepared without Beam."""
    made = planned(table, tmp_path_factory.mktemp("prepared") / "pictures")
    write_all(made)
    manifest.finish(made)
    return made


def test_what_the_reader_gave_comes_back(table, written):
    originals = written.examples()
    back = prepared.examples(written.output)
    assert len(back) == len(GOOD)
    for number, one in zip(GOOD, back):
        other = originals[number]
        assert (one.key, one.answer, one.task) == (other.key, other.answer, other.task)
        assert one.references == other.references
        assert paths.read(one.media[0][1]) == (table / f"{number}.png").read_bytes()


def test_tfds_reads_it(written):
    back = tfds.examples(written.output, image="image", answer="answer")
    assert [one.answer for one in back] == [f"第{number}张图" for number in GOOD]
    assert image.read(back[0].media[0][1]).size == (9, 9)


def test_the_manifest_counts_and_names_the_rejects(written):
    made = json.loads((Path(written.output) / "manifest.json").read_text("utf-8"))
    split = made["splits"]["train"]
    assert (split["records"], split["rejected"]) == (len(GOOD), len(REJECTED))
    assert [one["records"] for one in split["shards"]] == [3, 3, 1]
    rejects = [reject for one in split["shards"] for reject in one["rejects"]]
    for reject, (number, words) in zip(rejects, REJECTED.items()):
        assert reject["key"] == f"pictures[{number}]" and words in reject["reason"]
    for one in split["shards"]:
        file = Path(written.output) / one["file"]
        assert file.stat().st_size == one["bytes"] and atomic.sha256(file) == one["sha256"]


def test_the_same_command_does_nothing_and_a_killed_one_continues(table, written, tmp_path):
    assert written.shards.todo() == []
    whole = contents(written.output)
    assert engine.run(written)["splits"]["train"]["records"] == len(GOOD)
    assert contents(written.output) == whole
    made = planned(table, tmp_path / "pictures")
    shard.write(made, 1, made.examples())
    made.shards.file(0).write_bytes(b"half a shard")  # killed between shard and note
    beginnings = [made.shards.file(2).with_name(f".{made.shards.file(2).name}.7.partial")]
    beginnings += [
        made.shards.file(2).with_name(".pictures-val.array_record-00000-of-00001.7.partial")
    ]
    for beginning in beginnings:
        beginning.write_bytes(b"x")
    assert made.shards.todo() == [0, 2]
    with pytest.raises(UserError, match="2 of 3 shards are not written"):
        manifest.finish(made)
    write_all(planned(table, tmp_path / "pictures"))
    manifest.finish(made)
    assert [beginning.exists() for beginning in beginnings] == [False, True]  # of another command
    shards = [made.shards.file(number).read_bytes() for number in range(3)]
    assert shards == [written.shards.file(number).read_bytes() for number in range(3)]


def test_the_command_prints_what_it_did_and_mistakes_in_a_line(table, written):
    def run(*options):
        flags = ["--source=table", f"--input={table}", f"--output={written.output}", *options]
        command = [sys.executable, "-m", "xllm_jax.launch.prepare", "--name=pictures", *flags]
        return forked.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run("--shard_records=4")
    assert done.stdout.startswith("7 records in 3 shards"), done.stderr
    assert "3 rejected" in done.stdout
    done = run("--options=[]")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("--options: no JSON object (is list)")


KILLED = """
import os, signal
from xllm_jax.core.stage import Source
from xllm_jax.data.rows import prepared
from xllm_jax.prepare import engine, preparation, shard
row, seen = prepared.row, []
def killing(*given):
    seen.append(given)
    if len(seen) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return row(*given)
prepared.row = killing
made = preparation.make("pictures", Source("table", {table!r}), {output!r}, 4)
found = made.examples()
for number in made.shards.todo():
    shard.write(made, number, found)
"""


def test_kill_9_leaves_what_is_whole_and_the_same_command_does_the_rest(table, written, tmp_path):
    output = tmp_path / "pictures"
    code = KILLED.format(table=str(table), output=str(output))
    assert forked.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    made = planned(table, output)
    assert made.shards.todo() == [1, 2] and len(list(output.glob(".*.partial"))) == 1
    time = made.shards.file(0).stat().st_mtime_ns
    write_all(made)
    manifest.finish(made)
    assert made.shards.file(0).stat().st_mtime_ns == time and not list(output.glob(".*.partial"))
    shards = [made.shards.file(number).read_bytes() for number in range(3)]
    assert shards == [written.shards.file(number).read_bytes() for number in range(3)]


def test_a_damaged_shard_is_written_again(table, tmp_path):
    made = planned(table, tmp_path / "pictures")
    write_all(made)
    content = made.shards.file(0).read_bytes()
    made.shards.file(0).write_bytes(content[:-1])
    assert made.shards.todo() == [0]
    write_all(made)
    assert made.shards.file(0).read_bytes() == content


def test_another_plan_is_refused_in_words(table, written):
    with pytest.raises(UserError, match="prepared with another per_shard"):
        planned(table, written.output, per_shard=5)


def test_speech_video_and_dialogues(tmp_path):
    wave = np.random.default_rng(0).normal(size=16000).astype(np.float32) / 9
    soundfile.write(tmp_path / "a.flac", wave, 16000)
    write_video(tmp_path / "a.mp4", 12)
    rows = [
        {
            "id": f"r{number}",
            "video": "a.mp4",
            "conversations": [
                {"from": "human", "value": "<video>看"},
                {"from": "gpt", "value": "好"},
                {"from": "human", "value": f"第{number}问"},
                {"from": "gpt", "value": "对"},
            ],
        }
        for number in range(3)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows), "utf-8")
    originals = instructions.examples(str(tmp_path))
    source = Source("instructions", str(tmp_path))
    made = preparation.make("talks", source, str(tmp_path / "out"), 2)
    write_all(made)
    manifest.finish(made)
    back = prepared.examples(made.output)
    assert [(e.key, e.history, e.instruction) for e in back] == [
        (e.key, e.history, e.instruction) for e in originals
    ]
    one, other = (video.load(e[0].media[0][1], {"size": 16}) for e in (back, originals))
    np.testing.assert_array_equal(one, other)


def test_several_files_of_a_modality_and_records_of_several_kinds(table, tmp_path):
    """Two images, speech before an image, no media: slots keep their order, files their bytes."""
    wave = np.random.default_rng(0).normal(size=16000).astype(np.float32) / 9
    soundfile.write(table / "a.flac", wave, 16000)
    media = (
        {"image": ["0.png", "1.png"]},
        {"speech": "a.flac", "image": "2.png"},
        {},
        {"image": "3.png"},
    )
    texts = ("<image>和<image>？", "<speech><image>？", "你好", "<image>")
    rows = [
        {
            "id": str(number),
            "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "好"}],
            **files_,
        }
        for number, (text, files_) in enumerate(zip(texts, media))
    ]
    (table / "talks.json").write_text(json.dumps(rows), "utf-8")
    source = Source("instructions", str(table / "talks.json"))
    made = preparation.make("talks", source, str(tmp_path / "out"), 2)
    assert made.several
    write_all(made)
    manifest.finish(made)
    originals, back = made.examples(), prepared.examples(made.output)
    assert len(back) == 3  # the last picture is broken
    for one, other in zip(back, originals):
        assert (one.key, one.instruction, one.media) == (other.key, other.instruction, other.media)
        assert [paths.read(path) for _, path in one.media] == [
            paths.read(path) for _, path in other.media
        ]
    assert [name for name, _ in back[1].media] == ["speech", "image"]


def test_a_source_that_has_changed_is_another_plan(table, tmp_path):
    allowed = {"allow_paths": (str(table),)}
    (tmp_path / "train.tsv").write_text(f"filepath\ttitle\n{table}/0.png\tred\n", "utf-8")
    planned(tmp_path, tmp_path / "out", **allowed)
    (tmp_path / "train.tsv").write_text(f"filepath\ttitle\n{table}/0.png\tblue\n", "utf-8")
    with pytest.raises(UserError, match="prepared with another content"):
        planned(tmp_path, tmp_path / "out", **allowed)


def test_a_set_that_cannot_be_used_says_why(table, tmp_path):
    (tmp_path / "train.tsv").write_text("filepath\ttitle\nx.png\tred\n", "utf-8")
    made = planned(tmp_path, tmp_path / "out")
    write_all(made)
    with pytest.raises(UserError, match=r"no record can be used.*x\.png: no such"):
        manifest.finish(made)


def test_reading_and_training_never_import_beam_or_tensorflow(written, tmp_path):
    """Both are found where they are looked for, and end the process when they are imported."""
    for name in ("tensorflow", "apache_beam"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("import os; os._exit(9)")
    tokenizer = ROOT / "xllm_jax" / "data" / "synthetic_world" / "backbones" / "llm"
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from xllm_jax.core.stage import Data, Source
from xllm_jax.training import loop
from xllm_jax.data.pipeline import Pipeline
data = Data(sources={{"a": Source("prepared", {written.output!r})}}, tokenizer={str(tokenizer)!r},
            examples=2, rows=2, length=64, answers=24, items={{"image": 1}},
            embeddings={{"image": 2}}, image={{"size": 16}}, threads=1)
batch, info = next(Pipeline(data).iterate())
assert batch.weights.any() and info["bad"] == 0
print("read", [m for m in ("tensorflow", "apache_beam") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "read []", done.stderr or done.returncode


def test_without_beam_the_error_names_the_extra(table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"Apache Beam is not installed.*prepare"):
        engine.run(planned(table, tmp_path / "pictures"))


@pytest.mark.filterwarnings("default")
def test_beam_writes_the_same_shards(table, written, tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")
    made = planned(table, tmp_path / "pictures")
    found = engine.run(made)
    assert found["splits"]["train"]["records"] == len(GOOD)
    for number in range(made.shards.count):
        assert made.shards.file(number).read_bytes() == written.shards.file(number).read_bytes()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("runner", ["InProcess", "MultiProcessing"])
def test_other_runners_write_the_same_shards(table, written, tmp_path, runner):
    pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra 'prepare'")
    made = planned(table, tmp_path / "pictures")
    if runner == "MultiProcessing":
        engine.run(made, workers=2)
    else:
        engine.run(made, ["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"])
    for number in range(made.shards.count):
        assert made.shards.file(number).read_bytes() == written.shards.file(number).read_bytes()
