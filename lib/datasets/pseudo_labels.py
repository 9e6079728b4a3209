"""Labels that a network has given to a target set, on disk: their files, their description, a picture of some."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib import visual
from lib.datasets.description import Domain
from lib.datasets.folder import DomainPair, ImageFolder
from lib.datasets.labels import derived_description, label_table, written_values
from lib.datasets.pictures import spread
from lib.errors import UserError
from lib.files import atomic_write, write_json, write_text

IGNORE = 255


class PseudoLabels:
    """The labels of ``data.target`` below ``work``/pseudo_labels, as their images lie below the data set's root.

    ``work`` will be renamed to ``final`` when all is done; the description that lies beside the labels,
    pseudo_labels.json, speaks of ``final``, and is what --source of any script reads. Raises UserError for braces in
    the path, which a description takes for placeholders.
    """

    def __init__(self, data: DomainPair, work: Path, final: Path):
        if set("{}") & set(str(final.resolve())):
            raise UserError(f"--snapshot-dir {final.parent}: a data set cannot lie below a folder with braces in its "
                            "name: choose another")
        self.data, self.work, self.final = data, work, final.resolve()
        ids, unlabelled = written_values(data.task)
        self.to_ids = np.full(256, unlabelled, np.uint8)  # class index -> the value in the file
        self.to_ids[:len(data.classes)] = [ids[data.task.classes.index(name)] for name in data.classes]

    def file(self, index: int, folder: str = "pseudo_labels") -> Path:
        target = self.data.target
        return self.work / folder / target.images[index].relative_to(target.domain.root).with_suffix(".png")

    def write(self, index: int, label: np.ndarray, in_colour: bool = False) -> None:
        """label: class indices uint8 [H, W], IGNORE where there is none; ``in_colour`` writes its colours too."""
        visual.save(Image.fromarray(self.to_ids[label]), self.file(index), compress_level=1)
        if in_colour:
            visual.save(visual.colour_map(label, self.data.palette), self.file(index, "pseudo_labels_color"),
                        compress_level=1)

    def write_logits(self, index: int, logits: Tensor) -> None:
        """For read_logits: what soft labels are made of, kept until the round is complete."""
        with atomic_write(self.work / f"logits/{index}.npy") as new:
            np.save(new, logits.cpu().numpy())

    def read_logits(self, index: int) -> Tensor:
        return torch.from_numpy(np.load(self.work / f"logits/{index}.npy"))

    def describe(self) -> None:
        """Write pseudo_labels.json and the list of the images beside it."""
        domain = self.data.target.domain
        entries = derived_description(domain.description, domain.root, self.final / "pseudo_labels",
                                      f"{self.final}/{{set}}.txt", domain.set)
        write_list(self.data.target.images, domain.root, self.work / f"{domain.set}.txt")
        write_json(self.work / "pseudo_labels.json", entries)

    def open(self) -> ImageFolder:
        """The target with these labels."""
        labelled = copy.copy(self.data.target)
        labelled.labels = [self.file(index) for index in range(len(labelled))]
        labelled.domain = Domain.open(self.work / "pseudo_labels.json")
        labelled.table = label_table(labelled.domain.description, self.data.classes)
        labelled.table[labelled.table == labelled.domain.description.ignore] = IGNORE
        return labelled

    def draw(self, max_images: int, path: Path) -> None:
        """Panels [image, pseudo-label, truth where it is on disk] of some images. Nothing else opens that truth."""
        data, labelled, truth = self.data, self.open(), None
        if data.task.labels is not None:
            truth = ImageFolder(data.target.domain, data.classes, None)
            label_of = dict(zip(truth.images, truth.labels, strict=True))
            truth.images, truth.labels = data.target.images, [label_of.get(image) for image in data.target.images]
        rows = []
        for index in spread(len(labelled), max_images):
            image, label = labelled.read(index)
            rows.append([image, visual.colour_map(label, data.palette)])
            if truth is not None:
                known = truth.labels[index] is not None and truth.labels[index].is_file()
                rows[-1].append(visual.colour_map(truth.truth(index), data.palette) if known
                                else Image.new("RGB", image.size, visual.PALE))
        width = min(max(rows[0][0].width, 256), 480)
        captions = ["image", "pseudo-label", "truth"][:len(rows[0])]
        key = visual.legend(data.classes, data.palette, len(captions) * (width + 4) - 4)
        visual.save(visual.panel(rows, captions, width, key=key), path)


def write_list(images: Sequence[Path], root: Path, path: Path) -> None:
    """A list file: one image a line, relative to its data set's root. Raises UserError."""
    write_text(path, "".join(f"{image.relative_to(root).as_posix()}\n" for image in images))
