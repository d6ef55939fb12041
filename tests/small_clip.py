"""A folder as openai/clip-vit-base-patch16 is: tiny random networks, and a small tokenizer."""

from __future__ import annotations

from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("r", "e"), ("re", "d</w>"), ("b", "a"), ("l", "l</w>"), ("ba", "ll</w>")]
POSITIONS = 12  # so that long captions are cut
SIDE = 32


def vocabulary() -> dict[str, int]:
    """Pieces of the tokenizer: bytes, bytes that end a word, merges, start and end."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{one}</w>" for one in letters), *map("".join, MERGES), START, END]
    return {piece: number for number, piece in enumerate(pieces)}


def write(folder: Path, old: bool = True):
    """Writes the folder and returns transformers' model.

    Args:
      folder: to be written.
      old: the configuration is one in which the end of a text has the number 2.
    """
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    pieces = vocabulary()
    text = dict(vocab_size=len(pieces), hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    text |= dict(num_attention_heads=4, max_position_embeddings=POSITIONS)
    text |= dict(eos_token_id=2 if old else pieces[END], bos_token_id=pieces[START])
    vision = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6)
    vision |= dict(image_size=SIDE, patch_size=8)
    torch.manual_seed(3)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    CLIPTokenizer(pieces, MERGES, model_max_length=POSITIONS).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder)
    return model
