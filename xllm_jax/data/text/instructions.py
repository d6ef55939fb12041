"""Instructions of every task, by name: the sentence that tells the LLM what to do with its input.

`INSTRUCTIONS[task]` is what a prompt may draw from; `UNSEEN_INSTRUCTIONS[task]` says the same in
words kept for tests. Tasks that bring their own question ('vqa', 'dialogue') have no entry.
"""

from __future__ import annotations

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "caption": ("请描述这张图。", "图中有什么？", "请描述图中的物体。"),
    "region": ("请描述图中的一个物体。", "请描述一个物体。"),
    "video_caption": ("请描述这个视频。", "视频中有什么？", "请描述视频的内容。"),
    "asr": ("请识别语音内容。", "请写出语音内容。", "语音的内容是什么？"),
    "spoken_vqa": ("请回答语音中的问题。", "请回答语音的问题。", "请看图回答语音中的问题。"),
    "text": ("请写一个句子。",),
}
UNSEEN_INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "caption": ("请写出图中有什么。", "请问图中有什么物体？"),
    "region": ("请写出图中的一个物体。",),
    "video_caption": ("请写出视频的内容。", "请问视频中有什么？"),
    "asr": ("请写出语音中的句子。", "请问语音的内容是什么？"),
    "spoken_vqa": ("请看图回答语音。", "语音的问题请看图回答。"),
    "text": ("请写句子。",),
}


def instructions(task: str, unseen: bool = False) -> tuple[str, ...]:
    """The instructions of a task, empty where each example brings its own question."""
    return (UNSEEN_INSTRUCTIONS if unseen else INSTRUCTIONS).get(task, ())
