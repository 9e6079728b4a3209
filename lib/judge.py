"""Did the content survive a translation? Measured with a frozen segmenter f, without looking at the target's labels."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lib.datasets.description import Domain
from lib.datasets.pictures import read_image, spread
from lib.datasets.unpaired import to_symmetric
from lib.metrics import confusion_matrix, iou_dict, iou_table
from lib.models.segmenter import FrozenSegmenter
from lib.runtime import Run

WORST = 10        # images listed
MAX_TARGET = 500  # images of the target that are looked at


def gradient_correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of the gradient maps (Sobel, of the grey values) of two images [3, H, W]."""
    sobel = x.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    kernels = torch.stack([sobel, sobel.T])[:, None]
    grey = torch.stack([x, y]).mean(dim=1, keepdim=True)
    maps = F.conv2d(grey, kernels).square().sum(1).sqrt().flatten(1)
    return float(torch.corrcoef(maps)[0, 1])


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of features [N, D], [M, D].

    Kernel (u v / D + 1)^3, as in the kernel inception distance of Binkowski et al., "Demystifying MMD GANs", ICLR 2018,
    https://arxiv.org/abs/1801.01401. Needs at least two of each.
    """
    a, b = a.double(), b.double()

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def within(u: Tensor) -> Tensor:
        k = kernel(u, u)
        return (k.sum() - k.diagonal().sum()) / (len(u) * (len(u) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


class ContentJudge:
    """Compares f on images x and on their translations G(x), and both with labels y where there are some."""

    def __init__(self, f: FrozenSegmenter, run: Run, ignore: int):
        self.f, self.run, self.ignore = f, run, ignore
        c = len(f.classes)
        self.confusions = {name: np.zeros((c, c), np.int64) for name in ("f(G(x)) : f(x)", "f(x) : y", "f(G(x)) : y")}
        self.agreement: dict[str, float] = {}
        self.edges: dict[str, float] = {}
        self.features: dict[str, list[Tensor]] = {"x": [], "G(x)": [], "target": []}

    @torch.no_grad()
    def look(self, path: Path, name: str) -> tuple[Tensor, np.ndarray]:
        """(the image at f's working size [3, h, w], f's decision at the size of the file); its features are kept."""
        image = read_image(path)
        small = image if self.f.size is None else image.resize(self.f.size, Image.Resampling.BICUBIC)
        x = self.run.place(to_symmetric(small)[None])
        logits, features = self.f.with_features(x)
        self.features[name].append(features.mean(dim=(2, 3))[0].cpu())
        logits = F.interpolate(logits, image.size[::-1], mode="bilinear", align_corners=self.f.align_corners)
        return x[0], logits.argmax(1)[0].byte().cpu().numpy()

    def add(self, path: Path, translated: Path, label: np.ndarray | None) -> None:
        """label: class indices at the size of the file."""
        (x, before), (y, after) = self.look(path, "x"), self.look(translated, "G(x)")
        name = str(translated)
        self.agreement[name] = float((before == after).mean())
        self.edges[name] = gradient_correlation(x, y)
        pairs = {"f(G(x)) : f(x)": (before, after)}
        if label is not None:
            size = before.shape[::-1]
            label = label if label.shape == before.shape else \
                np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
            pairs |= {"f(x) : y": (label, before), "f(G(x)) : y": (label, after)}
        for key, (truth, guess) in pairs.items():
            confusion_matrix(truth, guess, len(self.f.classes), self.ignore, out=self.confusions[key])

    def report(self) -> dict[str, object]:
        """Everything in numbers, for a JSON file."""
        used = {name: c for name, c in self.confusions.items() if c.any()}
        found = {"agreement": float(np.mean(list(self.agreement.values()))),
                 "edges": float(np.mean(list(self.edges.values()))),
                 "scores": {name: iou_dict(self.f.classes, c) for name, c in used.items()},
                 "worst": sorted(self.agreement.items(), key=lambda item: item[1])[:WORST]}
        if min(len(self.features["target"]), len(self.features["x"])) > 1:
            target = torch.stack(self.features["target"])
            found["distance to the target"] = {
                name: kernel_distance(torch.stack(self.features[name]), target) for name in ("x", "G(x)")}
        return found

    def text(self) -> str:
        """The same for people."""
        used = {name: c for name, c in self.confusions.items() if c.any()}
        report = self.report()
        lines = [f"IoU in per cent, f: the segmenter, x: {len(self.agreement)} images, G(x): their translations"
                 + ", y: their labels" * (len(used) > 1), iou_table(self.f.classes, used),
                 f"f decides as before on {100 * report['agreement']:.1f} % of the pixels; correlation of gradient "
                 f"maps {report['edges']:.3f}"]
        if "distance to the target" in report:
            before, after = report["distance to the target"].values()
            lines.append(f"kernel distance of f's features to the target: {before:.4g} before, {after:.4g} after")
        lines += ["least agreement:", *(f"  {100 * share:5.1f} %  {name}" for name, share in report["worst"])]
        return "\n".join(lines)


def judge_translations(f: FrozenSegmenter, images: Sequence[Path], translated: Sequence[Path], domain: Domain | None,
                       target: Sequence[Path], run: Run) -> ContentJudge:
    """A judge that has seen every image beside its translation.

    domain: the data set of the images, whose labels are used if it has some. target: images of the target, of which
    MAX_TARGET are looked at.
    """
    labelled = f.labels_of(domain) if domain is not None and domain.description.labels else None
    judge = ContentJudge(f, run, 255 if domain is None else domain.description.ignore)
    for i in tqdm(range(len(images)), unit="image", desc="judge", disable=None):
        judge.add(images[i], translated[i], labelled and labelled.truth(i))
    for i in spread(len(target), MAX_TARGET):
        judge.look(target[i], "target")
    return judge
