"""What the world's Chinese sentences mean in English, for readers of a report.

Questions and instructions are translated as wholes, everything else word by word, so that what a
model makes up of the world's words is readable too.
"""

from __future__ import annotations

import re

from xllm_jax.data.synthetic_world.questions import ANSWER_OF, WORDINGS
from xllm_jax.data.synthetic_world.requests import COLOR, EDITS
from xllm_jax.data.synthetic_world.scene import COLORS
from xllm_jax.data.text.instructions import instructions
from xllm_jax.data.text.instructions_to_draw import CAPTION
from xllm_jax.data.text.instructions_to_draw import WORDINGS as REQUESTS

PLACES = {
    "左上": "top left",
    "上面": "top center",
    "右上": "top right",
    "左边": "middle left",
    "中间": "center",
    "右边": "middle right",
    "左下": "bottom left",
    "下面": "bottom center",
    "右下": "bottom right",
}
WORDS = PLACES | {
    "红色": "red",
    "绿色": "green",
    "蓝色": "blue",
    "黄色": "yellow",
    "紫色": "purple",
    "白色": "white",
    "圆形": "circle",
    "方形": "square",
    "三角形": "triangle",
    "星形": "star",
    "十字形": "cross",
    "大": "big",
    "小": "small",
    "大的": "big",
    "小的": "small",
    "物体": "object",
    "两个物体": "two objects",
    "三个物体": "three objects",
    "个物体": "objects",
    "它": "it",
    "一个": "one",
    "两个": "two",
    "三个": "three",
    "在": "at",
    "在图中": "in the picture at",
    "有": "there is",
    "没有": "no",
    "是": "is",
    "不是": "is not",
    "一样": "the same",
    "不一样": "not the same",
    "的": "",
    "图中": "in the picture",
    "图中有": "the picture has",
    "图中一共有": "in all the picture has",
    "这张图的": "in this picture",
    "这里": "here",
    "这里的": "the",
    "这里有": "here there is",
    "视频中": "in the video",
    "视频中有": "the video has",
    "这个视频中": "in this video",
    "颜色": "color",
    "形状": "shape",
    "大小": "size",
    "位置": "place",
    "什么": "what",
    "哪种": "which",
    "哪里": "where",
    "哪个": "which",
    "几个": "how many",
    "多少": "how many",
    "多大": "how big",
    "更大": "bigger",
    "一共有": "in all there are",
    "请问": "please:",
    "还是": "or",
    "和": "and",
    "有没有": "is there",
    "是不是": "is it",
    "怎么了": "what happens",
    "向左移动": "moves left",
    "向右移动": "moves right",
    "向上移动": "moves up",
    "向下移动": "moves down",
    "变大": "grows",
    "变小": "shrinks",
    "闪烁": "blinks",
    "消失": "disappears",
    "变色": "changes color",
    "从": "from",
    "变成": "turns",
    "第一帧": "first frame:",
    "第二帧": "second frame:",
    "第三帧": "third frame:",
    "第四帧": "fourth frame:",
    "，": ",",
    "。": ".",
    "？": "?",
    "吗": "",
}
QUESTIONS = {
    "color": "What color is {x}?",
    "shape": "What shape is {x}?",
    "place": "Where is {x}?",
    "size": "Is {x} big or small?",
    "count": "How many objects are there?",
    "existence": "Is there a {v}?",
    "bigger": "Which is bigger, {a} or {b}?",
    "same": "Do {a} and {b} have the same {v}?",
    "yesno": "Is {x} {v}?",
    "motion": "What happens to the object?",
}
INSTRUCTIONS = {
    "caption": "Describe the picture.",
    "region": "Describe one object of the picture.",
    "video_caption": "Describe the video.",
    "asr": "Write down what is said.",
    "spoken_vqa": "Answer the spoken question.",
    "text": "Write a sentence.",
}
# What may stand in a question's places: names of objects, values, whole attributes.
_NAME = "[^有没在是哪什么还和请吗一样]+"
_PLACED = re.compile(f"({'|'.join(PLACES)})的(?!一个)")
_LONGEST = re.compile("|".join(sorted(map(re.escape, WORDS), key=len, reverse=True)) + "|.", re.S)
_HAN = re.compile("[\u3400-\u9fff]")
_LEAST = 0.5  # of the characters have to be known


def gloss(text: str) -> str:
    """The text in English; '' for a text that is not Chinese, or not of the world's words."""
    text = text.strip()
    if not _HAN.search(text):
        return ""
    return _whole(text) or _words(text)


def _whole(text: str) -> str:
    """The meaning of an instruction or a question, '' for anything else."""
    for task, meaning in INSTRUCTIONS.items():
        if text in (*instructions(task), *instructions(task, unseen=True)):
            return meaning
    if asked := _request(text):
        return asked
    spoken = text.rstrip("？。").replace("，", "")
    for kind, (seen, unseen) in WORDINGS.items():
        for wording in (*seen, *unseen):
            found = re.fullmatch(_pattern(wording, kind), spoken)
            if found:
                named = {key: _meaning(key, words) for key, words in found.groupdict().items()}
                return QUESTIONS[kind].format_map(named)
    return ""


def _request(text: str) -> str:
    """The meaning of a request to draw, '' for anything else."""
    for wording in EDITS:
        before, after = wording.split(COLOR)
        color = text.removeprefix(before).removesuffix(after)
        if color in COLORS and text == f"{before}{color}{after}":
            return f"draw the same picture, but {WORDS[color]}"
    words = (one.removesuffix(CAPTION) for one in REQUESTS["zh"].requests)
    for before in sorted(words, key=len, reverse=True):
        if text.startswith(before):
            return f"draw: {_words(text.removeprefix(before))}"
    return ""


def _pattern(wording: str, kind: str) -> str:
    """A wording without punctuation, as a pattern with one group for every place."""
    plain = wording.rstrip("？").replace("，", "")
    value = "|".join(ANSWER_OF.values()) if kind == "same" else _NAME
    plain = plain.replace("{v}", f"(?P<v>{value})")
    return re.sub(r"\{(\w)\}", rf"(?P<\1>{_NAME})", plain)


def _meaning(key: str, text: str) -> str:
    """What stands in a question's place: a value (v), or the name of an object."""
    return _words(text) or text if key == "v" else _name(text)


def _name(text: str) -> str:
    """A name of an object, such as 左上的物体, 红色物体 or 它."""
    placed = re.fullmatch(f"({'|'.join(PLACES)})的物体", text)
    if placed:
        return f"the object at {PLACES[placed.group(1)]}"
    meaning = _words(text) or text
    return meaning if text == "它" else f"the {meaning}"


def _words(text: str) -> str:
    """Word by word; '' where too few of them are known."""
    pieces = _LONGEST.findall(_PLACED.sub(r"在\1", text))
    known = sum(len(piece) for piece in pieces if piece in WORDS)
    if known < _LEAST * len(text):
        return ""
    said = [WORDS[piece] if piece in WORDS else piece.strip() for piece in pieces]
    words = " ".join(word for word in said if word)
    return re.sub(r" ([,.?])", r"\1", words)
