"""Images and labels on disk as tensors: one data set class, endless seeded iteration, and the checks before a run."""
from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from lib.datasets.description import (
    Description,
    label_path,
    label_table,
    list_images,
    read_image,
    read_label,
    select_classes,
)
from lib.datasets.transforms import Transform
from lib.errors import UserError

LISTED = 20  # problems shown in one message


class Sample(NamedTuple):
    image: object   # float32 [3, H, W]; in a batch [N, 3, H, W]
    label: object   # int64 [H, W]: class index or ignore
    name: str       # file name without its ending
    size: tuple     # (width, height) of the image file


class ImageFolder(Dataset):
    """One set of a described data set.

    classes: the run's class names, out of ``task`` (the description whose names they are; default: this one).
    labelled=False never opens a label: training on the target must not. Items are addressed by an index, or by
    (index, draw): the draw's number seeds the augmentation, so any draw can be repeated. ignore: the value of pixels of
    no class (default: the description's).
    """

    def __init__(self, description: Description, root: str | Path, set_: str, classes: Sequence[str],
                 transform: Transform, *, task: Description | None = None, labelled: bool = True,
                 list_file: str | Path | None = None, ignore: int | None = None, seed: int = 0):
        self.description, self.root, self.set = description, Path(root), set_
        self.images = list_images(description, root, set_, list_file)
        if labelled and description.labels is None:
            raise UserError(f"the data set {description.name} has no labels, and they are needed here")
        self.labels = [label_path(description, root, image, set_) for image in self.images] if labelled else None
        self.table = label_table(description, classes, task)
        if ignore is not None:
            self.table[self.table == description.ignore] = ignore
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, draw = key if isinstance(key, tuple) else (key, key)
        image, label = self.read(index)
        x, y = self.transform(image, label, np.random.default_rng([self.seed, draw]))
        return Sample(x, y, self.images[index].stem, image.size)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray | None]:
        """The image and its label (class indices) at the size of the files. Raises UserError for a broken file."""
        label = None if self.labels is None else read_label(self.labels[index], self.description, self.table)
        return read_image(self.images[index]), label

    def truth(self, index: int) -> np.ndarray:
        """The label (class indices) of one image, at the size of its file."""
        return read_label(self.labels[index], self.description, self.table)


