"""Speech recognition on AISHELL-2 and VSDial-CN, the paper's Table 4.

    xllm evaluate --suite=asr --checkpoint=runs/stage3 --output=results/asr --config.root=data
    xllm evaluate --suite=asr --checkpoint=runs/other --output=other --baseline=results/asr

Below `root`: aishell2/AISHELL-DEV-TEST-SET/{iOS,Android,Mic}/test as AISHELL sends it, and
vsdial_cn/test-orig and vsdial_cn/test-art, each in one of the layouts of the reader `vsdial_cn`
with the split 'test'. ':tiny' takes the demo's world.
"""

from xllm_jax.core.stage import Source
from xllm_jax.core.suite import SpeechSuite

AISHELL2 = "aishell2/AISHELL-DEV-TEST-SET"
FOLDER = r"([^/\\]+)[/\\][^/\\]+$"  # the folder that a sound file lies in


def get_config(size: str = "real") -> SpeechSuite:
    """The suite: size 'tiny' is the demo's world."""
    if size == "tiny":
        return SpeechSuite(
            root="demo/world",
            sets={
                "sentences": Source("aishell", "aishell", "test"),
                "questions": Source("visdial", "visdial", "test", {"kind": "asr"}),
                "questions_image": Source("visdial", "visdial", "test", {"kind": "spoken"}),
            },
            titles={
                "sentences": "sentences (S)",
                "questions": "questions (S)",
                "questions_image": "questions (S+V)",
            },
            speakers={"sentences": FOLDER},
        )
    sets, titles = {}, {}
    for kind in ("iOS", "Android", "Mic"):
        name = f"test_{kind.lower()}"
        sets[name] = Source("aishell", f"{AISHELL2}/{kind}", "test")
        titles[name] = f"AISHELL-2 test-{kind.lower()} (S)"
    speakers = dict.fromkeys(sets, FOLDER)
    for kind in ("orig", "art"):
        for name, asked, inputs in (("", "asr", "S"), ("_image", "spoken", "S+V")):
            options = {"kind": asked}
            place = f"vsdial_cn/test-{kind}"
            sets[f"test_{kind}{name}"] = Source("vsdial_cn", place, "test", options)
            titles[f"test_{kind}{name}"] = f"VSDial-CN test-{kind} ({inputs})"
    return SpeechSuite(sets=sets, titles=titles, speakers=speakers)
