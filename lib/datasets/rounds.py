"""The rounds of self-training: how far a run has come, their folders and reports, and the images to train on."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lib import checkpoint, ops
from lib.datasets.folder import DomainPair, ImageFolder
from lib.datasets.pseudo_labels import IGNORE, PseudoLabels, write_list
from lib.datasets.transforms import RandomCrop
from lib.errors import UserError
from lib.files import write_json, write_text
from lib.layout import Layout, layout_of, layout_warnings
from lib.metrics import iou_dict, iou_table, mean_iou, selection_table
from lib.runtime import Run


class Rounds:
    """How far a run in ``folder`` has come. A round is labelled (stage "label"), then trained on (stage "train").

    The folder N.partial holds the round N at work, N a complete one. start: the weights that entered the first round.
    collapse: the share of the pixels in one class that ends a run. Raises UserError for a folder that cannot hold a
    data set.
    """

    def __init__(self, data: DomainPair, folder: Path, run: Run, start: str, collapse: float):
        self.data, self.folder, self.run, self.start, self.collapse = data, folder, run, start, collapse
        self.number, self.stage = 0, "label"
        self.reports: list[dict] = []         # of the rounds that were labelled, or at the end only scored
        self.confusion: Tensor | None = None  # of the network that entered the last one, on the validation set
        self.labels()

    def state_dict(self) -> dict:
        return {"number": self.number, "stage": self.stage, "reports": self.reports, "confusion": self.confusion}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)

    @property
    def at_work(self) -> Path:
        return self.folder / f"{self.number}.partial"

    def labels(self) -> PseudoLabels:
        """Those of the present round."""
        return PseudoLabels(self.data, work=self.at_work, final=self.folder / str(self.number))

    @property
    def last_good(self) -> str:
        """The weights that entered the round before: the last good ones if those of the present round have gone wrong.
        """
        return str(self.folder / f"{self.number - 2}/weights.pth") if self.number > 1 else self.start

    # --- from round to round ------------------------------------------------------------------------------------------

    def enter(self, number: int, net: nn.Module, meta: Callable[[], Mapping]) -> None:
        """``net`` enters a round; as the result of the one before it is saved."""
        self.number, self.stage = number, "label"
        if self.run.is_main and number:
            checkpoint.save_weights(net, self.folder / f"{number - 1}.partial/weights.pth", meta())

    def complete(self, before: int) -> None:
        """Give the folders of the rounds N < ``before`` their final names, without what only their making needed."""
        if self.run.is_main:
            for partial in sorted(self.folder.glob("*.partial")):
                if int(partial.stem) < before:
                    (partial / "progress.pth").unlink(missing_ok=True)
                    shutil.rmtree(partial / "logits", ignore_errors=True)
                    os.replace(partial, partial.with_suffix(""))
        self.run.barrier()

    def remove(self) -> None:
        """Delete the folders of an earlier run, complete or not."""
        if self.run.is_main:
            for path in self.folder.glob("[0-9]*"):
                if path.is_dir() and path.name.removesuffix(".partial").isdigit():
                    shutil.rmtree(path)

    def reopen(self, last: int) -> None:
        """Label the present round of a resumed run where it was only scored: a run with fewer rounds ended with it."""
        if self.stage == "train" and "thresholds" not in self.reports[-1] and self.number < last:
            self.stage, self.reports = "label", self.reports[:-1]
            if self.run.is_main and (self.folder / str(self.number)).exists():
                os.replace(self.folder / str(self.number), self.at_work)
            self.run.barrier()

    # --- what is said and written -------------------------------------------------------------------------------------

    @contextmanager
    def errors_with_advice(self) -> Iterator[None]:
        """Turns what the operators refuse, such as logits that are not finite, into a UserError."""
        try:
            yield
        except ValueError as error:
            raise UserError(f"round {self.number}: {error}. Last good checkpoint: {self.last_good}") from None

    def require_diverse(self, pixels: Tensor) -> None:
        """Raises UserError where one class has almost all predicted pixels [C] of the network that entered the round.
        """
        share = pixels.double() / pixels.sum()
        if share.max() > self.collapse:
            what, advice = ("the network to start from", "Try") if self.number == 0 else (
                f"the network trained in round {self.number - 1}",
                f"Last good checkpoint: {self.last_good}. Try a lower --learning-rate or")
            raise UserError(f"round {self.number}: {what} has collapsed: {100 * share.max():.1f} % of the pixels are "
                            f"'{self.data.classes[int(share.argmax())]}' (--collapse {self.collapse}). {advice} "
                            "another BN mode (--is-training, --bn-stats target) and the --pixels of the network's "
                            "training")

    def keep_best(self, net: nn.Module, meta: Mapping) -> dict[str, object]:
        """Report the scores of the network that enters the round; its weights are kept where they are the best yet."""
        miou = 100 * mean_iou(self.confusion.numpy())
        best = max((report["mIoU"] for report in self.reports), default=None)
        if self.run.is_main and (best is None or miou > best):
            checkpoint.save_weights(net, self.folder / "best.pth", {**meta, "mIoU": miou})
        so_far = "" if best is None else f" (best so far {max(best, miou):.2f})"
        self.run.say(f"round {self.number}: target mIoU {miou:.2f}{so_far}")
        return {"mIoU": miou, "iou": iou_dict(self.data.classes, self.confusion.numpy())["iou"]}

    def report_selection(self, portion: float, source_images: int, thresholds: ops.Thresholds, predicted: Tensor,
                         labelled: Tensor, rare: Sequence[int], mine: Sequence[int]) -> dict[str, object]:
        """What the round selected, by class name. predicted: pixels [C]; labelled: pixels [256] by label."""
        classes = self.data.classes
        selection = {key: dict(zip(classes, values.tolist(), strict=True)) for key, values in (
            ("thresholds", thresholds.value), ("selected", thresholds.selected), ("predicted", predicted),
            ("labelled", labelled[:len(classes)]))}
        return {"target_portion": portion, "source_images": source_images, **selection,
                "labelled_share": sum(selection["labelled"].values()) / int(labelled.sum()),
                "rare": [classes[i] for i in rare], "mine": [classes[i] for i in mine]}

    @cached_property
    def source_layout(self) -> Layout:
        return layout_of(self.data.source)

    def warn_of_layout(self) -> dict[str, object]:
        """Print where the pseudo-labels are laid out unlike the source's labels; their distance (lib/layout.py)."""
        selected = layout_of(self.labels().open())
        warnings = layout_warnings(self.source_layout, selected, self.data.classes)
        for warning in warnings.values():
            self.run.say(f"warning: among the pseudo-labels {warning}")
        return {"layout_distance": selected.distance(self.source_layout), "warnings": list(warnings.values())}

    def end_labelling(self, report: dict, source_images: Sequence[int], max_pictures: int) -> None:
        """Print and write the report of the round, whose stage is now "train"; one without thresholds only scored."""
        self.reports, self.stage = [*self.reports, report], "train"
        is_labelled = "thresholds" in report
        if is_labelled:
            self.run.say(f"round {self.number}: portion {report['target_portion']:.3g}, "
                         f"{100 * report['labelled_share']:.1f} % of the pixels labelled, {report['source_images']} "
                         f"source images; rare: {', '.join(report['rare']) or 'none'}; mined: "
                         f"{', '.join(report['mine']) or 'none'}\n{selection_table(report)}")
        if self.run.is_main:
            if is_labelled:
                source = self.data.source
                self.labels().describe()
                report |= self.warn_of_layout()
                if max_pictures:
                    self.labels().draw(max_pictures, self.at_work / "pictures.png")
                write_list([source.images[i] for i in source_images], source.domain.root, self.at_work / "source.txt")
            write_json(self.at_work / "report.json", report)
            write_text(self.folder / "rounds.jsonl", "".join(map(_line, self.reports)))

    def say_scores(self) -> None:
        """Print the table of the last network, and the scores of all rounds."""
        self.run.say(iou_table(self.data.classes, {"IoU": self.confusion.numpy()}))
        scores = [report["mIoU"] for report in self.reports]
        self.run.say(f"target mIoU by round: {', '.join(f'{x:.2f}' for x in scores)}; last {scores[-1]:.2f}, best "
                     f"{max(scores):.2f} (round {int(np.argmax(scores))}, chosen on the validation set)")


