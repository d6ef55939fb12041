"""The world's ground truth in the file forms of the published data sets.

Each function returns plain JSON data (or text) of one file. Extra keys that the published sets do
not have: `tags` everywhere, `speech` and `speech_tags` in dialogue rounds.
"""

from __future__ import annotations

from xllm_jax.data.synthetic_world import language, motion, questions, render
from xllm_jax.data.synthetic_world.plan import Dialogue, Picture, Split, Video, question_tags
from xllm_jax.data.synthetic_world.scene import choose, generator
from xllm_jax.data.text.instructions import instructions

AISHELL_SPLIT = {"train": "train", "val": "dev", "test": "test"}
JUDGED = 30  # pictures of LLaVA-test
MSRVTT_SPLIT = {"train": "train", "val": "validate", "test": "test"}
# One turn of the instruction mix: four of images, two of speech to write down (one beside its
# picture), two of spoken questions to answer, two of videos.
INSTRUCTION_TURN = (
    "caption",
    "dialogue",
    "asr",
    "spoken_vqa",
    "video_caption",
    "vqa",
    "caption",
    "asr_image",
    "spoken_vqa",
    "video_question",
)


def coco_captions(split: Split) -> dict:
    """COCO captions form: images and annotations."""
    images, annotations = [], []
    for picture in split.pictures:
        size = {"width": render.PIXELS, "height": render.PIXELS}
        images.append({"id": picture.image_id, "file_name": picture.file_name, **size})
        for caption in picture.captions:
            entry = {"id": len(annotations) + 1, "image_id": picture.image_id, "caption": caption}
            annotations.append({**entry, "tags": list(picture.caption_tags)})
    return {"info": {"description": "xllm_jax world"}, "images": images, "annotations": annotations}


def genome_pictures(split: Split) -> list[Picture]:
    """The pictures that the Visual Genome part holds: all that are JPEG, as its files are."""
    return [picture for picture in split.pictures if picture.file_name.endswith("jpg")]


def genome_regions(split: Split) -> list[dict]:
    """Visual Genome's region_descriptions.json."""
    rows, number = [], 0
    for picture in genome_pictures(split):
        regions = []
        boxes = render.object_boxes(picture.scene)
        for phrase, (x, y, width, height) in zip(picture.regions, boxes):
            number += 1
            box = {"x": x, "y": y, "width": width, "height": height}
            entry = {"region_id": number, "image_id": picture.image_id, "phrase": phrase, **box}
            regions.append({**entry, "tags": list(picture.caption_tags)})
        rows.append({"id": picture.image_id, "regions": regions})
    return rows


def genome_questions(split: Split) -> list[dict]:
    """Visual Genome's question_answers.json."""
    rows, number = [], 0
    for picture in genome_pictures(split):
        asked = []
        for question in picture.questions:
            number += 1
            entry = {"qa_id": number, "image_id": picture.image_id, "question": question.text}
            tags = list(question_tags(question, picture.scene))
            asked.append({**entry, "answer": question.answer, "a_objects": [], "tags": tags})
        rows.append({"id": picture.image_id, "qas": asked})
    return rows


def judged_pictures(split: Split) -> list[Picture]:
    """The pictures of LLaVA-test: as many as the published set has, at most."""
    return genome_pictures(split)[:JUDGED]


def llava_test(split: Split) -> dict[str, list[dict]]:
    """The rows of LLaVA-test's files by their names: three questions about each picture.

    'conv' is a question with a short answer, 'detail' asks for a description, and 'complex' is a
    question about several objects where the picture has one.
    """
    asked, said, known = [], [], []
    for picture in judged_pictures(split):
        file = f"{picture.image_id:012d}.jpg"
        conv, hard = picture.questions[0], _hardest(picture)
        detail = instructions("caption")[0], picture.captions[0]
        rounds = {
            "conv": (conv.text, conv.answer),
            "detail": detail,
            "complex": (hard.text, hard.answer),
        }
        for kind, (question, answer) in rounds.items():
            number = len(asked)
            row = {"question_id": number, "image": file, "text": question, "category": kind}
            asked.append(row)
            said.append({"question_id": number, "text": answer, "category": kind})
        known.append(
            {"image": file, "captions": list(picture.captions), "instances": _instances(picture)}
        )
    names = ("qa90_questions", "qa90_gpt4_answer", "caps_boxes_coco2014_val_80")
    return dict(zip(names, (asked, said, known)))


