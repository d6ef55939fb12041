"""What a medium may be: its bytes decide, never its name, and only formats of its slot are read."""

from __future__ import annotations

import io
import os
import pathlib
import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data.media import cif_features, image, modalities, paths, speech, video
from xllm_jax.prepare import preparation, shard
from xllm_jax.report import media, page

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
1 0 0 setrgbcolor 0 0 20 20 rectfill showpage
"""
SECRET = "\x1b[31mpassword: correct horse battery staple\n" * 40
PICTURES = ("PPM", "JPEG2000", "TGA", "ICO", "PCX", "SGI", "DDS", "ICNS", "PDF", "XBM")
CLIPS = {"HLS": "#EXTM3U\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n", "text": SECRET}
CLIPS |= {"ffconcat": "ffconcat version 1.0\nfile {}\n", "SDP": "v=0\nm=video 1 RTP/AVP 96\n"}
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAE\n"


def clip(path, codec):
    """Twelve frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for level in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 * level, np.uint8), "rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """{modality: files of it}, in several formats."""
    root = tmp_path_factory.mktemp("good")
    picture = Image.fromarray(np.arange(3 * 40 * 48, dtype=np.uint8).reshape(40, 48, 3))
    wave = np.random.default_rng(0).normal(size=16000) / 9
    found: dict[str, list[pathlib.Path]] = {"image": [], "video": [], "speech": []}
    for kind in ("jpg", "png", "webp", "bmp", "gif", "tiff"):
        found["image"].append(root / f"a.{kind}")
        picture.save(found["image"][-1])
    for kind in ("wav", "flac", "ogg", "mp3", "aiff", "au"):
        found["speech"].append(root / f"a.{kind}")
        soundfile.write(found["speech"][-1], wave, 16000)
    for kind in ("mp4", "mkv", "avi", "mov", "ts", "mpg", "flv"):
        found["video"].append(root / f"a.{kind}")
        clip(found["video"][-1], {"mpg": "mpeg2video", "flv": "flv1"}.get(kind, "mpeg4"))
    np.save(root / "a.npy", np.ones((3, 512), np.float32))
    found["cif"] = [root / "a.npy"]
    return found


def read(modality, path):
    return modalities.stored()[modality].read(path)


def test_usual_formats_are_read_under_any_name(good, tmp_path):
    for modality, files in good.items():
        for file in files:
            content = file.read_bytes()
            (tmp_path / "odd: name%d.txt").write_bytes(content)
            for path in (str(file), str(tmp_path / "odd: name%d.txt"), paths.Carried("a", content)):
                assert np.asarray(read(modality, path)).size


def test_a_medium_of_another_slot_is_refused(good):
    for modality in good:
        for other in good.keys() - {modality}:
            for file in good[other]:
                sound = (modality, other) == ("video", "speech")
                with pytest.raises(UserError, match="no video stream" if sound else "known format"):
                    read(modality, file)


@pytest.mark.parametrize("kind", PICTURES)
def test_other_pictures_are_refused(kind, tmp_path):
    stream = io.BytesIO()
    gray = Image.new("1" if kind == "XBM" else "RGB", (32, 32))
    (gray.convert("P") if kind == "PCX" else gray).save(stream, kind)
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="of no known format"):
        image.read(tmp_path / "a.jpg")


def test_no_program_is_started(tmp_path, monkeypatch):
    """Pillow would give an EPS file to Ghostscript, here one that leaves a note."""
    note, script = tmp_path / "was here", tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch '{note}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(EPS)
    code = (
        "import sys\nfrom xllm_jax.report import page\n"
        "from xllm_jax.data.media import modalities\n"
        "print(page.file('image', sys.argv[1], {}))\n"
        "try:\n    modalities.stored()['image'].read(sys.argv[1])\n"
        "except Exception as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jpg")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("of no known format") == 2 and not note.exists()


@pytest.mark.parametrize("kind", CLIPS)
def test_texts_are_no_clips(kind, good, tmp_path, monkeypatch):
    """Playlists read other files, and FFmpeg draws a text as a clip."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_bytes(good["video"][0].read_bytes())
    for name in ("a.txt", "a.mp4"):
        (tmp_path / name).write_text(CLIPS[kind].format("clip.mp4"))
        for read_any in (lambda path: read("video", path), media.frames):
            with pytest.raises(UserError, match="cannot be read as a video"):
                read_any(str(tmp_path / name))


