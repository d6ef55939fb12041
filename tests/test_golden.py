"""Every recording, replayed once: each file is known, each array is compared, none misses."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN

from xllm_jax.convert import verify
from xllm_jax.convert.verify.recording import UNUSED

pytestmark = pytest.mark.golden

LLM_WORDS = "ids and labels of the language model's own tokenizer, for which a stand-in was used"
OPT = "of OPT, another language model"
SOUND = "sounds and clips, the second half of any-to-any"
# {file: {pattern of arrays: why nothing compares them}}
ARRAYS = {
    "vision/cases_interfaces.npz": {"*_lm_input_ids": LLM_WORDS, "*_lm_labels": LLM_WORDS},
    "vision/cases_hf.npz": {"stage2_input_ids": OPT, "stage2_logits": OPT},
    "diffusion/cases_preprocess.npz": {"truncated_uint8": SOUND},
    "diffusion/cases_eps.npz": {
        "audio_vae.*": SOUND,
        "clap.*": SOUND,
        "unet3d.*": SOUND,
        "block.unet3d.*": SOUND,
    },
}
# {pattern of files: why no replay compares them}
OTHERS = {
    "README.md": "words",
    "*/README.md": "words, and the tolerances, which replays read",
    "vision/tolerances.json": "tolerances, which replays read",
    "chatglm/MANIFEST.json": "sizes and hashes of the other files",
    "speech/manifest.json": "versions and hashes",
    "chatglm/weights*/*": "weights that replays load, with their configuration",
    "vision/weights/*": "weights that replays load; test_convert_xllm.py loads its runs' two",
    "vision/config.json": "sizes that replays read",
    "vision/cases_info.json": "captions, orders and settings that replays read",
    "chatglm/diagnostics.json": "settings of searches that replays read",
    "vision/cases_bert_init.json": "names of tensors: test_qformer.py",
    "vision/cases_weight_decay.json": "names of parameters: test_optim.py",
    "vision/cases_text_processors.json": "texts: test_image.py",
    "vision/cases_frame_selection.json": "numbers of frames: test_video.py",
    "chatglm/tokenizer/*": "texts and ids: test_tokenizer.py",
    "speech/cer.json": "counts of errors: test_cer.py",
    "diffusion/tolerances.json": "tolerances, which replays read",
    "diffusion/config.json": "sizes of the recorded networks, whose own config.json are read",
    "diffusion/cases_info.json": "versions and hashes",
    "diffusion/sd/*": "weights that replays load; test_stable_diffusion.py converts them",
    "diffusion/variants/*": "another form of a text encoder, which a replay loads",
    **dict.fromkeys(("diffusion/audioldm/*", "diffusion/zeroscope/*"), SOUND),
    **dict.fromkeys(("diffusion/cases_audio_*", "diffusion/cases_video_[!c]*"), SOUND),
    **dict.fromkeys(
        ("diffusion/cases_clap.*", "diffusion/cases_mel.npz", "diffusion/cases_vocoder.npz"), SOUND
    ),
    "diffusion/cases_metrics.npz": "scores of pictures: test_picture_scores.py",
    "nextgpt/MANIFEST.json": "sizes and hashes of the other files",
    "nextgpt/tolerances.json": "tolerances, which replays read",
    "nextgpt/imagebind.*": "encoders of the second half of any-to-any",
    "nextgpt/formats_cases.json": "texts and ids: test_nextgpt_format.py",
    "nextgpt/formats_rewrite.json": "conversations and runs: test_nextgpt_source.py",
    "nextgpt/tokenizer/*": "texts and ids: test_causal_family.py",
}
FILES = sorted(
    name
    for name in (str(path.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*.npz"))
    if not any(fnmatch.fnmatch(name, pattern) for pattern in OTHERS)
)


@pytest.fixture(scope="module")
def recordings():
    """{folder: recording}; what one file loads serves the next."""
    return {one.folder.name: one for one in verify.recordings(GOLDEN)}


def complaints(recording: verify.Recording, file: str, excused: dict[str, str]) -> list[str]:
    """What is wrong with a file: misses, arrays that nothing compares, excuses for nothing."""
    if file not in recording.steps:
        return [f"no replay knows {file}"]
    rows = recording.replay(file)
    unused = [row.array for row in rows if row.verdict == UNUSED]
    hit = {pattern: fnmatch.filter(unused, pattern) for pattern in excused}
    left = set(unused).difference(*hit.values())
    return [
        *(f"{row.array}: {row.verdict} {row.note}" for row in rows if row.missed),
        *(f"nothing compares {name}" for name in sorted(left)),
        *(f"{pattern!r} excuses nothing" for pattern, names in hit.items() if not names),
    ]


def strangers(folder: Path, recordings: dict[str, verify.Recording]) -> list[str]:
    """Files that no replay knows and no reason excuses, and reasons for no file."""
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    replayed = {f"{name}/{file}" for name, one in recordings.items() for file in one.steps}
    settings = {str(Path(file).with_suffix(".json")) for file in replayed}
    excused = {pattern: fnmatch.filter(files, pattern) for pattern in OTHERS}
    left = (files - replayed - settings).difference(*excused.values())
    return sorted(left) + [pattern for pattern, found in excused.items() if not found]


@pytest.mark.parametrize("file", FILES)
def test_replay(file, recordings):
    folder, _, name = file.partition("/")
    assert folder in recordings, f"no family of recordings knows {folder}"
    assert complaints(recordings[folder], name, ARRAYS.get(file, {})) == []


def test_every_file_is_known(recordings):
    assert strangers(GOLDEN, recordings) == []
    assert ARRAYS.keys() <= set(FILES)


FILE = "decoder_cross_attn"


@pytest.fixture
def small(tmp_path):
    """`(arrays) -> complaints` of a recording of one small file that holds these arrays."""
    for name in ("README.md", f"{FILE}.json"):
        shutil.copy(GOLDEN / "speech" / name, tmp_path)

    def replay(excused=None, **changed):
        with np.load(GOLDEN / f"speech/{FILE}.npz") as file:
            np.savez(tmp_path / f"{FILE}.npz", **dict(file) | changed)
        (recording,) = verify.recordings(tmp_path)
        return complaints(recording, f"{FILE}.npz", excused or {})

    return replay


def test_a_changed_weight_is_seen(small):
    with np.load(GOLDEN / f"speech/{FILE}.npz") as file:
        weight = 1.1 * file["layer/fc1.weight"]
    assert small() == []
    found = small(**{"layer/fc1.weight": weight})
    assert {line.partition(":")[0] for line in found} >= {"out_ctx_masked", "out_no_ctx"}


def test_an_array_that_nothing_compares_is_seen(small):
    more = {"out_more": np.zeros(3, np.float32)}
    assert small(**more) == ["nothing compares out_more"]
    assert small({"out_m*": "a reason"}, **more) == []
    assert small({"out_m*": "a reason"}) == ["'out_m*' excuses nothing"]


def test_a_file_that_no_replay_knows_is_seen(recordings, tmp_path):
    for path in GOLDEN.rglob("*"):
        if path.is_file():
            copied = tmp_path / path.relative_to(GOLDEN)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.touch()
    assert strangers(tmp_path, recordings) == []
    np.savez(tmp_path / "speech/more.npz", x=np.ones(1))
    assert strangers(tmp_path, recordings) == ["speech/more.npz"]
    assert complaints(recordings["speech"], "more.npz", {}) == ["no replay knows more.npz"]
    (tmp_path / "speech/more.npz").unlink()
    (tmp_path / "speech/cer.json").unlink()
    assert strangers(tmp_path, recordings) == ["speech/cer.json"]