class EndlessSampler(Sampler):
    """Shuffled passes over ``length`` items without end: (index, draw) with draw counted over all processes.

    Batch number b of ``world`` processes takes draws b * world * batch .. (b + 1) * world * batch - 1, split by rank,
    so neither the number of workers nor a restart at batch ``start`` nor the split over processes changes the data.
    """

    def __init__(self, length: int, batch: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        self.length, self.batch, self.seed, self.start, self.rank, self.world = length, batch, seed, start, rank, world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = None, None
        for number in count(self.start):
            first = (number * self.world + self.rank) * self.batch
            for draw in range(first, first + self.batch):
                if draw // self.length != epoch:
                    epoch = draw // self.length
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                yield int(order[draw % self.length]), draw


def endless(dataset: ImageFolder, batch: int, workers: int, *, seed: int, start: int = 0, rank: int = 0,
            world: int = 1, pin: bool = False) -> Iterator[Sample]:
    """Batches without end, from batch number ``start`` on."""
    sampler = EndlessSampler(len(dataset), batch, seed, start, rank, world)
    # With a generator of its own a loader draws nothing from the run's, whose state resume.pth keeps.
    return iter(DataLoader(dataset, batch, sampler=sampler, num_workers=workers, pin_memory=pin,
                           worker_init_fn=outlive_stop, generator=torch.Generator()))


def outlive_stop(worker: int) -> None:
    """Ctrl-C, and SIGTERM from a scheduler, reach all processes of a run: loaders must live until it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # not for ever: an interpreter that ends sends SIGTERM too, and waits
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


class DomainPair(NamedTuple):
    """The data of one adaptation run."""

    source: ImageFolder
    target: ImageFolder             # without labels
    validation: ImageFolder | None  # of the target, labelled
    task: Description               # whose class names the run uses
    classes: tuple[str, ...]

    @property
    def palette(self) -> np.ndarray:
        """uint8 [C, 3]: the colours of ``classes``."""
        return self.task.palette[[self.task.classes.index(name) for name in self.classes]]

    def summary(self, size_s: object, size_t: object, target_trains: bool = True) -> dict[str, str]:
        """Rows of a run's header; the sizes are (width, height), or words."""
        return {"source": f"{len(self.source)} images of {self.source.description.name} at {size_s}",
                "target": f"{len(self.target)} images of {self.task.name} at {size_t}" if target_trains
                          else "none in training",
                "validation": "none" if self.validation is None else
                              f"{len(self.validation)} images of {self.task.name}"}


def open_pair(source: Description, target: Description, transform_s: Transform, transform_t: Transform, *,
              num_classes: int | None = None, root_s: str | None = None, root_t: str | None = None,
              set_s: str | None = None, set_t: str | None = None, set_val: str | None = None, list_s: str | None = None,
              list_t: str | None = None, ignore: int | None = None, seed: int = 0, fully: bool = False,
              allow_overlap: bool = False) -> DomainPair:
    """Source, target and validation sets of a run, checked (``fully``: every file). None: the descriptions' defaults.

    ignore: the value of source pixels of no class. A validation set that the caller did not name and that is not there
    is left out. allow_overlap: images may stand in both the training and the validation set.
    Raises UserError for everything that would disturb the run later.
    """
    classes = select_classes(target, source, num_classes)
    folder_s = ImageFolder(source, root_s or source.root, set_s or source.sets["source"], classes, transform_s,
                           task=target, list_file=list_s, ignore=ignore, seed=seed)
    folder_t = ImageFolder(target, root_t or target.root, set_t or target.sets["train"], classes, transform_t,
                           labelled=False, list_file=list_t, seed=seed + 1)
    try:
        validation = ImageFolder(target, root_t or target.root, set_val or target.sets["val"], classes, transform_t)
    except UserError:
        if set_val:
            raise
        validation = None
    for folder in (folder_s, folder_t, validation):
        if folder is not None:
            check(folder, fully)
    if validation is not None and not allow_overlap:
        both = {p.resolve() for p in folder_t.images} & {p.resolve() for p in validation.images}
        if both:
            raise UserError(f"{len(both)} images stand in both the training set ({folder_t.set}) and the evaluation "
                            f"set ({validation.set}) of {target.name}, {min(both)} among them: choose another --set, "
                            "--val-set or list")
    return DomainPair(folder_s, folder_t, validation, target, classes)


def check(dataset: ImageFolder, fully: bool = False, most: int = 50) -> None:
    """Raises UserError that lists missing labels, then files that cannot be used: among ``most`` spread over the set
    (about a second, for every start), or ``fully`` among all (``--check-data``)."""
    problems = [f"{image}: its label {label} does not exist" for image, label
                in zip(dataset.images, dataset.labels or (), strict=bool(dataset.labels)) if not label.is_file()]
    if not problems:
        count = len(dataset) if fully else min(most, len(dataset))
        problems = list(problems_of(dataset, np.unique(np.linspace(0, len(dataset) - 1, count).astype(int))))
    if problems:
        more = [f"... and {len(problems) - LISTED} more"] * (len(problems) > LISTED)
        title = (f"{dataset.description.name} ({dataset.root}, {dataset.set}) has {len(problems)} bad "
                 f"file{'s' * (len(problems) > 1)}:")
        raise UserError("\n  ".join([title, *problems[:LISTED], *more]))


def problems_of(dataset: ImageFolder, indices: Iterable[int]) -> Iterator[str]:
    """One line for each pair that cannot be trained or scored on."""
    for index in indices:
        try:
            image, label = dataset.read(int(index))
        except UserError as error:
            yield str(error)
            continue
        if label is not None and image.size != label.shape[::-1] and not dataset.description.sizes_may_differ:
            yield (f"{dataset.images[index]} is {image.size[0]}x{image.size[1]}, but its label "
                   f"{dataset.labels[index]} is {label.shape[1]}x{label.shape[0]}")
