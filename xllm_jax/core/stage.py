"""Stage: the typed schema of one training stage.

Data only: configs/ fill it, training/step.py reads it.

Every field can be overridden on the command line (``--config.optimizer.peak=1e-4``,
``--config.data.mix.wukong=0``); a name that does not exist is an error.
"""

# No postponed annotations here: the command line reads the fields' types.
import dataclasses
from typing import Any

from xllm_jax.core.fields import Option, limits, numbers, of_patterns, one_of, options, within
from xllm_jax.core.lora_settings import Lora
from xllm_jax.core.output_settings import Output, Signals

# Of pictures, alone or as frames of a video, whose reader takes those of images, too.
PICTURES = {
    "size": Option(int, 1, 8192),
    "orientation": Option(str, choices=("exif", "ignore")),
    "scale": Option((float, float), 1e-6, 1),
    "flip": Option(bool),
    "patch": Option(int, 1, 8192),
    "frames": Option(int, 1, 10**4),
    "sampling": Option(str, choices=("uniform", "reference")),
    "normalization": Option(str, choices=("clip", "siglip")),
    "resample": Option(str, choices=("bicubic", "bilinear")),
}
SIZES = (
    "bins channels classes count cross_attention_frequency depth embed encoder_width features "
    "groups head_dim heads hidden image_size key_heads latent_channels length linguistic_width "
    "llm_width max_tokens out_channels output_width patch picture_channels pools queries shared "
    "stride text_width tokens unroll visual_width vocab width"
)
NONE = (  # may be 0
    "chunk kernel linguistic_blocks positions self_blocks skip types unused_blocks visual_blocks "
    "vocabulary"
)
DEEP = ("depth", "linguistic_blocks", "self_blocks", "visual_blocks")
LAYERS = 4096  # of a stack, each of which is traced or named
# Whatever a network has, it has once at least; of layers, -1 is the last.
NETWORK = numbers(
    0,
    dict.fromkeys(SIZES.split(), Option(int, 1))
    | dict.fromkeys(NONE.split(), Option(int))
    | {name: Option(int, int(name == "depth"), LAYERS) for name in DEEP}
    | {"llm_layers": Option(int, -1), "dropout": Option(float, 0, 1)},
)
SPEECH = options(
    bins=Option(int, 1, 1024),
    specaugment=Option((bool, dict)),
    vtlp=Option(float, 0, 0.25),
    features=Option(str, choices=("kaldi", "whisper")),
)


@dataclasses.dataclass
class Part:
    """One network of the model.

    Attributes:
      network: 'file.Class' under `xllm_jax/models`, such as 'vit.VisionTransformer', or
        'package.module:Class' of another package.
      size: row of that file's SIZES: 'tiny', or what the network is published as ('eva_vit_g',
        'chatglm_6b', …), for which 'real' stands in every file.
      fields: single fields of the network to set differently from that row.
      weights: how the frozen kernels of its layers are packed (`models/quantized.py`); '' = floats.
    """

    network: str = ""
    size: str = "real"
    fields: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=NETWORK)
    weights: str = one_of("", "int8", "int4", "int4_channel", "nf4")


@dataclasses.dataclass
class Route:
    """How one modality reaches the LLM: which encoder part, which interface part."""

    encoder: str = ""
    interface: str = ""


# Whatever is not a matrix.
NO_DECAY = (
    r"(.*/)?bias", r"(.*/)?.*norm.*/scale", r"(.*/)?temperature", r"(.*/)?lora_magnitude"
)  # fmt: skip


