"""The schemas of evaluation suites: which published sets are asked, and how answers are scored.

A suite is data, as a stage is: `configs/suites/` holds one file for each, `evaluation/suites/` what
it does. `--config.only="('test_ios',)"` takes some of its sets, `--config.limit=100` a few samples.
"""

import dataclasses

from xllm_jax.core.fields import one_of, within
from xllm_jax.core.stage import Source

SECONDS = 86_400


@dataclasses.dataclass
class Suite:
    """What all suites say.

    Attributes:
      sets: {name: Source} of test sets, in the order of the report.
      titles: {name: title}; a set without one has its name.
      root: folder that the sets' paths start from.
      only: names of the sets that are taken; () takes every one that is there.
      limit: most samples of a set, spread over it; 0 takes all.
      rows: samples that are answered at a time.
      beams: hypotheses of beam search; 1 is greedy.
      max_tokens: tokens of an answer, the end token included.
      shard: samples that are kept together: what an interruption may cost.
    """

    sets: dict[str, Source] = dataclasses.field(default_factory=dict)
    titles: dict[str, str] = dataclasses.field(default_factory=dict)
    root: str = "data"
    only: tuple[str, ...] = ()
    limit: int = within(0, 0)
    rows: int = within(16, 1)
    beams: int = within(1, 1)
    max_tokens: int = within(64, 2)
    shard: int = within(64, 1)


@dataclasses.dataclass
class SpeechSuite(Suite):
    """Table 4: character error rates.

    Attributes:
      cer: in which form transcripts are compared: a name of `error_rate.FORMS`, or steps of
        `transcript_forms.STEPS` joined by '+', in their order.
      speakers: {set: regular expression over the sound file's path, whose first group is the
        speaker}; a set without one has no table of speakers.
      lengths: first lengths, in characters of the reference, of the groups behind the first one.
      instruction: what an LLM is asked; '' takes the first instruction of the task.
    """

    cer: str = "normalized"
    speakers: dict[str, str] = dataclasses.field(default_factory=dict)
    lengths: tuple[int, ...] = (6, 11, 16, 21)
    instruction: str = ""


@dataclasses.dataclass
class CaptionSuite(Suite):
    """Captions of images and videos: CIDEr-D, BLEU-4 and ROUGE-L over characters and words.

    Attributes:
      words: what cuts a text into words: 'spaces', or 'package.module:function' from a text to a
        list of words. Chinese has no spaces: 'jieba:lcut' (pip install jieba) is what AI
        Challenger's own scores were made with.
      instruction: what is asked; '' takes the first instruction of the task.
    """

    words: str = "spaces"
    instruction: str = ""


@dataclasses.dataclass
class AnswerSuite(Suite):
    """Short answers by VQA's accuracy.

    Attributes:
      normalization: 'vqa' as VQA's evaluation code does it, 'text' without letter case, spaces and
        punctuation of any language.
      prompt: what is asked, {question} in it is the question.
    """

    normalization: str = one_of("vqa", "text")
    prompt: str = "{question}"
    max_tokens: int = within(16, 2)


@dataclasses.dataclass
class JudgeSettings:
    """A judge behind any OpenAI-compatible API.

    Attributes:
      url: of the API; '' asks nobody, and scores the replies that are there.
      model: its name there.
      key_file: file that holds the key; '' takes the environment variable OPENAI_API_KEY.
      temperature, max_tokens: of a reply.
      parallel: requests under way at a time.
      timeout: seconds that a reply may take.
      attempts: failures in a row after which a question counts as unanswered.
      wait: seconds before the second attempt; each further wait is twice as long.
      rules: JSON file in the form of LLaVA's rule.json, {kind: {"role", "prompt"}}; '' takes our
        own.
      system: the system message; '' takes our own.
    """

    url: str = ""
    model: str = ""
    key_file: str = ""
    temperature: float = within(0.2, 0, 2)
    max_tokens: int = within(1024, 16)
    parallel: int = within(4, 1, 256)
    timeout: float = within(120.0, 0.1, SECONDS)
    attempts: int = within(5, 1, 100)
    wait: float = within(1.0, 0, 3600)
    rules: str = ""
    system: str = ""


@dataclasses.dataclass
class TranslationSettings:
    """How answers come back into the judge's language; nothing set leaves them as they are.

    Attributes:
      command: program that reads a JSON list of texts and writes one of as many translations.
      url, model, key_file: of an OpenAI-compatible API.
      target: language that is asked for.
    """

    command: str = ""
    url: str = ""
    model: str = ""
    key_file: str = ""
    target: str = "English"


@dataclasses.dataclass
class JudgedSuite(Suite):
    """Table 1: answers beside reference answers, read by a judge.

    Attributes:
      references: JSONL file of reference answers {"question_id", "text"}; '' takes those beside
        the questions.
      questions: JSONL file of the questions as the judge reads them; '' takes those that are asked.
      contexts: JSONL file {"image", "captions", "instances": [{"category", "bbox"}]}, what the
        judge knows of an image.
      kinds: the kinds of questions, in the order of the report.
      judge: who reads.
      translation: of the answers, before they are read.
    """

    references: str = ""
    questions: str = ""
    contexts: str = ""
    kinds: tuple[str, ...] = ("conv", "detail", "complex")
    judge: JudgeSettings = dataclasses.field(default_factory=JudgeSettings)
    translation: TranslationSettings = dataclasses.field(default_factory=TranslationSettings)
    max_tokens: int = within(512, 2)
    rows: int = within(4, 1)


@dataclasses.dataclass
class PictureSuite(Suite):
    """Drawn pictures: FID, CLIP score and R@1, with controls.

    Attributes:
      drawn: folder of drawings, NAME.png for the sample NAME, with NAME.npz beside it where the
        projected embeddings are to be looked at.
      wanted: folder of the text encoder's embeddings of the captions, NAME.npz; '' for none.
      clip: base of the CLIP whose features are taken (`xllm convert --source=clip`).
      tokenizer: folder of its tokenizer; '' takes the base's.
      batch: pictures computed at a time.
    """

    drawn: str = ""
    wanted: str = ""
    clip: str = ""
    tokenizer: str = ""
    batch: int = within(32, 1)
