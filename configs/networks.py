"""The networks of X-LLM as Parts, at the real size and as the embedded world's miniature.

`size` is 'real' or 'tiny' everywhere, and a Part names the row of its network's SIZES: what the
network is published as, or 'tiny'. A stage's config picks the parts it needs. Widths that two
networks must agree on are stated here once.
"""

from xllm_jax.core.chips import WHOLE_PRODUCTS
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Output, Part, Route, Signals

# The miniature's fields that depend on its vocabulary files rather than on a SIZES row.
TINY_VOCABULARY = 576
TINY_CHARACTERS = 128
# Tokens of <Image> and </Image>, of <Video> and </Video>, of <Speech> and </Speech>.
TINY_TAGS = ((5, 6), (7, 8), (9, 10))
# One of them is in each instruction to write down what is heard, and in no other about speech.
TINY_REPEATING = (430, 450)
TINY_MASK = 177  # [MASK]
TINY_LLM_WIDTH = 128
TINY_LLM = {
    "vocab": TINY_VOCABULARY,
    "width": TINY_LLM_WIDTH,
    "depth": 5,
    "heads": 4,
    "hidden": 512,
    "alpha": 10**0.5,
}
# As many embeddings as the mini-GLM needs words for a scene: with 8 it underfits badly.
TINY_QUERIES = 24
TINY_SPEECH_TOKENS = 24
TINY_FRAMES = (256, 416)

# Ids of the signal tokens begin where those of the LLM's tokenizer end.
FIRST_SIGNAL = {"real": 130_344, "tiny": 521}
# Four in NExT-GPT. A state of the mini LLM tells one word, so it gets one for each of a caption.
SIGNALS = {"real": 4, "tiny": 21}
TINY_CAPTION = 32  # tokens, and as many embeddings, for the mini text encoder
TINY_CAPTION_VOCABULARY = 683
# Channels of the mini autoencoder's levels: 24 x 24 x 4 latents of 96 pixels. What it ships with
# has a scaling of its own, 1 / the deviation of its latents.
TINY_AUTOENCODER = {"channels": (16, 24, 32)}
TINY_SCALING = 0.5858968478617607

DECODER = "bases/image_decoder"  # text encoder, UNet and autoencoder of a diffusion model

MODALITIES = {
    "image": Route("vision_encoder", "image_interface"),
    "video": Route("vision_encoder", "video_interface"),
    "speech": Route("speech_encoder", "speech_interface"),
}


def llm(size: str) -> Part:
    """ChatGLM-6B, or the mini-GLM that was pre-trained on the world's text."""
    return Part("glm.ChatGLM", _row(size, "chatglm_6b"), dict(TINY_LLM) if size == "tiny" else {})


def pseudo_interfaces(size: str) -> Part:
    """What stands in for interfaces while the mini-GLM is pre-trained."""
    return Part("pseudo_interface.PseudoInterfaces", size)


def vision_encoder(size: str) -> Part:
    """EVA ViT-g, shared by images and video frames."""
    return Part("vit.VisionTransformer", _row(size, "eva_vit_g"))


def visual_interface(size: str) -> Part:
    """Q-Former and linear adapter; image and video have one each."""
    return Part("interfaces.QFormerInterface", _row(size, "blip2"), _adapter(size))


def speech_encoder(size: str) -> Part:
    """Convolutional front-end and conformer."""
    return Part("conformer.SpeechEncoder", _row(size, "cif_asr"))


def speech_interface(size: str) -> Part:
    """CIF, C-Former and linear adapter."""
    return Part(
        "speech_interface.SpeechInterface",
        _row(size, "x_llm"),
        {"adapter_relu": False, **_adapter(size)},
    )


def asr_decoder(size: str) -> Part:
    """The decoder of the stage-1 ASR model."""
    fields = {"vocab": TINY_CHARACTERS} if size == "tiny" else {}
    return Part("asr.ASRDecoder", _row(size, "cif_asr"), fields)


