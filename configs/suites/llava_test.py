r"""LLaVA-test, the paper's Table 1: 30 images, 90 questions, a judge.

    xllm evaluate --suite=llava_test --checkpoint=runs/stage3 --output=results/llava_test \
        --config.judge.url=https://api.openai.com/v1 --config.judge.model=gpt-4
    … --config.sets.llava_test.options.captions=data/llava_test_zh    # ask in Chinese,
      --config.translation.url=… --config.translation.model=…         # and translate answers back
    … --config.judge.rules=LLaVA/llava/eval/table/rule.json           # LLaVA's own rules

Below `root`: llava_test in its layout (docs/data.md), with caps_boxes_coco2014_val_80.jsonl of the
same place beside the questions. ':tiny' takes the demo's world, whose questions are Chinese and
whose reference answers are the true ones.
"""

from xllm_jax.core.stage import Source
from xllm_jax.core.suite import JudgedSuite


def get_config(size: str = "real") -> JudgedSuite:
    """The suite: size 'tiny' is the demo's world."""
    sets = {"llava_test": Source("llava_test", "llava_test", "test")}
    if size == "tiny":
        titles = {"llava_test": "LLaVA-test of the world"}
        return JudgedSuite(root="demo/world", sets=sets, titles=titles, max_tokens=64)
    return JudgedSuite(sets=sets, titles={"llava_test": "LLaVA-test"})
