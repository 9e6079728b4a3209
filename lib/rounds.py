"""Self-training in rounds: passes over images that can be resumed anywhere, files of a round, reports over rounds."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from lib import checkpoint, visual
from lib.datasets.folder import DomainPair, ImageFolder
from lib.datasets.labels import derived_description
from lib.files import atomic_write
from lib.runtime import Run, StopRequest


class Progress:
    """What the passes of a round over images have counted, in a file from which the round can go on.

    counts: integer tensors by name, filled by the caller, each process with its share of the images. ``save`` merges:
    the counts of all processes move to the first one. Only what is not 0 is written.
    """

    def __init__(self, path: Path, run: Run, counts: Mapping[str, Tensor], every: int, stop: StopRequest):
        self.path, self.run, self.counts, self.every, self.stop = path, run, counts, every, stop
        self.stage, self.position, self.left = 0, 0, False
        if path.exists():
            state = checkpoint.load(path)
            self.stage, self.position = state["stage"], state["position"]
            for name, (places, values) in state["counts"].items() if run.is_main else ():
                counts[name].view(-1)[places.to(run.device)] = values.to(run.device)

    def save(self) -> None:
        if self.run.world > 1:
            for count in self.counts.values():
                count.copy_(self.run.sum(count))
                if not self.run.is_main:
                    count.zero_()
        if self.run.is_main:
            places = {name: count.view(-1).nonzero()[:, 0] for name, count in self.counts.items()}
            checkpoint.save({"stage": self.stage, "position": self.position, "counts": {
                name: (at.cpu(), self.counts[name].view(-1)[at].cpu()) for name, at in places.items()}}, self.path)
        self.run.barrier()

    def sweep(self, stage: int, length: int, load: Callable[[list[int]], Iterator]) -> Iterator[tuple[int, object]]:
        """(index, item) of this process's share of ``length`` images; nothing for a stage that is over.

        ``left`` is set where a signal asks the run to leave. load: indices -> their items in order.
        """
        if stage < self.stage or self.left:
            return
        world, rank = self.run.world, self.run.rank
        turns = range(self.position, -(-length // world))
        items = iter(load([i for i in (n * world + rank for n in turns) if i < length]) if turns else ())
        for n in turns:
            if n * world + rank < length:
                yield n * world + rank, next(items)
            self.position = n + 1
            self.left = self.run.any(self.stop.signal is not None)
            if self.left or self.position % self.every == 0:
                self.save()
            if self.left:
                return
        self.stage, self.position = stage + 1, 0
        self.save()


# --- files ------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Raises UserError."""
    with atomic_write(path) as new:
        new.write_text(text)


def write_png(image: Image.Image, path: Path) -> None:
    """Raises UserError."""
    with atomic_write(path, "Free some space, or choose another --snapshot-dir; --resume goes on from the last saved "
                            "point") as new:
        image.save(new, compress_level=1)


def write_list(images: Sequence[Path], root: Path, path: Path) -> None:
    """A list file: one image a line, relative to its data set's root."""
    write_text(path, "".join(f"{image.relative_to(root).as_posix()}\n" for image in images))


def label_file(folder: Path, images: ImageFolder, index: int) -> Path:
    """Below ``folder`` as the image lies below its data set's root, as a .png."""
    return folder / images.images[index].relative_to(images.domain.root).with_suffix(".png")


def write_description(images: ImageFolder, written: Path, final: Path) -> None:
    """written/pseudo_labels.json, a description of the labels in final/pseudo_labels that --source of any script reads.

    ``written`` becomes ``final`` when its round is complete. The images are listed beside it.
    """
    final = final.resolve()
    domain = images.domain
    entries = derived_description(domain.description, domain.root, final / "pseudo_labels", f"{final}/{{set}}.txt",
                                  domain.set)
    write_list(images.images, domain.root, written / f"{domain.set}.txt")
    write_text(written / "pseudo_labels.json", json.dumps(entries, indent=1) + "\n")


def complete(folder: Path, before: int, drop: Sequence[str]) -> None:
    """Give the folders N.partial of the rounds N < ``before`` their names N, without the files and folders ``drop``."""
    for partial in sorted(folder.glob("*.partial")):
        if int(partial.stem) < before:
            for name in drop:
                shutil.rmtree(partial / name) if (partial / name).is_dir() else \
                    (partial / name).unlink(missing_ok=True)
            os.replace(partial, partial.with_suffix(""))


# --- reports: {"round": .., "mIoU": per cent, "iou": {class: 0..1}, "predicted", "labelled": {class: pixels}, ..} -----


def round_table(report: Mapping) -> str:
    """One line a class: threshold, share of the predicted and of the labelled pixels, IoU of the scored network."""
    names = list(report["predicted"])
    predicted, labelled = (max(sum(report[key].values()), 1) for key in ("predicted", "labelled"))
    width = max(map(len, names))
    lines = [f"{'':{width}}  threshold  predicted %  labelled %    IoU"]
    for name in names:
        iou = report.get("iou", {}).get(name)
        lines.append(f"{name:{width}}  {report['thresholds'][name]:9.4f}  "
                     f"{100 * report['predicted'][name] / predicted:11.2f}  "
                     f"{100 * report['labelled'][name] / labelled:10.2f}  "
                     f"{'' if iou is None else format(100 * iou, '5.1f'):>5}".rstrip())
    return "\n".join(lines)


def draw_labels(data: DomainPair, labelled: ImageFolder, most: int, path: Path) -> None:
    """Panels [image, pseudo-label, truth where it is on disk] of ``most`` images. Nothing else opens that truth."""
    truth = None
    if data.task.labels is not None:
        truth = ImageFolder(data.target.domain, data.classes, None)
        truth.images, truth.labels = data.target.images, [
            p for p in map(dict(zip(truth.images, truth.labels, strict=True)).get, data.target.images)]
    rows = []
    for index in np.unique(np.linspace(0, len(labelled) - 1, min(most, len(labelled))).astype(int)).tolist():
        image, label = labelled.read(index)
        rows.append([image, visual.colour_map(label, data.palette)])
        if truth is not None:
            there = truth.labels[index] is not None and truth.labels[index].is_file()
            rows[-1].append(visual.colour_map(truth.truth(index), data.palette) if there
                            else Image.new("RGB", image.size, visual.PALE))
    width = min(max(rows[0][0].width, 256), 480)
    captions = ["image", "pseudo-label", "truth"][:len(rows[0])]
    key = visual.legend(data.classes, data.palette, len(captions) * (width + 4) - 4)
    visual.panel(rows, captions, width, key=key).save(path)


def write_rounds(reports: Sequence[Mapping], folder: Path) -> None:
    """rounds.jsonl, one line per round."""
    lines = []
    for report in reports:
        line = {"iteration": report["round"]}
        if report.get("mIoU") is not None:
            line["mIoU"] = report["mIoU"]
        if "predicted" in report:
            line |= {"target portion": report["target_portion"], "labelled share": report["labelled_share"],
                     "largest class": max(report["predicted"].values()) / sum(report["predicted"].values())}
        line |= {f"IoU {name}": 100 * v for name, v in report.get("iou", {}).items() if v is not None}
        lines.append(line)
    write_text(folder / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
