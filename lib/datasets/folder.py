"""Images and labels on disk as tensors: one data set class, endless seeded iteration, and the checks before a run."""
from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from lib.datasets.description import Description, Domain, MissingSet, select_classes
from lib.datasets.labels import label_table, read_label
from lib.datasets.pictures import read_image, spread
from lib.datasets.transforms import Transform
from lib.errors import UserError, itemized
from lib.files import missing_files


class Sample(NamedTuple):
    image: object   # float32 [3, H, W]; in a batch [N, 3, H, W]
    label: object   # int64 [H, W]: class index or ignore
    name: str       # file name without its ending
    size: tuple     # (width, height) of the image file


class ImageFolder(Dataset):
    """The images of a domain with their labels.

    classes: the run's class names, out of ``task`` (the description whose names they are; default: the domain's).
    labelled=False never opens a label: training on the target must not. Items are addressed by an index, or by
    (index, draw): the draw's number seeds the augmentation, so any draw can be repeated. ignore: the value of pixels of
    no class (default: the description's). Raises UserError where images are missing, as Domain.list_images says.
    """

    def __init__(self, domain: Domain, classes: Sequence[str], transform: Transform, *,
                 task: Description | None = None, labelled: bool = True, ignore: int | None = None, seed: int = 0):
        self.domain = domain
        self.images = domain.list_images()
        self.labels = domain.label_paths(self.images) if labelled else None
        self.num_classes = len(classes)
        self.table = label_table(domain.description, classes, task)
        if ignore is not None:
            self.table[self.table == domain.description.ignore] = ignore
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
        label = None if self.labels is None else self.truth(index)
        return read_image(self.images[index]), label

    def draw_subset(self, count: int, seed: int) -> None:
        """Keep ``count`` of the images, drawn by ``seed``. Raises UserError where there are fewer."""
        if count > len(self):
            raise UserError(f"--subset {count}: the target has {len(self)} images")
        drawn = sorted(np.random.RandomState(seed).choice(len(self), count, replace=False).tolist())
        self.images = [self.images[i] for i in drawn]
        self.labels = None if self.labels is None else [self.labels[i] for i in drawn]

    def truth(self, index: int) -> np.ndarray:
        """The label (class indices) of one image, at the size of its file."""
        return read_label(self.labels[index], self.domain.description, self.table)


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


def endless(dataset: Dataset, batch: int, workers: int, *, seed: int, start: int = 0, rank: int = 0,
            world: int = 1, pin: bool = False) -> Iterator[Sample]:
    """Batches without end, from batch number ``start`` on; items of ``dataset`` are addressed by (index, draw)."""
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
        return {"source": f"{len(self.source)} images of {self.source.domain.name} at {size_s}",
                "target": f"{len(self.target)} images of {self.task.name} at {size_t}" if target_trains
                          else "none in training",
                "validation": "none" if self.validation is None else
                              f"{len(self.validation)} images of {self.task.name}"}


def open_pair(source: Domain, target: Domain, transform_s: Transform, transform_t: Transform, *,
              val_set: str | None = None, num_classes: int | None = None, ignore: int | None = None, seed: int = 0,
              check_all: bool = False, allow_overlap: bool = False) -> DomainPair:
    """Source, target and validation sets of a run, checked: some 50 files of each, or with ``check_all`` every file.

    val_set: the labelled set of the target to score on. Where it is None, the description's is taken if it is on disk
    with labels. ignore: the value of source pixels of no class (default: the description's). allow_overlap: images may
    belong to both the training and the validation set.
    Raises UserError for everything that would disturb the run later.
    """
    classes = select_classes(target.description, source.description, num_classes)
    if ignore is not None and ignore < len(classes):
        raise UserError(f"the label to ignore, {ignore}, is the index of the class '{classes[ignore]}': choose one "
                        f"from {len(classes)} to 255")
    folder_s = ImageFolder(source, classes, transform_s, task=target.description, ignore=ignore, seed=seed)
    folder_t = ImageFolder(target, classes, transform_t, labelled=False, seed=seed + 1)
    validation = _open_validation(target, val_set, classes, transform_t)
    for folder in (folder_s, folder_t, validation):
        if folder is not None:
            check(folder, check_all)
    if validation is not None and not allow_overlap:
        files = {_file_number(path) for path in validation.images}
        shared = [path for path in folder_t.images if _file_number(path) in files]
        if shared:
            images = "1 image belongs" if len(shared) == 1 else f"{len(shared)} images belong"
            raise UserError(f"{images} to both the training set ({target.set}) and the evaluation "
                            f"set ({validation.domain.set}) of {target.name}, {shared[0]} among them: "
                            "choose another --set, --val-set or list")
    return DomainPair(folder_s, folder_t, validation, target.description, classes)


def _open_validation(target: Domain, val_set: str | None, classes: Sequence[str],
                     transform: Transform) -> ImageFolder | None:
    domain = target.with_set(val_set or target.description.sets["val"])
    if val_set:
        return ImageFolder(domain, classes, transform)
    if target.description.labels is None:
        return None
    try:
        folder = ImageFolder(domain, classes, transform)
    except MissingSet:
        return None
    return None if len(missing_files(folder.labels)) == len(folder) else folder


def _file_number(path: Path) -> tuple[int, int]:
    """The same for all names of a file, links included."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def check(dataset: ImageFolder, check_all: bool = False, sample: int = 50) -> None:
    """Raises a UserError that lists missing labels, then files that cannot be used: among ``sample`` of them spread
    evenly over the set (about a second, for every start), or among all (``--check-data``). Labels that hold none of
    the run's classes in any of these files are refused too."""
    problems = [f"{dataset.images[index]}: its label {dataset.labels[index]} does not exist"
                for index in missing_files(dataset.labels or ())]
    if not problems:
        indices = spread(len(dataset), len(dataset) if check_all else sample)
        problems, labelled = _check_files(dataset, indices)
        if not problems and not labelled:
            raise UserError(f"{dataset.domain}: none of the {len(indices)} labels that were read, {dataset.labels[0]} "
                            "the first, has a pixel of any class of this run: are these the right labels, and the "
                            "right --source and --target?")
    if problems:
        files = "file" if len(problems) == 1 else "files"
        raise UserError(f"{dataset.domain} has {len(problems)} bad {files}:\n{itemized(problems)}")


def _check_files(dataset: ImageFolder, indices: Sequence[int]) -> tuple[list[str], bool]:
    """(one line for each pair that cannot be trained or scored on, whether any label holds a class)."""
    problems, labelled = [], dataset.labels is None
    for index in indices:
        try:
            image, label = dataset.read(index)
        except UserError as error:
            problems.append(str(error))
            continue
        if label is None:
            continue
        if image.size != label.shape[::-1] and not dataset.domain.description.sizes_may_differ:
            problems.append(f"{dataset.images[index]} is {image.size[0]}x{image.size[1]}, but its label "
                            f"{dataset.labels[index]} is {label.shape[1]}x{label.shape[0]}")
        labelled = labelled or bool((label < dataset.num_classes).any())
    return problems, labelled
