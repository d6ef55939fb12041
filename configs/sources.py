"""Where the data sets lie below `data.root`: the paper's (Table 5) and the embedded world's."""

import dataclasses

from xllm_jax.configs import networks
from xllm_jax.core.stage import Data, Source, Validation

WORLD = {
    "captions": Source("coco", "coco"),
    "regions": Source("visual_genome", "visual_genome", options={"kind": "regions"}),
    "questions": Source("visual_genome", "visual_genome", options={"kind": "questions"}),
    "clips": Source("msrvtt", "msrvtt"),
    "utterances": Source("aishell", "aishell"),
    "spoken_questions": Source("visdial", "visdial", options={"kind": "asr"}),
    "instructions": Source("instructions", "instructions"),
    "clip_questions": Source("instructions", "instructions", options={"modality": "video"}),
    "image_questions": Source("instructions", "instructions", options={"modality": "image"}),
    "spoken_images": Source("instructions", "instructions", options={"modality": "image+speech"}),
    "image_transcripts": Source("visdial", "visdial", options={"kind": "asr_image"}),
    "transcripts": Source("instructions", "instructions", options={"modality": "speech"}),
}

SPEECH = {
    "aishell1": Source("aishell", "aishell1"),
    "aishell2": Source("aishell", "aishell2"),
    "vsdial_cn": Source("vsdial_cn", "vsdial_cn", options={"kind": "asr"}),
}

MSRVTT = Source("msrvtt", "msrvtt")

INSTRUCTIONS = {
    "minigpt4_zh": Source("instructions", "minigpt4_zh"),
    "aishell2": Source("aishell", "aishell2"),
    "activitynet": Source("activitynet", "activitynet"),
    "vsdial_cn": Source("vsdial_cn", "vsdial_cn", options={"kind": "spoken"}),
}

# Captions as requests to draw. The answer says the caption first, as NExT-GPT's first version does:
# the frozen LLM's states at the signal tokens are then about it.
REQUESTS = {
    "cc3m": Source("requests", "cc3m", options={"reader": "cc3m", "wording": "en", "echo": True}),
}
WORLD_REQUESTS = {"requests": Source("world_requests", options={"count": 40_000, "echo": True})}
# Beside them, what is answered without a picture, about written media: the rows of signal tokens
# learn when not to be said.
WORLD_WORDS = {
    "words": Source(
        "world_text",
        options={
            "count": 20_000,
            "seed": 3,
            "spelled": 0.5,
            "shares": {"answer_scene": 0.4, "caption_scene": 0.3, "answer_speech": 0.3},
        },
    )
}
# Captions of the world's files, whose pictures a denoising loss reads.
WORLD_CAPTIONS = {
    "requests": Source("requests", "coco", options={"reader": "coco", "reply": False}),
}


def validation(sources: dict[str, Source], examples: int, every: int, *metrics: str) -> Validation:
    """The validation splits of some sources, measured every so many micro-batches.

    At the real size `every` is 0, since not everybody has these splits:
    --config.validation.every=2000 switches it on, --config.validation.mix.NAME=0 leaves a source
    out.
    """
    splits = {name: dataclasses.replace(source, split="val") for name, source in sources.items()}
    sizes = dict.fromkeys(splits, 1.0)
    return Validation(splits, sizes, examples, every, metrics)


def image_text_pairs() -> dict[str, Source]:
    """The 14M pairs of stage 2: CC3M, COCO, Visual Genome, Flickr30k, SBU, AI-Caps and Wukong."""
    own = ("cc3m", "coco", "flickr30k", "sbu", "ai_challenger", "wukong")
    return {
        **{name: Source(name, name) for name in own},
        "visual_genome": Source("visual_genome", "visual_genome", options={"kind": "regions"}),
    }


def tiny_image() -> dict:
    """Image fields of Data for the world: 96 px, and never a flip, since captions say left and
    right."""
    return {"image": {"size": 96}}


def drawn_requests(examples: int) -> Data:
    """Data of the stages that pre-train the mini diffusion model: pictures that no file holds.

    Args:
      examples: of a batch.
    """
    return Data(
        batch_format="scene_pictures",
        sources={"requests": Source("world_scenes", options={"count": 10_000_000})},
        caption_tokenizer=f"{networks.DECODER}/tokenizer",
        caption_length=networks.TINY_CAPTION,
        examples=examples,
        **tiny_image(),
    )


def described_scenes(examples: int, task: str = "attributes") -> Data:
    """Data of the stages that pre-train the mini text encoder: words and what they look like.

    Args:
      examples: of a batch.
      task: 'places' has most of the words name places.
    """
    return Data(
        batch_format="scene_descriptions",
        sources={"requests": Source("world_scenes", options={"count": 10_000_000, "task": task})},
        caption_tokenizer=f"{networks.DECODER}/tokenizer",
        caption_length=networks.TINY_CAPTION,
        examples=examples,
    )


LATENTS = "latents"


def drawn_latents(examples: int) -> Data:
    """Data of the stage that pre-trains the mini UNet: latents of such pictures, from a file.

    Args:
      examples: of a batch.
    """
    count = {"count": 49_152}
    return Data(
        root="bases",
        batch_format="scene_latents",
        sources={"requests": Source("world_scenes", LATENTS, options=count)},
        caption_tokenizer=f"{networks.DECODER}/tokenizer",
        caption_length=networks.TINY_CAPTION,
        examples=examples,
        **tiny_image(),
    )