def test_a_list_that_names_itself_opens_nothing(tmp_path):
    """It once opened itself until there were no file handles left."""
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\n" + "file a.mp4\n" * 50)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match="cannot be read as a video"):
        read("video", tmp_path / "a.mp4")
    assert len(os.listdir("/proc/self/fd")) == before


def test_decoders_have_the_lists_too(good, tmp_path, monkeypatch):
    """Where the beginning is that of a video, FFmpeg's own opinion is bound, too."""
    monkeypatch.setattr("xllm_jax.data.media.formats.check", lambda *_: None)
    (tmp_path / "a.mp4").write_text(CLIPS["ffconcat"].format("clip.mp4"))
    (tmp_path / "a.jpg").write_bytes(EPS)
    with pytest.raises(UserError, match="cannot be read as a video"):
        video.pictures(tmp_path / "a.mp4", 1)
    with pytest.raises(UserError, match="cannot be read as an image"):
        image.read(tmp_path / "a.jpg")
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16000, format="VOC")
    with pytest.raises(UserError, match="of the format VOC"):
        speech.read(tmp_path / "a.wav")


def test_nothing_else_is_packed_unchecked(tmp_path):
    """Without a check nothing is decoded, yet what is packed begins as its slot wants it."""
    (tmp_path / "id_rsa").write_text(KEY)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "train.csv").write_text("filepath,title\nid_rsa,one\na.jpg,two\n")
    source = Source("table", str(tmp_path))
    plan = preparation.make("keys", source, str(tmp_path / "out"), 8, check=False)
    note = shard.write(plan, 0, plan.examples())
    assert note["records"] == 1 and "of no known format" in note["rejects"][0]["reason"]
    assert KEY.encode()[:20] not in (tmp_path / "out" / note["file"]).read_bytes()


def test_an_array_that_promises_too_much_is_refused(tmp_path):
    """Its head alone would have NumPy ask for the memory."""
    for shape in ((10**7, 512), (2**62, 512), (3, 512)):
        with (tmp_path / "a.npy").open("wb") as file:
            about = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, about)
            file.write(bytes(64))
        with pytest.raises(UserError, match="does not fit into 64"):
            cif_features.load(tmp_path / "a.npy")


def test_a_part_beyond_its_file_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"12345")
    for length in (6, 2**40, 2**59):
        with pytest.raises(UserError, match="bytes before this part does"):
            paths.read(paths.part(tmp_path / "a.tar", 0, length))


def test_a_huge_file_is_not_read_into_memory(tmp_path):
    for modality in ("image", "speech", "cif"):
        with (tmp_path / modality).open("wb") as file:
            head = {"image": b"\xff\xd8\xff", "speech": b"RIFF\0\0\0\0WAVE", "cif": b"\x93NUMPY"}
            file.write(head[modality])
            file.truncate(2**43)
        with pytest.raises(UserError):
            read(modality, tmp_path / modality)


def test_a_report_names_what_it_cannot_show(tmp_path):
    (tmp_path / "a.wav").write_text(SECRET)
    assert "not a readable audio file" in page.file("speech", str(tmp_path / "a.wav"), {})


@pytest.mark.parametrize("shape", ["(True, 512)", "(-1, 512)", "(0, 99999999999999999999999)"])
def test_features_of_no_shape_are_refused(shape, tmp_path):
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    file = tmp_path / "a.npy"
    file.write_bytes(
        b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head.encode() + bytes(4096)
    )
    for read in (cif_features.load, cif_features.count):
        with pytest.raises(UserError, match=r"a\.npy"):
            read(file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("slot", ["image", "video", "speech", "cif"])
def test_what_is_said_of_a_damaged_file_holds_no_address(good, slot):
    """The decoders name what they read from; of bytes in memory Python tells where they lie."""
    wholes = [path.read_bytes() for path in good[slot]]
    heads = [content[:size] for content in wholes for size in (16, 40, len(content) // 2)]
    noise = np.random.default_rng(0).bytes(2000)
    said = set()
    for content in [*heads, *(head[:16] + noise for head in heads), noise]:
        told = []
        for _ in range(2):
            try:
                read(slot, paths.Carried("the file", bytes(bytearray(content))))
            except UserError as error:
                told.append(str(error))
        assert len({*told}) <= 1, told
        said |= {*told}
    assert said and not any("0x" in text for text in said)