@dataclasses.dataclass
class Optimizer:
    """AdamW and its schedule; steps count optimizer updates.

    Attributes:
      schedule: 'cosine', 'linear', 'tri_stage' (warm up, hold, decay), 'epoch_cosine' (LAVIS) or
        'constant'.
      peak, minimum, warmup_from: learning rates.
      warmup_steps, hold_steps, decay_steps: lengths of the phases; cosine and linear decay
        until the stage's last step.
      clip: largest global gradient norm; 0 turns clipping off.
      accumulation: micro-batches averaged into one update.
      averaging: what weighs the same in that average: 'tokens' (every supervised token, pair or
        whatever the objective's terms are means of, wherever it stands: the update of one large
        batch), or 'micro_batches' (the paper's code: the mean of the micro-batches' means).
      no_decay: path patterns without weight decay.
    """

    schedule: str = one_of("cosine", "linear", "tri_stage", "epoch_cosine", "constant")
    peak: float = within(3e-5, 0, 1e3)
    minimum: float = within(1e-8, 0, 1e3)
    warmup_from: float = within(1e-6, -1, 1e3)
    warmup_steps: int = within(0, 0)
    hold_steps: int = within(0, 0)
    decay_steps: int = within(0, 0)
    steps_per_epoch: int = within(0, 0)
    b1: float = within(0.9, 0, 1)
    b2: float = within(0.98, 0, 1)
    eps: float = within(1e-8, 0, 1e6)
    weight_decay: float = within(0.05, 0, 1e3)
    clip: float = within(0.0, 0, 1e9)
    accumulation: int = within(1, 1, 10**6)
    averaging: str = one_of("tokens", "micro_batches")
    no_decay: tuple[str, ...] = of_patterns(NO_DECAY)


@dataclasses.dataclass
class Source:
    """One data set: a reader (file of `data/sources`), where it lies, and the reader's options.

    Attributes:
      reader: file of `data/sources`.
      path: file or folder, below `data.root` unless it is absolute.
      split: 'train', 'val' or 'test'.
      options: of the reader.
      allow_paths: folders that its files may lie in, too; else they lie below `data.root`, in the
        source's own folder, or where its options say (`data/media/reach.py`).
      share: of its records that take part, the first ones in the reader's order; one at least.
    """

    reader: str = ""
    path: str = ""
    split: str = "train"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    allow_paths: tuple[str, ...] = ()
    share: float = within(1.0, 1e-9, 1)


