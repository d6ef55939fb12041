"""What macOS, Windows and broken downloads leave beside files is left out, and counted once."""

import io
import logging
import pathlib
import shutil
import tarfile

import pytest
import reader_fixtures as fixtures

from xllm_jax.convert.run_import import check_output
from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.launch import cli
from xllm_jax.prepare.recipes import resampled

APPLE = b"\0\5\26\7\0\2\0\0Mac OS X        \0\2\0\0\0\11\0\0\0\62"
READERS = {
    name: (name, {})
    for name in (
        *(
            "activitynet",
            "ai_challenger",
            "aishell",
            "captions_folder",
            "cc3m",
            "coco",
            "flickr30k",
        ),
        *("instructions", "msrvtt", "sbu", "table", "visdial", "visual_genome", "webdataset"),
        *("wukong", "llava_test", "vqav2"),
    )
} | {
    "aishell_2": ("aishell", {}),
    "minigpt4": ("instructions", {}),
    "instructions_by_line": ("instructions", {}),
}


def spoil(root):
    """Litter beside every file and folder; returns nothing."""
    for path in sorted(root.rglob("*")):
        if path.is_dir():
            (path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
            (path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
            (path / "desktop.ini").write_text("[.ShellClassInfo]")
        else:
            path.with_name(f"._{path.name}").write_bytes(APPLE)
    (root / "__MACOSX").mkdir()
    shutil.copytree(root, root / "__MACOSX/copy", ignore=lambda *_: ["__MACOSX"])


def said(source):
    return [(one.key, one.media, one.answer) for one in mixture.read("a", source, "")]


@pytest.mark.parametrize("case", READERS)
def test_readers_leave_it_out(case, tmp_path):
    getattr(fixtures, case)(tmp_path)
    reader, options = READERS[case]
    source = Source(reader, str(tmp_path), "test" if case == "llava_test" else "train", options)
    wanted = said(source)
    shutil.rmtree(tmp_path / ".index", ignore_errors=True)
    spoil(tmp_path)
    assert said(source) == wanted


def test_it_is_counted_once(tmp_path, caplog):
    fixtures.captions_folder(tmp_path)
    for number in range(12):
        fixtures.write(tmp_path / f"left{number}.txt", "the picture was never fetched")
        (tmp_path / f"left{number}.jpg").touch()
    spoil(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(said(Source("captions_folder", str(tmp_path)))) == fixtures.COUNT
    (told,) = caplog.messages
    assert told == f"{tmp_path}: left out 12 empty files and 17 system files"


def test_empty_downloads_of_a_list_of_links(tmp_path):
    fixtures.cc3m(tmp_path)
    (tmp_path / "training/3.jpg").write_bytes(b"")
    found = said(Source("cc3m", str(tmp_path)))
    assert [pathlib.Path(media[0][1]).name for _, media, _ in found] == [
        f"{number}.jpg" for number in (0, 1, 2, 4)
    ]


def test_members_of_a_tar(tmp_path, caplog):
    members = [("1.jpg", fixtures.picture()), ("1.txt", b"good"), ("2.jpg", b""), ("2.txt", b"x")]
    members += [("._3.jpg", APPLE), ("._3.txt", APPLE), ("__MACOSX/4.jpg", APPLE)]
    members += [("__MACOSX/4.txt", b"x"), ("Thumbs.db", b"x"), ("5.jpg", fixtures.picture())]
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "._00000.tar").write_bytes(APPLE)
    (tmp_path / "00001.tar").touch()
    with caplog.at_level(logging.WARNING):
        assert [answer for _, _, answer in said(Source("webdataset", str(tmp_path)))] == ["good"]
    assert f"{tmp_path}/00000.tar: left out 1 empty files and 5 system files" in caplog.text


@pytest.mark.parametrize("name", ["photo._1.jpg", "thumbs.jpg", "._", "a.db", "MACOSX/a.jpg"])
def test_other_names_are_no_litter(name):
    assert litter.named_so(name) == (name == "._")


def test_commands_leave_it_out(tmp_path, monkeypatch):
    output, read = tmp_path / "output", tmp_path / "input"
    output.mkdir()
    (output / ".DS_Store").touch()
    check_output(output, read)
    (output / "mine").touch()
    with pytest.raises(UserError, match="is there already"):
        check_output(output, read)
    fixtures.sound(tmp_path / "wav/a.wav")
    (tmp_path / "wav/._a.wav").write_bytes(APPLE)
    heard, others = resampled.found(tmp_path / "wav")
    assert (heard, others) == ([str(tmp_path / "wav/a.wav")], [])
    (tmp_path / "a.py").write_text("def get_config(): ...")
    (tmp_path / "._a.py").write_bytes(APPLE + b"\xff")
    package = type("Package", (), {"__path__": [str(tmp_path)]})
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: package)
    assert cli.packaged_stages() == {"a": tmp_path / "a.py"}
