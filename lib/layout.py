"""Where in the picture each class lies, and warnings about an adaptation that does harm there.

The shares of the classes in horizontal bands of the source's labels are compared with those of label maps of the
target. Streets of two domains are laid out alike, so that a class which fills a band of the target where it never does
in the source, or which has vanished, is more often a failure than a find. No label of the target is used.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lib.datasets.folder import ImageFolder
from lib.datasets.pictures import spread

BANDS = 16            # horizontal bands of equal height
BAND_SHARE = 0.25     # of a band's pixels: from here on a class is said to fill it ..
BAND_FACTOR = 4       # .. where no band of the source holds a quarter of that
LOGGED = 5            # values of a coverage in the log that are averaged, the first and the last
VANISHED_FROM = 0.01  # share of the source's pixels: a class that common is expected in the target ..
VANISHED_BELOW = 0.05  # .. at more than this share of its share


class Layout:
    """Pixel counts of each class in horizontal bands, over label maps of any size."""

    def __init__(self, num_classes: int):
        self.counts = np.zeros((BANDS, num_classes), np.int64)

    def add(self, label: np.ndarray) -> None:
        """label: class indices [H, W]; values that are no class do not count."""
        num_classes = self.counts.shape[1]
        bands = np.arange(len(label)) * BANDS // len(label)
        keys = bands[:, None] * num_classes + label
        self.counts += np.bincount(keys[label < num_classes], minlength=self.counts.size).reshape(self.counts.shape)

    @property
    def bands(self) -> np.ndarray:
        """float64 [BANDS, C]: share of each class in each band; 0 in a band without labelled pixels."""
        return self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)

    @property
    def shares(self) -> np.ndarray:
        """float64 [C]: share of each class in all pixels."""
        return self.counts.sum(0) / max(self.counts.sum(), 1)

    def distance(self, other: Layout) -> float:
        """0 (the same shares in every band) to 1 (no class in common): total variation, averaged over the bands."""
        return float(np.abs(self.bands - other.bands).sum(1).mean() / 2)


def layout_of(labelled: ImageFolder, max_images: int = 100) -> Layout:
    """The layout of up to ``max_images`` labels, spread over the set."""
    layout = Layout(labelled.num_classes)
    for index in spread(len(labelled), max_images):
        layout.add(labelled.truth(index))
    return layout


def layout_warnings(source: Layout, target: Layout, classes: Sequence[str]) -> dict[str, str]:
    """By name, a sentence for each class that fills a band of the target unlike the source's, or has vanished."""
    found = {}
    for c, name in enumerate(classes):
        band, in_source = int(target.bands[:, c].argmax()), source.bands[:, c].max()
        share = target.bands[band, c]
        if share >= BAND_SHARE and share >= BAND_FACTOR * in_source:
            found[name] = (f"'{name}' fills {100 * share:.0f} % of the target's pixels at "
                           f"{100 * (band + 0.5) / BANDS:.0f} % of the height; in the source's labels at most "
                           f"{100 * in_source:.0f} % at any height")
        elif source.shares[c] >= VANISHED_FROM and target.shares[c] < VANISHED_BELOW * source.shares[c]:
            found[name] = (f"'{name}' is predicted on {100 * target.shares[c]:.2g} % of the target's pixels; it has "
                           f"{100 * source.shares[c]:.2g} % of the source's")
    return found


def falling_coverage(log: Path) -> dict[str, str]:
    """By name, a sentence for each share called cover_* in log.jsonl that ends at under half of where it began."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    found = {}
    for name in sorted({key for line in lines for key in line if key.startswith("cover_")}):
        values = [line[name] for line in lines if name in line]
        first, last = float(np.mean(values[:LOGGED])), float(np.mean(values[-LOGGED:]))
        if len(values) >= 2 * LOGGED and last < first / 2:
            found[name] = (f"{name} has fallen from {first:.2f} to {last:.2f}: fewer and fewer pixels of the target "
                           "take part in the associations")
    return found
