"""The networks that ship with the package, small, with their converters' tables."""

from __future__ import annotations

from xllm_jax.configs import networks
from xllm_jax.conformance.subject import Subject
from xllm_jax.convert.sources import (
    bert,
    blip2,
    chatglm,
    cif_asr,
    clip_vision,
    eva_vit,
    llama,
    llava,
    siglip,
    whisper,
)
from xllm_jax.core.stage import Part
from xllm_jax.models.conformer import SpeechEncoder
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.speech_interface import SpeechInterface

FAMILY = "causal.Causal"
SHARED = {
    r"(.*/)?embeddings/words": "the Q-Former reads no text here",
    r"(.*/)?embeddings/positions": "the Q-Former reads no text here",
}
SPEECH_SHARED = {
    r"(.*/)?cif/dense/kernel": "of a CIF without a convolution",
    r"(.*/)?cif/output/kernel": "of a CIF that projects",
    r"(c_former/)?(.*/)?embeddings/words": "the C-Former reads embeddings",
    r"(c_former/)?(.*/)?pooler/kernel": "the C-Former has no pooler",
}


def subjects() -> dict[str, Subject]:
    """{name: subject}."""
    return {
        "llm": Subject(networks.llm("tiny"), lambda n: chatglm.rows(n.depth, n.heads)),
        "llama": _causal(),
        "qwen2": _causal(qkv_bias=True, tied=True),
        "qwen3": _causal(head_norms=True, head_dim=48),
        "glm4": _causal(qkv_bias=True, sandwich=True, rotary_share=0.5),
        "vision_encoder": Subject(
            networks.vision_encoder("tiny"), lambda n: eva_vit.rows(n.depth, n.heads)
        ),
        "clip_vision": Subject(
            Part("clip_vision.ClipVision", "tiny"), lambda n: clip_vision.rows(n.depth, n.heads)
        ),
        "siglip": Subject(
            Part("siglip.SiglipVision", "tiny"), lambda n: siglip.rows(n.depth, n.heads)
        ),
        "whisper": Subject(
            Part("whisper.WhisperEncoder", "tiny"), lambda n: whisper.rows(n.depth, n.heads)
        ),
        "mlp_interface": Subject(
            Part("mlp_interface.MLPInterface", "tiny"), lambda _: llava.rows()
        ),
        "perceiver": Subject(Part("perceiver.PerceiverInterface", "tiny")),
        "speech_encoder": Subject(
            networks.speech_encoder("tiny"),
            _conformer_rows,
            still=(r".*/batch_norm/(mean|variance)",),
        ),
        "visual_interface": Subject(
            networks.visual_interface("tiny"), _q_former_rows, unused=SHARED
        ),
        "speech_interface": Subject(
            networks.speech_interface("tiny"), _speech_rows, unused=SPEECH_SHARED
        ),
    }


def _causal(**fields: object) -> Subject:
    return Subject(Part(FAMILY, "tiny", fields), llama.rows)


def _conformer_rows(network: SpeechEncoder) -> tuple:
    sizes = (network.heads, network.depth, network.pools, network.channels)
    return cif_asr.encoder_rows("encoder.", "", *sizes)


def _q_former_rows(network: QFormerInterface) -> tuple:
    frequency = network.cross_attention_frequency
    rows = blip2.rows(network.depth, network.heads, frequency, "lavis", text=False)
    return (*rows, *bert.linear("opt_proj", "adapter"))


def _speech_rows(network: SpeechInterface) -> tuple:
    fires = cif_asr.cif_rows("encoder.cif.", "cif/", network.kernel)
    return (*fires, *cif_asr.interface_rows(network.depth, network.heads))
