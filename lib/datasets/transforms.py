"""Paired transforms of an image and its label; randomness comes from the caller's generator, so it can be repeated."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

Labelled = tuple[Image.Image, np.ndarray | None]  # RGB image, uint8 label [H, W]


@dataclass(frozen=True)
class Pixels:
    """A pixel convention: channel order, range, mean and standard deviation."""

    bgr: bool
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


PIXELS = {
    # the networks converted from Caffe: BGR, 0..255, minus the mean, no division
    "caffe": Pixels(True, 1.0, (104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0)),
    # torchvision's: RGB, 0..1, mean and standard deviation
    "imagenet": Pixels(False, 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def to_tensor(image: Image.Image, pixels: str) -> Tensor:
    """RGB image -> float32 [3, H, W] in the named pixel convention; 0 is the mean colour."""
    p = PIXELS[pixels]
    array = np.asarray(image, dtype=np.float32)
    array = array[..., ::-1] if p.bgr else array
    array = (array * np.float32(p.scale) - np.asarray(p.mean, np.float32)) / np.asarray(p.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def to_image(tensor: Tensor, pixels: str) -> Image.Image:
    """The inverse of to_tensor, rounded to 8 bits."""
    p = PIXELS[pixels]
    array = tensor.detach().cpu().numpy().transpose(1, 2, 0) * np.asarray(p.std) + np.asarray(p.mean)
    array = (array / p.scale).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array[..., ::-1] if p.bgr else array))


def to_unit(x: Tensor, pixels: str) -> Tensor:
    """Images [N, 3, H, W] of the named pixel convention in 0..1, not normalised, in the same channel order."""
    p = PIXELS[pixels]
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (p.mean, p.std))
    return (x * std + mean) / (255 * p.scale)


def from_unit(x: Tensor, pixels: str) -> Tensor:
    """The inverse of to_unit; x is clamped to 0..1."""
    p = PIXELS[pixels]
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (p.mean, p.std))
    return (x.clamp(0, 1) * 255 * p.scale - mean) / std


def resize(image: Image.Image, label: np.ndarray | None, size: tuple[int, int]) -> Labelled:
    """To (width, height): the image bicubic, the label nearest, both as Pillow does it."""
    image = image.resize(size, Image.Resampling.BICUBIC) if image.size != size else image
    if label is not None and label.shape != size[::-1]:
        label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    return image, label


def mirror(image: Image.Image, label: np.ndarray | None) -> Labelled:
    return ImageOps.mirror(image), None if label is None else label[:, ::-1]


def crop_or_pad(image: Tensor, label: Tensor, size: tuple[int, int], corner: tuple[float, float],
                ignore: int) -> tuple[Tensor, Tensor]:
    """Cut (width, height) out, or pad with the mean colour and ``ignore`` where the image is smaller.

    image [3, H, W], label [H, W]. ``corner`` (x, y) in 0..1 places the crop, from left/top to right/bottom.
    """
    (width, height), (h, w) = size, label.shape
    pad = (0, max(width - w, 0), 0, max(height - h, 0))
    image, label = F.pad(image, pad), F.pad(label, pad, value=ignore)
    h, w = label.shape
    x, y = round(corner[0] * (w - width)), round(corner[1] * (h - height))
    return image[:, y:y + height, x:x + width], label[y:y + height, x:x + width]


@dataclass(frozen=True)
class Augment:
    """Resize to ``size`` (width, height); optionally scale by 0.5..1.5 (then crop or pad back) and mirror (p = 0.5).

    crop: (width, height) to cut out at random in the end, where the image may be smaller. short: in place of ``size``,
    which is None, a random short side from (minimum, maximum). Called with (image, label or None, generator) it gives
    (float32 [3, H, W], int64 [H, W]); without a label the second is all ``ignore``.
    """

    size: tuple[int, int] | None
    pixels: str
    random_scale: bool = False
    random_mirror: bool = False
    ignore: int = 255
    crop: tuple[int, int] | None = None
    short: tuple[int, int] | None = None

    def __call__(self, image: Image.Image, label: np.ndarray | None,
                 rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        size = self.size
        if self.short:
            factor = rng.integers(self.short[0], self.short[1] + 1) / min(image.size)
            size = round(image.width * factor), round(image.height * factor)
        if self.random_scale:
            scale = rng.uniform(0.5, 1.5)
            size = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        image, label = resize(image, label, size)
        if self.random_mirror and rng.random() < 0.5:
            image, label = mirror(image, label)
        x = to_tensor(image, self.pixels)
        if label is None:
            label = np.full((size[1], size[0]), self.ignore, np.uint8)
        y = torch.from_numpy(label.astype(np.int64))
        if self.random_scale or self.crop:
            x, y = crop_or_pad(x, y, self.crop or self.size, tuple(rng.random(2)), self.ignore)
        return x, y


class Crop(NamedTuple):
    """What RandomCrop returns; rows and cols are the places in the label file of the crop's pixels."""

    image: Tensor     # float32 [3, h, w]
    label: Tensor     # int64 [h, w]
    rows: np.ndarray  # int64, at most h
    cols: np.ndarray  # int64, at most w