@dataclasses.dataclass
class Data:
    """The data of a stage: sources, how they are mixed, and the static shapes of a batch.

    Attributes:
      root: folder that relative source paths start from.
      sources: {name: Source}.
      mix: {name: weight}; 0 leaves a source out. Weights are relative numbers of examples; where
        none is given, every other source takes part by its size.
      batch_format: what a batch looks like: a file of `data/batching` with a class `Format`, or
        'package.module:Class' of another package.
      template: of the prompt, a row of `data/text/templates.py`, or 'package.module:NAME'.
      llm_family: of the LLM, a file of `data/text/llm_families/`, or 'package.module:Class'.
      tokenizer: folder of the LLM's tokenizer.
      characters: file of the ASR model's character vocabulary, one a line.
      vocabulary: WordPiece vocab.txt of the Q-Former's text branch.
      examples: examples per micro-batch over all hosts.
      rows: rows they are packed into (formats that pack).
      length: tokens per row.
      answers: supervised tokens per row.
      items: {modality: media items per row}.
      embeddings: {modality: embeddings that one item takes in the prompt}; the largest token count
        for speech.
      signals: {modality: its signal tokens}, of modalities that answers may be in.
      caption_tokenizer: folder of the tokenizer of these answers' text encoder, and
        `caption_length`, tokens of a caption for it.
      frames: largest number of filterbank frames, one entry per length bucket, ascending. A batch
        holds examples of one bucket; those without speech belong to the first.
      characters_length: largest transcript in characters, the end token included.
      text_length: tokens of a caption for the Q-Former's text branch.
      image: options of the image processor (size, crop scale, flip, orientation, normalization …).
      video: options of the video reader (frames …).
      speech: options of the filterbanks (bins, features: Kaldi's or Whisper's), SpecAugment and
        the largest change of the vocal tract's length (vtlp).
      modalities: {name: 'package.module:NAME' of its record} of modalities beyond image, video and
        speech, see `data/media/modality.py`.
      options: {name: its options} of those modalities.
      libraries: 'same' stops a run that resumes, or takes a cache, where another version of a
        library made the pixels and samples until then; 'any' goes on and says so.
      speech_features: '' reads sounds; 'cif' `.npy` files of what CIF has made, a vector a token.
      speech_width: numbers of such a vector.
      threads: decoding threads per host.
      deadline: seconds that reading one file may take; then it is quarantined and its decoder, a
        process, is replaced. 0 decodes in threads of the training process, without a deadline, and
        takes 0.7 times the CPU time for an image of 224 pixels.
      cache: folder of launch/cache.py with the outputs of what is frozen; '' computes them.
      memory: gigabytes that decoding one file may take in such a process.
      waiting: gigabytes of batches that a host decodes ahead; one batch at least.
      max_bad_share: the run stops when a larger share of records could not be read.
    """

    root: str = ""
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    mix: dict[str, float] = dataclasses.field(default_factory=dict, metadata=limits(0, 1e12))
    batch_format: str = "conversation"
    template: str = "chatglm_zh"
    llm_family: str = "glm"
    tokenizer: str = ""
    characters: str = ""
    vocabulary: str = ""
    examples: int = within(8, 1, 10**6)
    rows: int = within(8, 1, 10**6)
    length: int = within(128, 1, 10**6)
    answers: int = within(64, 1, 10**6)
    items: dict[str, int] = dataclasses.field(default_factory=dict, metadata=limits(0, 10**6))
    embeddings: dict[str, int] = dataclasses.field(default_factory=dict, metadata=limits(1, 10**6))
    signals: dict[str, Signals] = dataclasses.field(default_factory=dict)
    caption_tokenizer: str = ""
    caption_length: int = within(77, 2, 10**5)
    frames: tuple[int, ...] = within((1600,), 1, 10**7)
    characters_length: int = within(64, 1, 10**6)
    text_length: int = within(32, 1, 10**6)
    image: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=options(**PICTURES))
    video: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=options(**PICTURES))
    speech: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=SPEECH)
    modalities: dict[str, str] = dataclasses.field(default_factory=dict)
    options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    libraries: str = one_of("same", "any")
    speech_features: str = one_of("", "cif")
    speech_width: int = within(512, 1, 10**6)
    threads: int = within(4, 1, 4096)
    deadline: float = within(0.0, 0, 86400)
    cache: str = ""
    memory: float = within(2.0, 0.01, 1e5)
    waiting: float = within(4.0, 0, 1e5)
    max_bad_share: float = within(0.01, 0, 1)


@dataclasses.dataclass
class Divergence:
    """What happens when a loss or a gradient is not a number, or leaps (docs/telemetry.md).

    Attributes:
      nonfinite: 'stop', or 'skip': the update of that micro-batch is left out.
      spike: 'ignore', 'stop' or 'skip'.
      factor: a spike is a loss or gradient norm above `factor` times its running median.
      window: applied micro-batches that the median is taken over; a spike is seen from `window` on.
      most_skipped: more skipped micro-batches than this stop the run.
    """

    nonfinite: str = one_of("stop", "skip")
    spike: str = one_of("ignore", "stop", "skip")
    factor: float = within(10.0, 1, 1e12)
    window: int = within(100, 1, 10**6)
    most_skipped: int = within(10, 0)


@dataclasses.dataclass
class Best:
    """Which checkpoint is kept in addition to the last ones.

    Attributes:
      metric: scalar of the training step, its mean since the checkpoint before, or one of the
        held-out data such as 'validation/cer', of checkpoints that were measured; '' keeps none.
      lowest: the lowest value is the best one (loss, CER); False keeps the highest (accuracy).
    """

    metric: str = ""
    lowest: bool = True


@dataclasses.dataclass
class Validation:
    """What a run measures now and then and never learns from (docs/telemetry.md).

    Attributes:
      sources: {name: Source}, read from `data.root` with the settings of `data`, not augmented.
      mix: {name: weight} as in `data.mix`; empty means every source by its size.
      examples: how many of their examples, always the same ones; 0 takes all.
      every: micro-batches between two measurements; the last one is measured too. 0 = never.
      metrics: metrics of the task in addition to the losses: 'cer' in stage 1, speech, or
        'cer_untagged', which leaves out tags such as <NOISE>.
    """

    sources: dict[str, Source] = dataclasses.field(default_factory=dict)
    mix: dict[str, float] = dataclasses.field(default_factory=dict, metadata=limits(0, 1e12))
    examples: int = within(256, 0)
    every: int = within(0, 0)
    metrics: tuple[str, ...] = ()


