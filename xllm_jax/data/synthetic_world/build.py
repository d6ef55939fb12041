"""Writes the world to disk: real files, in the layouts of the published data sets.

coco/annotations/captions_SPLIT.json, coco/SPLIT/*.jpg|png          COCO captions
visual_genome/SPLIT/{region_descriptions,question_answers}.json, VG_100K/*.jpg
visdial/visdial_1.0_SPLIT.json, visdial/speech/SPLIT/*.flac          VisDial, spoken (VSDial-CN)
aishell/wav/{train,dev,test}/SPEAKER/*.flac, aishell/transcript/     AISHELL-1
msrvtt/{train_val,test}_videodatainfo.json, {TrainVal,Test}Video/    MSR-VTT
instructions/SPLIT.json                                              stage 3 conversations
llava_test/*.jsonl, images/*.jpg                                     LLaVA-test
characters.txt                                                       of all transcripts, for ASR
world.json                                                           what all this is
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from xllm_jax.core import bounded, disk, litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.synthetic_world import annotations, motion, plan, render, speak
from xllm_jax.data.synthetic_world.plan import SPLITS, Split, WorldSizes
from xllm_jax.data.synthetic_world.scene import HELD_OUT
from xllm_jax.data.synthetic_world.text_stream import spoken_characters
from xllm_jax.data.text.characters import CharacterVocabulary

VERSION = 4
CHUNK = 40
Progress = Callable[[int, int], None]


def build(
    directory: str | pathlib.Path,
    sizes: WorldSizes = WorldSizes(),  # noqa: B008 (frozen)
    seed: int = 0,
    workers: int = 2,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Builds the world in `directory` and returns its path; does nothing if it is there already.

    The work happens in a folder beside it that is renamed at the end, so a half-built world never
    carries the wanted name.

    Args:
      directory: where the world shall lie; must not exist, be empty, or hold this very world.
      sizes: how many of everything.
      seed: all randomness hangs on it.
      workers: processes; 0 works in this one.
      progress: called with (files done, files in all).

    Raises:
      UserError: the directory holds something else.
    """
    directory = pathlib.Path(directory)
    if _is_built(directory, sizes, seed):
        return directory
    _remove_remains(directory)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        splits = [plan.plan_split(seed, split, sizes) for split in SPLITS]
        with disk.writing(directory):
            partial.mkdir(parents=True)
            _run(list(_jobs(partial, splits)), workers, progress)
            _link_pictures(partial, splits)
            _write_annotations(partial, splits, sizes, seed)
            _move(partial, directory, sizes, seed)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _remove_remains(directory: pathlib.Path) -> None:
    # A build that was killed could not remove its folder; one that is alive needs its own.
    for partial in directory.parent.glob(f".{directory.name}.*.partial"):
        number = partial.name.split(".")[-2]
        if number.isdigit() and (int(number) == os.getpid() or not _is_alive(int(number))):
            shutil.rmtree(partial, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _move(partial: pathlib.Path, directory: pathlib.Path, sizes: WorldSizes, seed: int) -> None:
    # Somebody else may have built there meanwhile: the same world will do, another is refused.
    if _is_built(directory, sizes, seed):
        return
    if directory.exists():
        directory.rmdir()
    partial.rename(directory)


def identity(sizes: WorldSizes, seed: int) -> dict:
    """What makes two worlds the same, as world.json keeps it."""
    return {"version": VERSION, "seed": seed, "sizes": dataclasses.asdict(sizes)}


def _is_built(directory: pathlib.Path, sizes: WorldSizes, seed: int) -> bool:
    if not directory.exists() or (directory.is_dir() and not litter.filled(directory)):
        return False
    marker = directory / "world.json"
    if not marker.is_file():
        raise UserError(
            "holds other files, and no world.json",
            field=str(directory),
            hint="Name an empty or a new directory",
        )
    found = bounded.read_json(marker)
    wanted = identity(sizes, seed)
    if {name: found.get(name) for name in wanted} != wanted:
        raise UserError(
            "holds a world of another seed, version or other sizes",
            field=str(directory),
            hint="Remove it or name another directory",
        )
    return True


def _jobs(root: pathlib.Path, splits: list[Split]) -> Iterator[tuple]:
    """(kind, path, what) of every file to make."""
    for split in splits:
        for picture in split.pictures:
            yield "picture", root / "coco" / split.name / picture.file_name, picture.scene
        for video in split.videos:
            yield "video", root / "msrvtt" / annotations.video_path(split, video), video.clip
        for utterance in split.utterances:
            path = root / "aishell" / annotations.aishell_path(split, utterance)
            yield "speech", path, (utterance.text, utterance.voice)
        for dialogue in split.dialogues:
            for index, (asked, voice) in enumerate(zip(dialogue.rounds, dialogue.voices)):
                if voice:
                    name = annotations.speech_name(dialogue, index)
                    path = root / "visdial" / "speech" / split.name / name
                    yield "speech", path, (asked.text, voice)


def _run(jobs: list[tuple], workers: int, progress: Progress | None) -> None:
    for folder in {path.parent for _, path, _ in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    chunks = [jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    done = 0
    for count in _in_processes(chunks, workers) if workers else map(make_files, chunks):
        done += count
        if progress:
            progress(done, len(jobs))


def _in_processes(chunks: list[list[tuple]], workers: int) -> Iterator[int]:
    # Spawned, not forked: the parent may run JAX, whose threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    try:
        waiting = [pool.submit(make_files, chunk) for chunk in chunks]
        for finished in concurrent.futures.as_completed(waiting):
            yield finished.result()
    finally:
        # After a failure or Ctrl-C the rest is not worth waiting for.
        pool.shutdown(cancel_futures=True)


def make_files(jobs: list[tuple]) -> int:
    """Makes some files (kind, path, what) and returns how many."""
    for kind, path, what in jobs:
        if kind == "picture":
            # PNG ignores the quality.
            render.render_scene(what).save(path, quality=90)
        elif kind == "video":
            motion.write_mp4(path, motion.render_clip(what))
        else:
            speak.write_flac(path, speak.speak(*what))
    return len(jobs)


def _link_pictures(root: pathlib.Path, splits: list[Split]) -> None:
    """Visual Genome and LLaVA-test have names of their own for pictures that COCO has too: links,
    or copies."""
    for split in splits:
        folder = root / "visual_genome" / split.name / "VG_100K"
        names = {f"{one.image_id}.jpg": one for one in annotations.genome_pictures(split)}
        _link(root / "coco" / split.name, folder, names)
    judged = {f"{one.image_id:012d}.jpg": one for one in annotations.judged_pictures(splits[-1])}
    _link(root / "coco" / splits[-1].name, root / "llava_test" / "images", judged)


def _link(source: pathlib.Path, folder: pathlib.Path, pictures: dict[str, plan.Picture]) -> None:
    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        try:
            os.link(source / picture.file_name, folder / name)
        except OSError:
            shutil.copyfile(source / picture.file_name, folder / name)


def _write_annotations(root, splits: list[Split], sizes: WorldSizes, seed: int) -> None:
    for split in splits:
        name = split.name
        genome = f"visual_genome/{name}"
        _write(root, f"coco/annotations/captions_{name}.json", annotations.coco_captions(split))
        _write(root, f"{genome}/region_descriptions.json", annotations.genome_regions(split))
        _write(root, f"{genome}/question_answers.json", annotations.genome_questions(split))
        _write(root, f"visdial/visdial_1.0_{name}.json", annotations.visdial(split))
        count = sizes.of(name, "instructions")
        records = annotations.instruction_records(seed, split, count)
        _write(root, f"instructions/{name}.json", records)
    _write(root, "msrvtt/train_val_videodatainfo.json", annotations.msrvtt(splits[:2]))
    _write(root, "msrvtt/test_videodatainfo.json", annotations.msrvtt(splits[2:]))
    for name, rows in annotations.llava_test(splits[-1]).items():
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        (root / "llava_test" / f"{name}.jsonl").write_text(lines, "utf-8")
    _write(root, "aishell/tags.json", annotations.aishell_tags(splits))
    transcripts = root / "aishell" / "transcript" / "aishell_transcript_v0.8.txt"
    transcripts.parent.mkdir(parents=True)
    transcripts.write_text(annotations.aishell_transcripts(splits), "utf-8")
    CharacterVocabulary(spoken_characters()).save(root / "characters.txt")
    _write(root, "world.json", {**identity(sizes, seed), **_document()})


def _document() -> dict:
    return {
        "about": "A small world with exactly known ground truth, made by xllm_jax.",
        "layouts": {
            "coco": "COCO captions",
            "visual_genome": "Visual Genome regions and questions, one folder per split",
            "visdial": "VisDial 1.0 with spoken questions",
            "aishell": "AISHELL-1, FLAC instead of WAV",
            "msrvtt": "MSR-VTT",
            "instructions": "conversations with <image>, <video> and <speech> slots",
            "llava_test": "LLaVA-test of the test split, with true reference answers",
        },
        "held_out_pairs": sorted([list(pair) for pair in HELD_OUT]),
        "unseen_voice": [speak.UNSEEN_VARIANT, list(speak.UNSEEN_PITCHES)],
        "test_split": "1/2 unseen pairs, 1/2 unseen voice, 1/4 unseen wordings; see tags",
    }


def _write(root: pathlib.Path, name: str, data) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")
