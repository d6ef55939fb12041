"""Media files of the sizes that the paper's data sets have, for the benchmarks of data loading.

Pictures of 500 x 375 (COCO, CC3M thumbnails), clips of 10 s at 320 x 240 in H.264 (MSR-VTT), and
utterances of 4 to 8 s at 16 kHz in 16-bit WAV (AISHELL).
"""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

PICTURE, CLIP, RATE, SECONDS = (500, 375), (320, 240), 25, 10
SAID = "图中有一个很大的绿色三角形吗"
RECORDS = 10_000  # of each source
COUNTS = {"image": 64, "video": 12, "speech": 32}
SUFFIXES = {"image": "jpg", "video": "mp4", "speech": "wav"}


def scene(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """`[height, width, 3]` uint8: blurred colors, edges, a little noise: what photographs have."""
    total = np.zeros((height, width, 3))
    for grain, strength in ((64, 1.0), (16, 0.5), (4, 0.2)):
        few = rng.integers(0, 255, (height // grain + 2, width // grain + 2, 3), np.uint8)
        picture = Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)
        total += strength * np.asarray(picture)
    for _ in range(8):
        left, top = rng.integers(0, width - 40), rng.integers(0, height - 40)
        total[top : top + rng.integers(20, 90), left : left + rng.integers(20, 90)] *= 0.6
    noise = rng.normal(scale=3, size=total.shape)
    return np.clip(total / 1.7 + noise, 0, 255).astype(np.uint8)


def write_picture(path: Path, rng: np.random.Generator) -> None:
    """A JPEG file of quality 90."""
    Image.fromarray(scene(rng, *PICTURE)).save(path, quality=90)


def write_clip(path: Path, rng: np.random.Generator) -> None:
    """A clip of four shots in which the camera moves; x264 as it is without options."""
    width, height = CLIP
    shot = RATE * SECONDS // 4
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(RATE * SECONDS):
            if number % shot == 0:
                wide = scene(rng, width + shot, height)
            pixels = np.ascontiguousarray(wide[:, number % shot :][:, :width])
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_utterance(path: Path, rng: np.random.Generator) -> None:
    """Syllables of harmonics and breath."""
    time = np.arange(int(rng.uniform(4, 8) * 16_000)) / 16_000
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    voice = sum(np.sin(n * phase) / n for n in range(1, 12)) * (np.sin(2 * np.pi * 2 * time) > -0.3)
    wave = 0.1 * voice + 0.01 * rng.normal(size=len(time))
    soundfile.write(path, wave.astype(np.float32), 16_000, subtype="PCM_16")


def files(folder: Path) -> dict[str, list[Path]]:
    """The files of each modality below `folder`, written where they are missing."""
    writers = {"image": write_picture, "video": write_clip, "speech": write_utterance}
    found: dict[str, list[Path]] = {}
    for kind, count in COUNTS.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        found[kind] = [folder / kind / f"{n:03}.{SUFFIXES[kind]}" for n in range(count)]
        for number, path in enumerate(found[kind]):
            if not path.exists():
                writers[kind](path, np.random.default_rng([number, count]))
    return found


def write_sources(folder: Path) -> dict[str, list[list[tuple[str, str]]]]:
    """A JSON file of conversations for each source; {source: [media of each record]}.

    The sources are those of stage 3: captioned images, clips, utterances, and spoken questions
    about images. Files occur many times, so that a source is as long as a real one.
    """
    found = files(folder)
    media = {kind: [[(kind, str(path))] for path in paths] for kind, paths in found.items()}
    pairs = zip(found["image"], found["speech"] * 2)
    media["spoken"] = [[("image", str(one)), ("speech", str(two))] for one, two in pairs]
    for name, records in media.items():
        rows = [
            {
                "id": f"{name}{number}",
                **{kind: path for kind, path in record},
                "transcript": SAID,
                "conversations": [{"from": "human", "value": "看"}, {"from": "gpt", "value": SAID}],
            }
            for number, record in enumerate(records * (RECORDS // len(records)))
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return media
