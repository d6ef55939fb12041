"""What a stage says about adapters."""

# No postponed annotations here: the command line reads the fields' types.
import dataclasses

from xllm_jax.core.fields import within


@dataclasses.dataclass
class Lora:
    """Low-rank adapters beside kernels (`models/lora.py`); off without a rank.

    Attributes:
      rank: of every adapter.
      targets: pattern of the kernels, or of the layers that hold them, such as
        'llm/layers/attention/.*'.
      alpha: what an adapter adds is multiplied by alpha / rank.
      dropout: share of an adapter's inputs that training drops.
      dora: a trained magnitude of every output beside them (DoRA).
      init: where they come from: a run, or a folder of `xllm adapter`; '' takes those that the
        sources of `Stage.init` hold, and draws the others.
      trains: the adapters train, whatever `trainable` says; else they stay as they are.
    """

    rank: int = within(0, 0, 10**5)
    targets: str = dataclasses.field(default="", metadata={"patterns": True})
    alpha: float = within(16.0, 1e-6, 1e6)
    dropout: float = within(0.0, 0, 0.99)
    dora: bool = False
    init: str = ""
    trains: bool = True
