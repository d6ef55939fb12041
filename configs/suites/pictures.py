r"""Drawn pictures: FID, CLIP score and R@1 over COCO's Karpathy test split.

    xllm evaluate --suite=pictures --output=results/pictures \
        --config.drawn=drawings --config.clip=bases/clip

`drawn` holds NAME.png for each sample NAME, and NAME.npz where projected embeddings are to be
looked at; `wanted` then holds those of the captions. ':tiny' takes the demo's world.
"""

from xllm_jax.core.stage import Source
from xllm_jax.core.suite import PictureSuite


def get_config(size: str = "real") -> PictureSuite:
    """The suite: size 'tiny' is the demo's world."""
    root, title = ("demo/world", "the world") if size == "tiny" else ("data", "COCO, Karpathy test")
    return PictureSuite(root=root, sets={"coco": Source("coco", "coco", "test")},
                        titles={"coco": title})  # fmt: skip
