"""Annotations that are links to files out of reach give no text away, whoever opens them."""

import os
import shutil

import numpy as np
import pytest
import reader_fixtures as fixtures
from test_reader_mutations import CASES, annotations, make

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.media import reach
from xllm_jax.prepare.recipes import questions


def plant(place, root, private):
    """Moves a file or folder, and leaves a link in its place."""
    target = private / place.relative_to(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(place, target)
    place.symlink_to(target)


def told(source):
    """(what a source says, why records cannot be read)."""
    texts, reasons = [], []
    try:
        found = mixture.read("a", source, "")
    except UserError as error:
        return texts, [str(error)]
    for index in range(len(found)):
        try:
            texts.append(found[index].answer)
        except UserError as error:
            reasons.append(str(error))
    return texts, reasons


@pytest.mark.parametrize("case", CASES)
def test_no_reader_opens_a_file_out_of_reach(case, tmp_path, monkeypatch):
    """The look at links beforehand is turned off: what is opened is confined by itself."""
    monkeypatch.setattr(reach.Reach, "check_links", lambda *_: None)
    root = tmp_path / "root"
    source = make(case, root)
    wanted, reasons = told(source)
    assert wanted and not reasons
    for file in annotations(source, root):
        plant(file, root, tmp_path / "private")
    texts, reasons = told(source)
    assert not texts and all("lies outside of" in reason for reason in reasons) and reasons
    source.allow_paths = (str(tmp_path / "private"),)
    assert told(source)[0] == wanted


@pytest.mark.parametrize("depth", range(1, 5))
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("maker", ["captions_folder", "aishell", "aishell_2"])
def test_links_at_every_depth(maker, kind, depth, tmp_path):
    """A file, or a folder above it, is a link; readers that look below their folder follow it."""
    root, private = tmp_path / "root", tmp_path / "private"
    inner = root.joinpath(*["iOS", "data", "c", "d"][: depth if maker == "captions_folder" else 2])
    inner.mkdir(parents=True)
    getattr(fixtures, maker)(inner)
    texts = [*inner.rglob("*.txt"), *inner.rglob("*.scp")]
    for place in texts if kind == "file" else {file.parent for file in texts}:
        plant(place, root, private)
    assert not told(Source(maker.removesuffix("_2"), str(root)))[0]


def test_a_link_within_reach_is_read(tmp_path):
    fixtures.captions_folder(tmp_path)
    (tmp_path / "texts").mkdir()
    shutil.move(tmp_path / "1.txt", tmp_path / "texts/one")
    (tmp_path / "1.txt").symlink_to("texts/one")
    assert fixtures.TEXTS[0] in told(Source("captions_folder", str(tmp_path)))[0]


@pytest.mark.parametrize("reader", ["prepared", "tfds"])
def test_a_library_follows_no_link(reader, tmp_path):
    """Whatever its depth, since the library opens the files."""
    root, private = tmp_path / "set", tmp_path / "private"
    (root / "a/b/c/d").mkdir(parents=True)
    private.mkdir()
    (root / "a/b/c/d/shard").symlink_to(private)
    assert "is a link and leads outside" in told(Source(reader, str(root)))[1][0]


def test_an_index_of_a_tar_is_not_written_elsewhere(tmp_path):
    root, private = tmp_path / "set", tmp_path / "private"
    root.mkdir()
    private.mkdir()
    fixtures.webdataset(root)
    np.save(private / "00000.npy", np.arange(3))
    (root / ".index").symlink_to(private)
    assert "lies outside of" in told(Source("webdataset", str(root)))[1][0]
    assert os.listdir(private) == ["00000.npy"]
    assert np.load(private / "00000.npy").tolist() == [0, 1, 2]


def test_a_recipe_reads_no_file_out_of_reach(tmp_path):
    """The texts that it finds go to a translator."""
    root = tmp_path / "set"
    fixtures.visdial(root)
    file = root / "visdial_1.0_train.json"
    file.write_text(file.read_text("utf-8").replace("几个？", "how many?"), "utf-8")
    plant(root / "visdial_1.0_train.json", root, tmp_path / "private")
    with pytest.raises(UserError, match="lies outside of"):
        questions.build(str(root), str(tmp_path / "out"))
    questions.build(str(root), str(tmp_path / "out"), allow_paths=(str(tmp_path / "private"),))


def test_outside_of_readers_any_file_is_read(tmp_path):
    with reach.Reach([str(tmp_path)]).holding(), pytest.raises(UserError, match="lies outside of"):
        reach.check_opened("/etc/hostname")
    reach.check_opened("/etc/hostname")