def _hardest(picture: Picture) -> questions.Question:
    several = ("comparison", "count", "existence")
    rest = picture.questions[1:]
    return next((one for kind in several for one in rest if one.kind == kind), rest[-1])


def _instances(picture: Picture) -> list[dict]:
    """Objects with corners of their boxes in parts of the picture, as LLaVA's judge is told."""
    boxes = render.object_boxes(picture.scene)
    return [
        {
            "category": item.color + item.shape,
            "bbox": [round(n / render.PIXELS, 3) for n in (x, y, x + width, y + height)],
        }
        for item, (x, y, width, height) in zip(picture.scene.objects, boxes)
    ]


def speech_name(dialogue: Dialogue, index: int) -> str:
    """File name of a spoken round."""
    return f"{dialogue.picture.image_id:012d}_{index}.flac"


def visdial(split: Split) -> dict:
    """VisDial 1.0 form, with `speech` (a path beside the JSON file) in the spoken rounds."""
    texts, answers = {}, {}
    dialogs = []
    for dialogue in split.dialogues:
        rounds = []
        for index, (asked, voice) in enumerate(zip(dialogue.rounds, dialogue.voices)):
            tags = question_tags(asked, dialogue.picture.scene)
            entry = {
                "question": texts.setdefault(asked.text, len(texts)),
                "answer": answers.setdefault(asked.answer, len(answers)),
            }
            if voice:
                entry["speech"] = f"speech/{split.name}/{speech_name(dialogue, index)}"
                entry["speech_tags"] = ["unseen_voice"] * voice.unseen
            rounds.append({**entry, "tags": list(tags)})
        picture = dialogue.picture
        base = {"image_id": picture.image_id, "caption": picture.captions[0]}
        dialogs.append({**base, "dialog": rounds})
    data = {"questions": list(texts), "answers": list(answers), "dialogs": dialogs}
    return {"version": "1.0", "split": split.name, "data": data}


def aishell_transcripts(splits: list[Split]) -> str:
    """AISHELL-1's transcript file: name, then the words, all divided by spaces."""
    lines = [
        f"{utterance.name} {' '.join(utterance.text)}"
        for split in splits
        for utterance in split.utterances
    ]
    return "\n".join(sorted(lines)) + "\n"


def aishell_tags(splits: list[Split]) -> dict:
    """Tags by utterance name (a file that AISHELL-1 does not have)."""
    return {
        utterance.name: list(utterance.tags)
        for split in splits
        for utterance in split.utterances
        if utterance.tags
    }


def aishell_path(split: Split, utterance) -> str:
    """Path of an utterance inside the AISHELL-1 layout."""
    folder = f"wav/{AISHELL_SPLIT[split.name]}/{utterance.voice.speaker}"
    return f"{folder}/{utterance.name}.flac"


def msrvtt(splits: list[Split]) -> dict:
    """MSR-VTT's videodatainfo form."""
    videos, sentences = [], []
    for split in splits:
        for video in split.videos:
            times = {"start time": 0.0, "end time": motion.FRAMES / motion.RATE}
            base = {"id": video.number, "video_id": f"video{video.number}", "category": 0}
            name = MSRVTT_SPLIT[split.name]
            videos.append({**base, **times, "split": name, "tags": list(video.tags)})
            for caption in video.captions:
                entry = {"sen_id": len(sentences), "video_id": f"video{video.number}"}
                sentences.append({**entry, "caption": caption})
    return {"info": {"description": "xllm_jax world"}, "videos": videos, "sentences": sentences}


def video_path(split: Split, video: Video) -> str:
    """Path of a video inside the MSR-VTT layout."""
    folder = "TestVideo" if split.name == "test" else "TrainValVideo"
    return f"{folder}/video{video.number}.mp4"


