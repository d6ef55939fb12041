"""The same decoding and augmentation by PyTorch's DataLoader and by tf.data, for benchmarks.

Written as their users would: PIL and torch in the order of torchvision's transforms, PyAV,
soundfile and kaldi-native-fbank; TensorFlow's own operations in tf.data. Both leave out what only
ours does: prompts, packing, quarantine, exact resuming.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import av
import kaldi_native_fbank as knf
import numpy as np
import soundfile
import torch
from PIL import Image

SIZE, FRAMES, BINS, LONGEST = 224, 5, 80, 800
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
Media = list[tuple[str, str]]


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """ToTensor and Normalize of torchvision."""
    made = torch.from_numpy(np.array(picture, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
    made = made.to(torch.float32).div(255)
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    return made.sub_(mean).div_(std)


def crop(picture: Image.Image) -> Image.Image:
    """RandomResizedCrop(scale=(0.5, 1)) up to its resizing, by torchvision's rules."""
    width, height = picture.size
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(0.5, 1.0).item()
        ratio = torch.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3))).item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,)).item()
            left = torch.randint(0, width - w + 1, (1,)).item()
            return picture.crop((left, top, left + w, top + h))
    return picture


def load_image(path: str, train: bool) -> torch.Tensor:
    """`[1, 3, 224, 224]`."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    picture = crop(picture) if train else picture
    picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if train and torch.rand(1) < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(picture)[None]


def load_video(path: str, train: bool) -> torch.Tensor:
    """`[frames, 3, 224, 224]`, frames spread evenly."""
    shown = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        wanted = [(2 * part + 1) * stream.frames // (2 * FRAMES) for part in range(FRAMES)]
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                shown.append(frame.to_image())
            if number >= wanted[-1]:
                break
    return torch.stack([to_tensor(center(one)) for one in shown])


def center(picture: Image.Image) -> Image.Image:
    """Resize of the short side, and CenterCrop."""
    width, height = picture.size
    short = min(width, height)
    shape = int(SIZE * width / short), int(SIZE * height / short)
    picture = picture.resize(shape, Image.Resampling.BICUBIC)
    left, top = round((shape[0] - SIZE) / 2), round((shape[1] - SIZE) / 2)
    return picture.crop((left, top, left + SIZE, top + SIZE))


def kaldi_options() -> knf.FbankOptions:
    """80 bins, no dither."""
    options = knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.samp_freq = 0, 16_000
    options.mel_opts.num_bins, options.mel_opts.high_freq = BINS, 0
    return options


def kaldi_filterbank(samples: np.ndarray) -> np.ndarray:
    """`[frames, 80]` by kaldi-native-fbank."""
    bank = knf.OnlineFbank(kaldi_options())
    bank.accept_waveform(16_000, samples)
    bank.input_finished()
    return np.stack([bank.get_frame(number) for number in range(bank.num_frames_ready)])


def load_speech(path: str, train: bool) -> torch.Tensor:
    """`[frames, 80]`, normalized per utterance, with SpecAugment in training."""
    samples, _ = soundfile.read(path, dtype="float32")
    features = torch.from_numpy(kaldi_filterbank(samples * 32768))
    features = (features - features.mean(0)) / features.std(0, unbiased=False)
    if train:
        fill = features.mean()
        for axis, widest in ((1, 27), (1, 27), (0, 50), (0, 50)):
            width = torch.randint(0, widest, (1,)).item()
            start = torch.randint(0, features.shape[axis] - width, (1,)).item()
            features.narrow(axis, start, width).fill_(fill)
    return features


LOADERS = {"image": load_image, "video": load_video, "speech": load_speech}


class Records(torch.utils.data.Dataset):
    """Records with their media, decoded."""

    def __init__(self, records: list[Media]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> list[tuple[str, torch.Tensor]]:
        return [(kind, LOADERS[kind](path, True)) for kind, path in self.records[index]]


def collate(records: list[list[tuple[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """One tensor for each modality; utterances are padded."""
    found: dict[str, list[torch.Tensor]] = {}
    for record in records:
        for kind, values in record:
            found.setdefault(kind, []).append(values)
    made = {kind: torch.stack(values) for kind, values in found.items() if kind != "speech"}
    if "speech" in found:
        padded = torch.zeros(len(found["speech"]), LONGEST, BINS)
        for row, values in zip(padded, found["speech"]):
            row[: len(values)] = values
        made["speech"] = padded
    return made


def torch_batches(
    sources: dict[str, list[Media]], mix: dict[str, float], examples: int, workers: int = 0
) -> Iterator[Any]:
    """Endless batches of a DataLoader over the mixture."""
    records = [record for name in mix for record in sources[name]]
    weights = [mix[name] / len(sources[name]) for name in mix for _ in sources[name]]
    sampler = torch.utils.data.WeightedRandomSampler(weights, 1 << 20)
    loader = torch.utils.data.DataLoader(
        Records(records), examples, sampler=sampler, num_workers=workers, collate_fn=collate
    )
    return iter(loader)


def tensorflow_batches(kind: str, paths: list[str], examples: int) -> Iterator[Any]:
    """Endless batches of tf.data, one thread. Plain TensorFlow decodes no video.

    Raises:
      ImportError: TensorFlow is not installed.
    """
    import tensorflow as tf

    options = tf.data.Options()
    # Nothing ahead of its time: it would be charged to another contender.
    options.autotune.enabled, options.experimental_optimization.inject_prefetch = False, False
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    data = tf.data.Dataset.from_tensor_slices(paths).repeat().shuffle(len(paths))
    if kind == "image":
        data = data.map(tensorflow_image).batch(examples)
    else:
        shape = (LONGEST, BINS)
        data = data.map(tensorflow_speech).padded_batch(examples, padded_shapes=shape)
    return iter(data.with_options(options))


def tensorflow_image(path: Any, train: bool = True) -> Any:
    """`[224, 224, 3]`: only the crop is decoded, as tf.data's guide has it."""
    import tensorflow as tf

    content = tf.io.read_file(path)
    if train:
        shape = tf.io.extract_jpeg_shape(content)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros((1, 0, 4)),
            area_range=(0.5, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        pixels = tf.image.decode_and_crop_jpeg(content, window, 3, dct_method="INTEGER_ACCURATE")
        pixels = tf.image.random_flip_left_right(pixels)
    else:
        pixels = tf.io.decode_jpeg(content, 3, dct_method="INTEGER_ACCURATE")
    pixels = tf.image.resize(pixels, (SIZE, SIZE), "bicubic", antialias=True)
    return (tf.clip_by_value(pixels, 0, 255) / 255 - MEAN) / STD


def tensorflow_speech(path: Any, train: bool = True) -> Any:
    """`[frames, 80]` by Kaldi's rules, normalized, with SpecAugment in training."""
    import tensorflow as tf

    from xllm_jax.data.media import mel_filters, speech

    samples = tf.audio.decode_wav(tf.io.read_file(path)).audio[:, 0] * 32768
    frames = tf.signal.frame(samples, speech.WINDOW, speech.HOP)
    frames -= tf.reduce_mean(frames, 1, keepdims=True)
    before = tf.concat([frames[:, :1], frames[:, :-1]], 1)
    frames = (frames - 0.97 * before) * speech.povey_window()
    spectrum = tf.signal.rfft(frames, [speech.FFT])[:, : speech.FFT // 2]
    power = tf.math.real(spectrum) ** 2 + tf.math.imag(spectrum) ** 2
    energy = power @ mel_filters.triangles(BINS)
    features = tf.math.log(tf.maximum(energy, np.finfo(np.float32).eps))
    mean, variance = tf.nn.moments(features, 0)
    features = (features - mean) / tf.sqrt(variance)
    if train:
        fill, shape = tf.reduce_mean(features), tf.shape(features)
        for axis, widest in ((1, 27), (1, 27), (0, 50), (0, 50)):
            width = tf.random.uniform((), 0, widest, tf.int32)
            start = tf.random.uniform((), 0, shape[axis] - width, tf.int32)
            place = tf.range(shape[axis])
            hidden = (place >= start) & (place < start + width)
            features = tf.where(hidden[:, None] if axis == 0 else hidden[None], fill, features)
    return features
