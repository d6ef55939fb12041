"""Captions: COCO's Karpathy test split, Flickr30k, AI Challenger's validation split, MSR-VTT.

    xllm evaluate --suite=captions --checkpoint=runs/stage2_image --output=results/captions
    … --config.sets.coco.options.captions=data/coco_zh/translation    # against Chinese references
    … --config.words=jieba:lcut                                       # Chinese words, not spaces

Below `root`: coco with Karpathy's dataset_coco.json beside its images, flickr30k, ai_challenger and
msrvtt in their layouts (docs/data.md). ':tiny' takes the demo's world.
"""

from xllm_jax.core.stage import Source
from xllm_jax.core.suite import CaptionSuite


def get_config(size: str = "real") -> CaptionSuite:
    """The suite: size 'tiny' is the demo's world."""
    if size == "tiny":
        return CaptionSuite(
            root="demo/world",
            sets={
                "coco": Source("coco", "coco", "test"),
                "msrvtt": Source("msrvtt", "msrvtt", "test"),
            },
            titles={"coco": "images of the world", "msrvtt": "videos of the world"},
        )
    return CaptionSuite(
        sets={
            "coco": Source("coco", "coco", "test"),
            "flickr30k": Source("flickr30k", "flickr30k", "test"),
            "ai_challenger": Source("ai_challenger", "ai_challenger", "val"),
            "msrvtt": Source("msrvtt", "msrvtt", "test"),
        },
        titles={
            "coco": "COCO, Karpathy's test split",
            "flickr30k": "Flickr30k test",
            "ai_challenger": "AI Challenger validation",
            "msrvtt": "MSR-VTT test",
        },
    )
