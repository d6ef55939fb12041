"""PyTorch peers of `cpu.py`: a conformer of transformers' blocks, and CIF as loops over frames.

The other peers are the modules of `stage2_image_torch.py` and transformers' LLaMA.
"""

from __future__ import annotations

from typing import Any

import torch
from stage2_image_torch import copiers
from torch import nn
from torch.nn import functional
from transformers import Wav2Vec2ConformerConfig
from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as blocks


class Conformer(nn.Module):
    """`models/conformer.SpeechEncoder` on utterances of one length.

    Args:
      sizes: a row of `conformer.SIZES`.
    """

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        width, self.pools = sizes["width"], sizes["pools"]
        config = Wav2Vec2ConformerConfig(
            hidden_size=width,
            intermediate_size=sizes["hidden"],
            num_attention_heads=sizes["heads"],
            conv_depthwise_kernel_size=sizes["kernel"],
            position_embeddings_type="relative",
            hidden_act="silu",
            hidden_dropout=0.0,
            activation_dropout=0.0,
            attention_dropout=0.0,
            conformer_conv_dropout=0.0,
            max_source_positions=500,
        )
        config._attn_implementation = "eager"  # SDPA there takes no scores by position
        taken = (sizes["bins"] - 3) // 2 + 1
        self.conv = nn.Conv2d(1, sizes["channels"], 3, stride=2)
        self.merge = nn.Linear(taken * sizes["channels"], width)
        self.project = nn.Linear(width, width)
        self.positions = blocks.Wav2Vec2ConformerRelPositionalEmbedding(config)
        self.layers = nn.ModuleList(
            blocks.Wav2Vec2ConformerEncoderLayer(config) for _ in range(sizes["depth"])
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Filterbanks `[batch, frames, bins]` to features."""
        x = functional.relu(self.conv(values[:, None]))
        x = self.merge(x.permute(0, 2, 3, 1).flatten(2))
        x = self.project(x * x.shape[-1] ** 0.5)
        table = self.positions(x)
        for number, layer in enumerate(self.layers):
            if number in self.pools:
                x = functional.max_pool1d(x.transpose(1, 2), 2).transpose(1, 2)
                table = self.positions(x)
            x = layer(x, relative_position_embeddings=table)
        return x


@torch.no_grad()
def load_conformer(model: Conformer, arrays: dict[str, torch.Tensor]) -> None:
    """Takes our parameters, `{path: leaf}`; BatchNorm's running statistics are left out."""
    dense, norm = copiers(arrays)
    model.conv.weight.copy_(arrays["front_end/conv/kernel"].T.reshape(model.conv.weight.shape))
    model.conv.bias.copy_(arrays["front_end/conv/bias"])
    dense(model.merge, "front_end/project", inputs=2)
    dense(model.project, "project")
    bounds = [0, *model.pools, len(model.layers)]
    for number, layer in enumerate(model.layers):
        group = sum(number >= pool for pool in model.pools)
        root, n = f"blocks_{group}", number - bounds[group]
        for ours, theirs in (("in", "ffn1"), ("out", "ffn2")):
            part = getattr(layer, theirs)
            norm(getattr(layer, f"{theirs}_layer_norm"), f"{root}/feed_forward_{ours}_norm", n)
            dense(part.intermediate_dense, f"{root}/feed_forward_{ours}/up", n)
            dense(part.output_dense, f"{root}/feed_forward_{ours}/down", n)
        norm(layer.self_attn_layer_norm, f"{root}/attention_norm", n)
        norm(layer.final_layer_norm, f"{root}/output_norm", n)
        attention, place = layer.self_attn, f"{root}/attention"
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            dense(getattr(attention, f"linear_{theirs}"), f"{place}/{ours}", n)
        dense(attention.linear_out, f"{place}/output", n, 2)
        attention.linear_pos.weight.copy_(arrays[f"{place}/position/kernel"][n].flatten(1).T)
        attention.pos_bias_u.copy_(arrays[f"{place}/bias_u"][n])
        attention.pos_bias_v.copy_(arrays[f"{place}/bias_v"][n])
        _load_convolution(layer.conv_module, arrays, norm, f"{root}/convolution", n)


def _load_convolution(
    module: nn.Module, arrays: dict[str, torch.Tensor], norm: Any, root: str, n: int
) -> None:
    norm(module.layer_norm, f"{root}/layer_norm", n)
    norm(module.batch_norm, f"{root}/batch_norm", n)
    module.depthwise_conv.weight.copy_(arrays[f"{root}/depthwise"][n].T[:, None])
    for ours, theirs in (("in", "pointwise_conv1"), ("out", "pointwise_conv2")):
        kernel = arrays[f"{root}/pointwise_{ours}/kernel"][n]
        getattr(module, theirs).weight.copy_(kernel.T[..., None])


def integrate_and_fire(
    frames: torch.Tensor, alpha: torch.Tensor, counts: torch.Tensor, threshold: float
) -> torch.Tensor:
    """CIF of training, one frame after the other, as lean as such a loop can be.

    Args:
      frames: `[batch, frames, width]`, all valid.
      alpha: `[batch, frames]` weights, scaled here to the wanted `counts` `[batch]`.
      counts: `[batch]` tokens wanted, that many fire.
      threshold: accumulated weight at which a token fires.

    Returns:
      `[batch, most tokens, width]`, zero behind each row's last.
    """
    frames, alpha = _closed(frames, alpha, counts)
    weight, state = torch.zeros_like(alpha[:, 0]), torch.zeros_like(frames[:, 0])
    tokens, fires = [], []
    for now, given in zip(frames.unbind(1), alpha.unbind(1)):
        token, fire, weight, state = _frame(now, given, weight, state, threshold)
        tokens.append(token)
        fires.append(fire)
    made, fired = torch.stack(tokens, 1), torch.stack(fires, 1)
    rows = [row[kept] for row, kept in zip(made, fired)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def recorded_integrate_and_fire(
    frames: torch.Tensor, alpha: torch.Tensor, counts: torch.Tensor, threshold: float
) -> torch.Tensor:
    """The same in the published module's form: records that each frame makes longer by a copy.

    `modules/cif_middleware.py` of MingLunHan/CIF-PyTorch reads weight and state of the frame before
    from them, and finds the tokens in the end as the entries that are not zero.
    """
    frames, alpha = _closed(frames, alpha, counts)
    batch, _, width = frames.shape
    weights = alpha.new_zeros(batch, 1)
    states = tokens = frames.new_zeros(batch, 1, width)
    for t in range(frames.shape[1]):
        before = weights[:, t], states[:, t]
        token, fire, weight, state = _frame(frames[:, t], alpha[:, t], *before, threshold)
        token = torch.where(fire[:, None], token, torch.zeros_like(token))
        weights = torch.cat([weights, weight[:, None]], dim=1)
        states = torch.cat([states, state[:, None]], dim=1)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    rows = [row[row.abs().sum(-1) != 0] for row in tokens]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _closed(
    frames: torch.Tensor, alpha: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames and scaled weights with a frame of zeros behind them, at which a backlog fires."""
    alpha = alpha * (counts / (alpha.sum(-1) + 1e-8))[:, None]
    return functional.pad(frames, (0, 0, 0, 1)), functional.pad(alpha, (0, 1))


def _frame(
    now: torch.Tensor,
    given: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    threshold: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One frame `[batch, width]` of weight `given`: (token, whether it fires, weight, state)."""
    fire = weight + given >= threshold
    used = torch.where(fire, 1.0 - weight, given)
    rest = given - used
    token = state + used[:, None] * now
    state = torch.where(fire[:, None], rest[:, None] * now, token)
    return token, fire, torch.where(fire, rest, weight + given), state