@dataclasses.dataclass
class Stage:
    """One training stage.

    Attributes:
      name: used in logs and checkpoints.
      parts: {name in the parameter tree: Part}.
      modalities: {name: Route}, in any number.
      outputs: {modality: Output}, as `data.signals`.
      init: {part or subtree: where its parameters come from}: 'DIR' (a run or a converted base; the
        subtree of the same name), 'DIR:other_subtree', or '' for fresh parameters. A '*' at the end
        takes what the source has, draws what it lacks and drops what the model lacks.
      trainable: path patterns of what trains; everything else is frozen.
      lora: adapters of frozen kernels, which train in addition to that.
      objective: file of `objectives/`.
      options: options of the objective.
      steps: optimizer updates in all.
      mesh: {axis: size} over 'data', 'fsdp' and 'tensor'; -1 takes the devices that are left.
      slices: {axis: over how many slices, or nodes, it reaches}, 'data' or 'fsdp'; `mesh` is the
        mesh of one slice. Their product is the number of slices.
      compute: dtype of the activations; `frozen`: dtype in which frozen parameters are kept.
      remat: what layers compute again in the backward pass: 'none', 'products' (all but the results
        of matrix products with parameters) or 'all'.
      offload: path patterns of frozen parameters that stay in the memory of the chips' hosts; the
        kernels of the LLM's and the vision encoder's layers are copied when their layer runs, all
        else whole.
      unroll: layers unrolled per scan step (CPU only; 1 elsewhere).
      compiler: {'tpu', 'gpu' or 'cpu': {XLA option: value}} for the training step; the compiler
        refuses what it does not know.
      divergence: what happens after a loss or gradient that is not finite.
      profile: (first, last) micro-batch whose trace goes to the run's folder; () = none.
      wandb: project of Weights & Biases that the scalars also go to; '' = none.
      log_every, save_every: micro-batches between two log lines, two checkpoints.
      keep: how many of the last checkpoints are kept; `best`: which other one.
      validation: data that is measured while the stage trains.
      stall: seconds without a finished step after which the run ends, to be started again; five
        times as long before the first one, which compiles. 0 waits forever.
    """

    name: str = ""
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    modalities: dict[str, Route] = dataclasses.field(default_factory=dict)
    outputs: dict[str, Output] = dataclasses.field(default_factory=dict)
    init: dict[str, str] = dataclasses.field(default_factory=dict)
    trainable: tuple[str, ...] = of_patterns()
    lora: Lora = dataclasses.field(default_factory=Lora)
    objective: str = "answer"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    data: Data = dataclasses.field(default_factory=Data)
    steps: int = within(1000, 1)
    mesh: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"data": -1, "fsdp": 1, "tensor": 1}, metadata=limits(-1, 10**6)
    )
    slices: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"data": 1, "fsdp": 1}, metadata=limits(1, 10**6)
    )
    compute: str = one_of("bfloat16", "float32", "float16")
    frozen: str = one_of("bfloat16", "float32", "float16")
    remat: str = one_of("none", "products", "all")
    offload: tuple[str, ...] = of_patterns()
    unroll: int = within(1, 1, 10**4)
    compiler: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    seed: int = within(0, 0, 2**31 - 1)
    log_every: int = within(10, 1)
    save_every: int = within(500, 1)
    keep: int = within(2, 1, 10**6)
    divergence: Divergence = dataclasses.field(default_factory=Divergence)
    profile: tuple[int, ...] = within((), 1)
    wandb: str = ""
    best: Best = dataclasses.field(default_factory=Best)
    validation: Validation = dataclasses.field(default_factory=Validation)
    stall: float = within(600.0, 0, 10**7)
