"""What a stage says about answers beside text: signal tokens, and what turns them into pictures."""

# No postponed annotations here: the command line reads the fields' types.
import dataclasses

from xllm_jax.core.fields import within


@dataclasses.dataclass
class Signals:
    """The signal tokens of one modality: spare rows of the LLM's vocabulary.

    Attributes:
      first: id of the first one; the others follow it.
      count: how many make a run, which stands for one picture.
      runs: places for runs in a row of a batch.
      between: id of a word of the LLM that stands between the tokens of a run, as the tokenizer of
        NExT-GPT's second version makes it: 2 n - 1 positions are then read; -1 has none.
      pixels: side of the square pictures that a denoising loss reads beside the captions; 0 opens
        none.
    """

    first: int = within(0, 0)
    count: int = within(4, 1, 1000)
    runs: int = within(1, 1, 10**6)
    between: int = within(-1, -1)
    pixels: int = within(0, 0, 8192)

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens of a run in order, and what stands between them."""
        made = []
        for token in range(self.first, self.first + self.count):
            made += [self.between, token] if made and self.between >= 0 else [token]
        return tuple(made)


@dataclasses.dataclass
class Output:
    """How the LLM answers in one modality.

    Attributes:
      projection: part that turns its states at the signal tokens into a caption's embeddings.
      text_encoder: part that says, in training, what these should be.
      decoder: base of the networks that draw from them; '' writes the embeddings instead.
      unet, autoencoder: parts that a denoising loss goes through in training; '' has none.
      schedule: row of `schedulers.SIZES` that the UNet was trained with; '' reads the decoder's
        scheduler_config.json.
    """

    projection: str = ""
    text_encoder: str = ""
    decoder: str = ""
    unet: str = ""
    autoencoder: str = ""
    schedule: str = ""