def instruction_records(seed: int, split: Split, count: int) -> list[dict]:
    """Conversations over the split's own files, tasks taking turns; paths start at the root."""
    records = []
    for index in range(count):
        rng = generator(seed, "instruction", split.name, index)
        turn, kind = divmod(index, len(INSTRUCTION_TURN))
        unseen = split.name == "test" and turn % 4 == 0
        record = _RECORDS[INSTRUCTION_TURN[kind]](split, rng, unseen)
        record["id"] = f"{split.name}-{index}"
        if unseen and "unseen_wording" not in record["tags"]:
            record["tags"].append("unseen_wording")
        records.append(record)
    return records


def _record(task, tags, rounds, transcript="", **media) -> dict:
    slots = "".join(f"<{name}>" for name in media)
    conversations = []
    for index, (asked, answer) in enumerate(rounds):
        text = f"{slots}\n{asked}" if index == 0 else asked
        conversations += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    record = {"task": task, **media, "conversations": conversations, "tags": list(tags)}
    return {**record, "transcript": transcript} if transcript else record


def _image(split: Split, picture: Picture) -> str:
    return f"coco/{split.name}/{picture.file_name}"


def _caption(split, rng, unseen):
    picture = choose(rng, split.pictures)
    asked = choose(rng, instructions("caption", unseen))
    answer = language.caption(picture.scene, rng)
    return _record("caption", picture.tags, [(asked, answer)], image=_image(split, picture))


def _vqa(split, rng, unseen):
    picture = choose(rng, split.pictures)
    asked = questions.ask(picture.scene, rng, unseen)
    tags = question_tags(asked, picture.scene)
    return _record("vqa", tags, [(asked.text, asked.answer)], image=_image(split, picture))


def _dialogue(split, rng, unseen):
    picture = choose(rng, split.pictures)
    asked = questions.dialogue(picture.scene, rng, 3, unseen)
    rounds = [(question.text, question.answer) for question in asked]
    return _record("dialogue", picture.tags, rounds, image=_image(split, picture))


def _asr(split, rng, unseen):
    utterance = choose(rng, split.utterances)
    asked = choose(rng, instructions("asr", unseen))
    path = f"aishell/{aishell_path(split, utterance)}"
    rounds = [(asked, utterance.text)]
    return _record("asr", utterance.tags, rounds, utterance.text, speech=path)


def _spoken_vqa(split, rng, unseen):
    said, tags, media = _spoken_round(split, rng)
    rounds = [(choose(rng, instructions("spoken_vqa", unseen)), said.answer)]
    return _record("spoken_vqa", tags, rounds, language.spoken(said.text), **media)


def _asr_image(split, rng, unseen):
    said, tags, media = _spoken_round(split, rng)
    words = language.spoken(said.text)
    rounds = [(choose(rng, instructions("asr", unseen)), words)]
    return _record("asr", tags, rounds, words, **media)


def _spoken_round(split, rng):
    """A spoken round of a dialogue, its tags, and its picture and sound."""
    dialogue = choose(rng, split.dialogues)
    i = choose(rng, [i for i, voice in enumerate(dialogue.voices) if voice])
    said, voice = dialogue.rounds[i], dialogue.voices[i]
    tags = question_tags(said, dialogue.picture.scene)
    tags += ("unseen_voice",) * voice.unseen
    speech = f"visdial/speech/{split.name}/{speech_name(dialogue, i)}"
    return said, tags, {"image": _image(split, dialogue.picture), "speech": speech}


def _video_caption(split, rng, unseen):
    video = choose(rng, split.videos)
    asked = choose(rng, instructions("video_caption", unseen))
    rounds = [(asked, language.video_caption(video.clip, rng))]
    path = f"msrvtt/{video_path(split, video)}"
    return _record("video_caption", video.tags, rounds, video=path)


def _video_question(split, rng, unseen):
    video = choose(rng, split.videos)
    asked = questions.ask_clip(video.clip, rng, unseen)
    path = f"msrvtt/{video_path(split, video)}"
    return _record("vqa", (*video.tags, asked.kind), [(asked.text, asked.answer)], video=path)


_RECORDS = {
    "caption": _caption,
    "vqa": _vqa,
    "dialogue": _dialogue,
    "asr": _asr,
    "asr_image": _asr_image,
    "spoken_vqa": _spoken_vqa,
    "video_caption": _video_caption,
    "video_question": _video_question,
}
