"""Visual questions: VQA v2's validation split, whose answers are published.

    xllm evaluate --suite=vqa --checkpoint=runs/stage3 --output=results/vqa
    … --config.prompt="{question} Answer in one word."
    … --config.sets.vqav2.options.captions=data/vqav2_zh/translation --config.normalization=text

Below `root`: vqav2 in its layout (docs/data.md). ':tiny' takes the demo's world, whose questions
have one answer each.
"""

from xllm_jax.core.stage import Source
from xllm_jax.core.suite import AnswerSuite


def get_config(size: str = "real") -> AnswerSuite:
    """The suite: size 'tiny' is the demo's world."""
    if size == "tiny":
        questions = Source("visual_genome", "visual_genome", "test", {"kind": "questions"})
        return AnswerSuite(
            root="demo/world",
            sets={"questions": questions},
            titles={"questions": "questions of the world"},
            normalization="text",
        )
    sets = {"vqav2": Source("vqav2", "vqav2", "val")}
    return AnswerSuite(sets=sets, titles={"vqav2": "VQA v2 validation"})