def _line(report: Mapping) -> str:
    """One round in rounds.jsonl."""
    line = {"iteration": report["round"]}
    if report.get("mIoU") is not None:
        line["mIoU"] = report["mIoU"]
    if "predicted" in report:
        line |= {"target portion": report["target_portion"], "labelled share": report["labelled_share"],
                 "largest class": max(report["predicted"].values()) / sum(report["predicted"].values())}
    line |= {f"IoU {name}": 100 * v for name, v in report.get("iou", {}).items() if v is not None}
    return json.dumps(line) + "\n"


class RoundSample(NamedTuple):
    image: object      # float32 [3, H, W]; in a batch [N, 3, H, W]
    label: object      # int64 [H, W], or float32 [C, H, W] where labels are soft
    on_target: object  # 1.0 target, 0.0 source
    name: str


class RoundSet(Dataset):
    """Source images ``chosen`` and all pseudo-labelled target images, as crops; item (index, draw), draw the seed.

    sizes: (width, height) that images of each domain are resized to, or None. mine: classes that crops of the target
    are centred on. soft: (index, (height, width), rows, columns) -> soft labels [C, rows, columns] of a target image,
    which take the place of hard ones; those of the source are then one-hot.
    """

    def __init__(self, source: ImageFolder, chosen: Sequence[int], target: ImageFolder | None, crop: RandomCrop,
                 sizes: tuple, seed: Sequence[int], mine: Sequence[int] = (), soft: Callable | None = None):
        self.source, self.chosen, self.target, self.crop, self.sizes = source, list(chosen), target, crop, sizes
        self.seed, self.mine, self.soft = list(seed), mine, soft

    def __len__(self) -> int:
        return len(self.chosen) + (0 if self.target is None else len(self.target))

    def __getitem__(self, key: tuple[int, int]) -> RoundSample:
        index, draw = key
        rng, on_target = np.random.default_rng([*self.seed, draw]), index >= len(self.chosen)
        folder, index = (self.target, index - len(self.chosen)) if on_target else (self.source, self.chosen[index])
        image, label = folder.read(index)
        x, y, rows, cols = self.crop(image, label, rng, self.sizes[on_target], self.mine if on_target else ())
        if self.soft is not None:
            kept = y != IGNORE
            p = torch.zeros(self.source.num_classes, *y.shape).scatter_(0, (y * kept)[None], 1.0)
            if on_target:
                p[:, :len(rows), :len(cols)] = self.soft(index, label.shape, rows, cols)
            y = p * kept
        return RoundSample(x, y, float(on_target), folder.images[index].stem)