def signal_tokens(size: str) -> Part:
    """Rows of the LLM's tables for the tokens that stand for pictures in its answers."""
    fields = {"width": TINY_LLM_WIDTH} if size == "tiny" else {}
    return Part("outputs.signal_tokens.SignalTokens", _row(size, "chatglm_6b"), fields)


def image_projection(size: str) -> Part:
    """NExT-GPT's output projection for Stable Diffusion 1.5, or the miniature's."""
    if size == "tiny":
        fields = {"queries": TINY_CAPTION, **_adapter(size)}
        return Part("outputs.projection.InOrderProjection", size, fields)
    return Part("outputs.projection.TransformerProjection", "stable_diffusion_1")


def text_encoder(size: str) -> Part:
    """The text encoder of Stable Diffusion 1.5, or the miniature's."""
    tiny = {"positions": TINY_CAPTION, "vocabulary": TINY_CAPTION_VOCABULARY}
    return Part("clip_text.ClipText", _row(size, "clip_vit_l_14"), tiny if size == "tiny" else {})


def autoencoder(size: str, trained: bool = False) -> Part:
    """The autoencoder of Stable Diffusion 1.5, or the miniature's; `trained` is what ships."""
    fields = dict(TINY_AUTOENCODER) if size == "tiny" else {}
    if size == "tiny" and trained:
        fields["scaling"] = TINY_SCALING
    return Part("outputs.autoencoder.Autoencoder", _row(size, "stable_diffusion_1_5"), fields)


def unet(size: str) -> Part:
    """The UNet of Stable Diffusion 1.5, or the miniature's."""
    return Part("outputs.unet.UNet", _row(size, "stable_diffusion_1_5"))


def signals(size: str, runs: int) -> Signals:
    """The signal tokens of pictures, with places for so many in a row."""
    return Signals(FIRST_SIGNAL[size], SIGNALS[size], runs)


def image_output() -> Output:
    """How answers hold pictures."""
    return Output("image_projection", "text_encoder", DECODER)


def _row(size: str, published: str) -> str:
    return "tiny" if size == "tiny" else published


def _adapter(size: str) -> dict:
    return {"llm_width": TINY_LLM_WIDTH} if size == "tiny" else {}


def pretraining_interface(size: str) -> Part:
    """The image interface with the Q-Former's text branch and BLIP-2's stage-1 heads."""
    fields = {"vocabulary": 128} if size == "tiny" else {}
    return Part("blip2_pretraining.ContrastModel", _row(size, "blip2"), fields)


def is_tiny(size: str) -> bool:
    """Whether a config was asked for its miniature (`configs/x.py:tiny`).

    Raises:
      UserError: neither 'real' nor 'tiny'.
    """
    if size not in ("real", "tiny"):
        raise UserError(f"unknown size {size!r}", field="--config=FILE:SIZE", hint="real or tiny")
    return size == "tiny"


def whole_products() -> dict:
    """Compiler options with which products read gathered parameters whole.

    By itself XLA cuts such a product into one a chip, to send while it computes: stage 1, speech,
    got 13,379 messages a step instead of 550, a quarter more memory traffic, and stage 2, image,
    8 % more cycles (docs/preflight.md). Gatherings run beside other products all the same.
    """
    return {platform: dict(options) for platform, options in WHOLE_PRODUCTS.items()}


def numerics(size: str, remat: str = "none") -> dict:
    """Dtypes, scan options and mesh: bfloat16 on accelerators; the miniature runs on any CPU.

    Parameters are split over all devices, since the frozen ones alone would fill a chip. Layers
    keep what their backward pass needs: to compute them again would be a quarter more work
    (docs/preflight.md).

    Args:
      size: 'real' or 'tiny'.
      remat: what layers compute again at the real size, see `Stage.remat`.
    """
    if size == "tiny":
        return {"compute": "float32", "frozen": "float32", "unroll": 8, "log_every": 20}
    mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    return {
        "compute": "bfloat16",
        "frozen": "bfloat16",
        "remat": remat,
        "mesh": mesh,
        "compiler": whole_products(),
    }
