"""Two sets of pictures without pairs, for image translation: A is the source, B the target.

They come from a folder with trainA, trainB, testA and testB, from folders with lists, or from described data sets.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from lib.datasets.description import Domain
from lib.datasets.folder import ImageFolder, Sample
from lib.datasets.pictures import find_pictures, open_image, read_image, spread
from lib.errors import UserError, itemized

UNIFORM = 1.0  # a crop whose grey values (0..255) deviate less from their mean than this is redrawn
REDRAWS = 20   # of a crop, before it is taken as it is: the trainers' guard on the gradient norm is the second line


def to_symmetric(image: Image.Image) -> Tensor:
    """RGB picture -> float32 [3, H, W] in -1..1."""
    array = np.asarray(image, np.float32) * np.float32(1 / 127.5) - np.float32(1)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def from_symmetric(x: Tensor) -> Image.Image:
    """The inverse, rounded to 8 bits."""
    array = ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    return Image.fromarray(array.cpu().numpy())


def short_side_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) scaled so that the shorter is ``short``."""
    return tuple(max(short, round(n * short / min(size))) for n in size)


def is_uniform(image: Image.Image) -> bool:
    """Whether a crop is so even that the gradients of stacked instance norms explode on it."""
    return bool(np.asarray(image, np.float32).std(axis=(0, 1)).max() < UNIFORM)


