"""Names of tensors without what a trainer put around the model: DDP, FSDP, Lightning and others.

`DistributedDataParallel` saves every name behind `module.`, `torch.compile` behind `_orig_mod.`,
FSDP and activation checkpointing write theirs into the middle of a name, and a Lightning module
has the network as `model.`, with what else it holds beside it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

from xllm_jax.convert import Drop
from xllm_jax.convert.files import Checkpoint

WRAPPERS = (
    "module",
    "_module",
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
"""Words that stand for no part of a network, wherever they are in a name."""
HOLDERS = ("model", "net", "network", "_model", "student", "backbone")
HOLDERS += ("state_dict", "state", "model_state_dict", "model_state", "checkpoint")
AVERAGES = ("model_ema", "ema_model", "ema", "_ema_model")
"""What names begin with where the network is an attribute of what was saved."""
DROP = (
    Drop(
        rf"({'|'.join(AVERAGES)})\..*", "a moving average of the weights that the file holds, too"
    ),
    Drop(r"n_averaged", "a counter of a moving average"),
)


def unwrapped(opened: Checkpoint, recognize: Callable[[Checkpoint], bool]) -> Checkpoint:
    """The checkpoint under the names that a source knows.

    Args:
      opened: as it lies on the disk.
      recognize: of the source. What begins a name is left out where the source knows the tensors
        without it and does not with it.

    Returns:
      the checkpoint with `renamed` filled, or as it was where nothing had to be left out.

    Raises:
      UserError: two tensors get one name.
    """
    found = _without_wrappers(opened)
    for _ in range(4):  # 'state.model.model.' and such
        if recognize(found):
            return found
        held = next((h for h in (*HOLDERS, *AVERAGES) if _begins(found, h, recognize)), None)
        if held is None:
            return opened
        found = _without_holder(found, held)
    return found if recognize(found) else opened


def _without_wrappers(opened: Checkpoint) -> Checkpoint:
    count: collections.Counter[str] = collections.Counter()
    names = {}
    for name in opened:
        words = name.split(".")
        count.update({f"{word}." for word in words[:-1] if word in WRAPPERS})
        kept = [word for word in words[:-1] if word not in WRAPPERS]
        names[name] = ".".join([*kept, words[-1]])
    return opened.under(names, count) if count else opened


def _without_holder(opened: Checkpoint, holder: str) -> Checkpoint:
    start = f"{holder}."
    names = {name: name.removeprefix(start) for name in opened}
    count = sum(name.startswith(start) for name in opened)
    # What stands there twice is told as it stands there.
    same = next((one for one in opened.renamed if not one.replace(start, "")), "")
    told = {name: number for name, number in opened.renamed.items() if name != same}
    return opened.under(names, {**told, f"{same}{start}": count})


def _begins(opened: Checkpoint, holder: str, recognize: Callable[[Checkpoint], bool]) -> bool:
    """Whether names begin with a holder, behind which the source, or another holder, is found."""
    if not any(name.startswith(f"{holder}.") for name in opened):
        return False
    inner = _without_holder(opened, holder)
    deeper = any(name.startswith(tuple(f"{h}." for h in HOLDERS)) for name in inner)
    return recognize(inner) or deeper