@dataclass(frozen=True)
class RandomCrop:
    """A training crop of ``size`` (width, height), with ``random_scale`` at 0.5, 0.6, .. 1.5 of the image's size.

    Called with (image, label, generator, working size or None for the image's own, mine): with chance ``mine_chance``,
    where the label holds a class of ``mine``, one such class and one of its pixels are drawn, and the crop is centred
    there, shifted back inside. Images smaller than the crop are padded.
    """

    size: tuple[int, int]
    pixels: str
    random_scale: bool = False
    random_mirror: bool = False
    mine_chance: float = 0.0
    ignore: int = 255

    def __call__(self, image: Image.Image, label: np.ndarray, rng: np.random.Generator,
                 working: tuple[int, int] | None = None, mine: Sequence[int] = ()) -> Crop:
        factor = rng.integers(5, 16) / 10 if self.random_scale else 1.0
        w, h = (max(1, round(n * factor)) for n in working or image.size)
        (height, width), (cw, ch) = label.shape, self.size
        room_x, room_y = max(w - cw, 0), max(h - ch, 0)
        x, y = rng.integers(room_x + 1), rng.integers(room_y + 1)
        present = [c for c in mine if (label == c).any()]
        if present and rng.random() < self.mine_chance:
            place = rng.choice(np.flatnonzero(label == rng.choice(present)))
            x = np.clip(round((place % width + 0.5) * w / width - cw / 2), 0, room_x)
            y = np.clip(round((place // width + 0.5) * h / height - ch / 2), 0, room_y)
        n, m = min(cw, w), min(ch, h)
        step_x, step_y = image.width / w, image.height / h
        picture = image.resize((n, m), Image.Resampling.BICUBIC,
                               box=(x * step_x, y * step_y, min((x + n) * step_x, image.width),
                                    min((y + m) * step_y, image.height)))
        rows = ((np.arange(y, y + m) + 0.5) * height / h).astype(np.int64)
        cols = ((np.arange(x, x + n) + 0.5) * width / w).astype(np.int64)
        content = to_tensor(picture, self.pixels)
        if self.random_mirror and rng.random() < 0.5:
            content, cols = content.flip(2), cols[::-1].copy()
        out = torch.full((ch, cw), self.ignore, dtype=torch.int64)
        out[:m, :n] = torch.from_numpy(label[rows[:, None], cols].astype(np.int64))
        return Crop(F.pad(content, (0, cw - n, 0, ch - m)), out, rows, cols)


Transform = Callable[[Image.Image, "np.ndarray | None", np.random.Generator], tuple[Tensor, Tensor]]