def draw_crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random box of (width, height) in an image; redrawn where it is uniform. Raises UserError if it does not fit."""
    if image.width < size[0] or image.height < size[1]:
        raise UserError(f"it is {image.width}x{image.height} after resizing, smaller than the crop of "
                        f"{size[0]}x{size[1]}: choose a larger size to resize to, or a smaller crop")
    for _ in range(REDRAWS):
        x, y = (int(rng.integers(n - c + 1)) for n, c in zip(image.size, size, strict=True))
        box = x, y, x + size[0], y + size[1]
        if not is_uniform(image.crop(box)):
            break
    return box


@dataclass(frozen=True)
class FlipResizeCrop:
    """UNIT's and MUNIT's: mirror (p = 0.5), short side to ``short`` (None: as it is), random crop (width, height).

    Called with (image, label or None, generator) it gives (float32 [3, h, w] in -1..1, int64 [h, w]); without a label
    the second is all ``ignore``.
    """

    short: int | None
    crop: tuple[int, int]
    mirror: bool = True
    ignore: int = 255

    def working_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) before the crop."""
        return short_side_size(size, self.short) if self.short else size

    def whole(self, image: Image.Image) -> Tensor:
        """float32 [3, h, w]: what a trained generator is shown, at the scale of training and without a crop."""
        return to_symmetric(image.resize(self.working_size(image.size), Image.Resampling.BILINEAR))

    def __call__(self, image: Image.Image, label: np.ndarray | None,
                 rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        size = self.working_size(image.size)
        mirrored = self.mirror and rng.random() < 0.5
        if mirrored:
            image = ImageOps.mirror(image)
        image = image.resize(size, Image.Resampling.BILINEAR)
        box = draw_crop(image, self.crop, rng)
        return to_symmetric(image.crop(box)), cut_label(label, size, box, mirrored, self.ignore)


MIN_SIDE = 64  # of what CycleGAN and SPGAN train on, as in UNIT and MUNIT
PREPROCESS = ("resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none")


@dataclass(frozen=True)
class Preprocess:
    """CycleGAN's and SPGAN's: resize (bicubic), random crop, mirror (p = 0.5). Called as FlipResizeCrop is.

    how: of PREPROCESS; load: (width, height) to resize to, of which scale_width uses the width; crop: (width, height).
    Where nothing is cropped the sides become multiples of 4, which the generator gives back unchanged. Raises UserError
    for a crop that the networks cannot take.
    """

    how: str
    load: tuple[int, int]
    crop: tuple[int, int]
    mirror: bool = True
    ignore: int = 255

    def __post_init__(self):
        if self.crops and any(side % 4 or side < MIN_SIDE for side in self.crop):
            raise UserError(f"--crop_size {self.crop[0]},{self.crop[1]}: sides of a crop are multiples of 4, at least "
                            f"{MIN_SIDE}")

    @property
    def crops(self) -> bool:
        return self.how.endswith("crop")

    @property
    def scale(self) -> list | None:
        """At what scale a translator trained so sees an image: ["width", n], ["size", [w, h]], None for the file's."""
        if self.how == "resize_and_crop":
            return ["size", list(self.crop)]
        return ["width", self.load[0]] if "scale_width" in self.how else None

    def working_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) before the crop."""
        if self.how == "resize_and_crop":
            return self.load
        factor = self.load[0] / size[0] if "scale_width" in self.how else 1.0
        if self.crops:
            return round(size[0] * factor), round(size[1] * factor)
        return tuple(max(4, 4 * round(n * factor / 4)) for n in size)

    def whole(self, image: Image.Image) -> Tensor:
        """float32 [3, h, w]: what a trained generator is shown, at the scale of training and without a crop."""
        size = self.crop if self.how == "resize_and_crop" else self.working_size(image.size)
        x = to_symmetric(image.resize(size, Image.Resampling.BICUBIC))
        return x[:, :size[1] // 4 * 4, :size[0] // 4 * 4]

    def __call__(self, image: Image.Image, label: np.ndarray | None,
                 rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        size = self.working_size(image.size)
        if min(size) < MIN_SIDE and not self.crops:
            raise UserError(f"at {size[0]}x{size[1]}, the size of training, it is smaller than {MIN_SIDE}x{MIN_SIDE}")
        image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
        box = draw_crop(image, self.crop, rng) if self.crops else (0, 0, *size)
        x, mirrored = to_symmetric(image.crop(box)), self.mirror and rng.random() < 0.5
        y = cut_label(label, size, box, False, self.ignore)
        return (x.flip(2), y.flip(1)) if mirrored else (x, y)


def cut_label(label: np.ndarray | None, size: tuple[int, int], box: tuple[int, int, int, int], mirrored: bool,
              ignore: int) -> Tensor:
    """int64 [h, w]: a label, mirrored, resized to ``size`` (nearest) and cut to ``box``, as its image was."""
    if label is None:
        return torch.full((box[3] - box[1], box[2] - box[0]), ignore)
    picture = Image.fromarray(label)
    if mirrored:
        picture = ImageOps.mirror(picture)
    picture = picture.resize(size, Image.Resampling.NEAREST).crop(box)
    return torch.from_numpy(np.asarray(picture).astype(np.int64))


Transform = Callable[[Image.Image, "np.ndarray | None", np.random.Generator], tuple[Tensor, Tensor]]


class Pictures(Dataset):
    """Pictures, and labels where ``labelled`` (whose images they are) has them; items as those of ImageFolder."""

    def __init__(self, images: Sequence[Path], transform: Transform, seed: int, labelled: ImageFolder | None = None):
        self.images, self.transform, self.seed, self.labelled = list(images), transform, seed, labelled

    @property
    def name(self) -> str:
        """The folder that all pictures are in or below."""
        return os.path.commonpath([path.parent for path in self.images])

    def __len__(self) -> int:
        return len(self.images)

    def check(self, check_all: bool = False, sample: int = 50) -> None:
        """Read ``sample`` pictures spread over the domain, or all. Raises UserError that lists the bad ones."""
        if len(self) < 2:
            raise UserError(f"{self.name} holds one picture: a domain needs at least two")
        indices = spread(len(self), len(self) if check_all else sample)
        if problems := list(problems_of(self, indices)):
            files = "file" if len(problems) == 1 else "files"
            raise UserError(f"{self.name} has {len(problems)} bad {files}:\n{itemized(problems)}")

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, draw = key if isinstance(key, tuple) else (key, key)
        image = read_image(self.images[index])
        label = None if self.labelled is None else self.labelled.truth(index)
        try:
            x, y = self.transform(image, label, np.random.default_rng([self.seed, draw]))
        except UserError as error:
            raise UserError(f"{self.images[index]}: {error}") from None
        return Sample(x, y, str(self.images[index]), image.size)


class Domains(NamedTuple):
    """The data of one run; the pictures of ``test`` are shown, not trained on."""

    train_a: Pictures
    train_b: Pictures
    test_a: list[Path]
    test_b: list[Path]

    def check(self, check_all: bool = False) -> None:
        """Read some pictures of each domain, or all. Raises UserError for bad ones, and for pictures in both."""
        for pictures in self[:2]:
            pictures.check(check_all)
        both = {p.resolve() for p in self.train_a.images} & {p.resolve() for p in self.train_b.images}
        if both:
            raise UserError(f"{len(both)} pictures are in both domains, {min(both)} among them: source and target must "
                            "be different sets")


def require_one_size(pictures: Pictures, batch: int) -> None:
    """Pictures that are not cropped make a batch only where all have the same size. Raises UserError."""
    sizes = {pictures.transform.working_size(open_image(path).size) for path in pictures.images}
    if len(sizes) > 1:
        raise UserError(f"{pictures.name} has pictures of {len(sizes)} sizes, which make no batch of {batch}: choose a "
                        "--preprocess that crops, or --batch_size 1")


def problems_of(pictures: Pictures, indices: Iterable[int]) -> Iterable[str]:
    for index in indices:
        try:
            pictures[index]
        except UserError as error:
            yield str(error)


def kind_of(name: str) -> str:
    """Which kind of data a flag of flags.add_domains belongs to, by its destination; "" for other flags."""
    if name == "data_root":
        return "root"
    if name.startswith(("data_folder_", "data_list_")) and name != "data_list_target":
        return "folders"
    return "described" if name in ("source", "target", "data_dir", "data_dir_target", "data_list", "data_list_target",
                                   "source_set", "set") else ""


def find_domains(*, dataroot: str | None, folders: Mapping[str, str | None], lists: Mapping[str, str | None],
                 source: tuple[str | None, ...], target: tuple[str | None, ...]) -> dict[str, list[Path]]:
    """The pictures that exactly one of these names, as "train_a", "train_b" and, where there are some, "test_a", ...

    dataroot: a folder with trainA, trainB, testA and testB. folders, lists: by "train_a", ... source, target: (JSON
    description, folder, set, list); None: the description's. Raises UserError, also for what would not be used.
    """
    kinds = [dataroot is not None, any(folders.values()), source[0] is not None or target[0] is not None]
    if sum(kinds) != 1:
        raise UserError(f"{'one kind of' if any(kinds) else 'no'} data {'only' if any(kinds) else 'given'}: "
                        "--data-root FOLDER (with trainA, trainB), --data-folder-train-a and -b, or --source and "
                        "--target with data sets")
    for key, file in lists.items():
        if file and not folders.get(key):
            flag = key.replace("_", "-")
            raise UserError(f"--data-list-{flag} has no effect without --data-folder-{flag}")
    if not kinds[2]:
        for flag, value in zip(("--data-dir", "--source-set", "--data-list", "--data-dir-target", "--set",
                                "--data-list-target"), source[1:] + target[1:], strict=True):
            if value:
                raise UserError(f"{flag} has no effect without --source and --target")
    if kinds[0]:
        root = Path(dataroot)
        lacking = [name for name in ("trainA", "trainB") if not (root / name).is_dir()]
        if lacking:
            raise UserError(f"{root}: it has no folder {' and no folder '.join(lacking)}; it should hold trainA, "
                            "trainB and, for pictures to show, testA and testB")
        folders = {f"{part}_{domain.lower()}": root / f"{part}{domain}" for part in ("train", "test")
                   for domain in "AB" if (root / f"{part}{domain}").is_dir()}
        lists = {}
    if kinds[2]:
        if source[0] is None or target[0] is None:
            raise UserError("--source and --target belong together")
        found = {}
        for key, part, (name, root, set_, list_file) in (("train_a", "source", source), ("train_b", "train", target)):
            found[key] = Domain.open(name, root, set_, list_file, part).list_images()
        return found
    for key in ("train_a", "train_b"):
        if not folders.get(key):
            raise UserError(f"there is no folder of training pictures of domain {key[-1].upper()}: give "
                            f"--data-folder-{key.replace('_', '-')}")
    return {key: find_pictures(folder, lists.get(key)) for key, folder in folders.items() if folder}


def open_domains(found: Mapping[str, list[Path]], transform_a: Transform, transform_b: Transform, seed: int,
                 labelled: ImageFolder | None = None, check_all: bool = False) -> Domains:
    """The data of a run, checked (``check_all``: every file).

    found: lists "train_a", "train_b" and optionally "test_a", "test_b" (else training pictures are shown). labelled:
    the labels of train_a. Raises UserError.
    """
    domains = Domains(Pictures(found["train_a"], transform_a, seed, labelled),
                      Pictures(found["train_b"], transform_b, seed + 1),
                      found.get("test_a") or found["train_a"], found.get("test_b") or found["train_b"])
    domains.check(check_all)
    return domains
