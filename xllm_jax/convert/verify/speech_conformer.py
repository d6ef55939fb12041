"""A recorded conformer layer: outputs, stages, statistics and gradients."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.sources.cif_asr import DROPPED, conformer_layer_rows
from xllm_jax.convert.verify import speech_wenet
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.core.types import Params
from xllm_jax.models.conformer import ConformerBlock
from xllm_jax.models.relative_attention import relative_positions


class Recorded:
    """The recorded layer as our block: its sizes, its parameters, its inputs."""

    def __init__(self, replay: Replay):
        about = replay.about()["sizes"]
        self.replay = replay
        self.sizes = dict(hidden=about["ffn"], heads=about["heads"], kernel=about["kernel"])
        self.x = replay.input("x")
        self.valid = ~replay.input("pad_mask")
        self.table = conformer_layer_rows("", "", about["heads"])
        shapes = jax.eval_shape(self.block().init, jax.random.key(0), self.x, self.valid)["params"]
        self.params, _ = import_tree(self.table, replay.weights("layer/"), shapes, drop=DROPPED)

    def block(self, **fields: Any) -> ConformerBlock:
        """Our block; like the reference it does not mask padding unless it is asked to."""
        return ConformerBlock(**self.sizes, **({"mask_padding": False} | fields))

    def run(self, valid: np.ndarray, **fields: Any) -> tuple[jax.Array, dict[str, Any]]:
        """(output, captured values)."""
        block = self.block(**fields)

        @jax.jit
        def apply(params: Params, x: jax.Array, valid: jax.Array):
            variables = {"params": params}
            extra = dict(capture_intermediates=True, mutable=["intermediates"])
            (out, _), seen = block.apply(variables, x, valid, **extra)
            return out, seen["intermediates"]

        return apply(self.params, self.x, valid)

    def gradients(
        self, **fields: Any
    ) -> tuple[jax.Array, object, jax.Array, dict[str, np.ndarray]]:
        """Output, statistics, gradient of the input and of the source's weights."""
        weights, block = self.replay.input("R"), self.block(**fields)

        def total(params, x):
            out, statistics = block.apply({"params": params}, x, self.valid)
            return (out * weights).sum(), (out, statistics)

        compute = jax.jit(jax.grad(total, (0, 1), has_aux=True))
        (to_params, to_x), (out, statistics) = compute(self.params, self.x)
        return out, statistics, to_x, export_tree(self.table, to_params)


def layer(replay: Replay) -> None:
    """The author's layer, then the other toolkit's layer put together from our parts."""
    replay.attempt(_author)
    for name in replay.names("*/pos_emb"):
        replay.attempt(speech_wenet.layer, name.removesuffix("/pos_emb"))


def _author(replay: Replay) -> None:
    recorded = Recorded(replay)
    length, width = recorded.x.shape[1:]
    # Sines and cosines, nearer than what is computed from them.
    replay.compare("pos_emb", relative_positions(length, width)[None], allowed=2e-6)
    _evaluate(replay, recorded)
    if replay.names("train_pad/*"):
        out, statistics, to_x, _ = recorded.gradients(train=True)
        statistics = statistics["convolution"]["batch_norm"]
        replay.compare("train_pad/out", out)
        replay.compare("train_pad/d_x", to_x)
        replay.compare("train_pad/bn_running_mean_after", statistics["mean"])
        replay.compare("train_pad/bn_running_var_after", statistics["variance"])


def _evaluate(replay: Replay, recorded: Recorded) -> None:
    out, _, to_x, gradients = recorded.gradients()
    replay.compare("eval_pad/out", out)
    replay.compare("eval_pad/d_x", to_x)
    for name, gradient in gradients.items():
        replay.compare(f"eval_pad/grad/{name}", gradient)
    everywhere = np.ones_like(recorded.valid)
    replay.compare("eval_nopad/out", recorded.run(everywhere, mask_padding=True)[0])
    replay.compare("eval_pad_convmasked/out", recorded.run(recorded.valid, mask_padding=True)[0])
    _, seen = recorded.run(recorded.valid)
    for theirs, ours in (
        ("ffn1", "feed_forward_in"),
        ("self_attn", "attention"),
        ("ffn2", "feed_forward_out"),
    ):
        replay.compare(f"eval_pad/stage_{theirs}", seen[ours]["__call__"][0])
    replay.compare("eval_pad/stage_conv", seen["convolution"]["__call__"][0][0])
