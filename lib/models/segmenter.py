"""A trained segmentation network that judges pictures and is itself not trained: f of CyCADA's semantic consistency.

Hoffman et al.: "CyCADA: Cycle-Consistent Adversarial Domain Adaptation", ICML 2018, https://arxiv.org/abs/1711.03213.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint
from lib.datasets.description import Domain, load_description
from lib.datasets.folder import ImageFolder
from lib.datasets.transforms import PIXELS
from lib.errors import UserError
from lib.models.deeplab import logits_of, upsample
from lib.runtime import as_float32


class FrozenSegmenter(nn.Module):
    """Pictures [N, 3, H, W] in -1..1 -> logits [N, C, H, W], through any network of lib.models in eval mode.

    classes, task: the names of the C classes, and the description whose names they are. size: (width, height) that it
    was trained at, where that is known.
    """

    def __init__(self, net: nn.Module, pixels: str, classes: tuple[str, ...], task: str, align_corners: bool = True,
                 size: tuple[int, int] | None = None):
        super().__init__()
        self.size = size
        self.net, self.classes, self.task, self.align_corners = net.eval().requires_grad_(False), classes, task, \
            align_corners
        convention = PIXELS[pixels]
        self.bgr = convention.bgr
        # (x + 1) * 127.5 is 0..255; then the convention's scale, mean and standard deviation
        std = torch.tensor(convention.std).view(3, 1, 1)
        self.register_buffer("gain", 127.5 * convention.scale / std, persistent=False)
        self.register_buffer("offset", self.gain - torch.tensor(convention.mean).view(3, 1, 1) / std, persistent=False)

    def train(self, mode: bool = True) -> FrozenSegmenter:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return upsample(logits_of(self.net(self.preprocess(x))), x.shape[2:], self.align_corners)

    def labels_of(self, domain: Domain) -> ImageFolder:
        """The labels of a described data set as classes of this network. Raises UserError."""
        return ImageFolder(domain, self.classes, None, task=load_description(self.task))

    def preprocess(self, x: Tensor) -> Tensor:
        """-1..1 in the network's own pixel convention."""
        return (x.flip(1) if self.bgr else x) * self.gain + self.offset

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits as above, what the network's classifier sees [N, D, h, w])."""
        features, *_, logits = self.net(self.preprocess(x), return_features=True)
        return upsample(logits, x.shape[2:], self.align_corners), as_float32(features)


def load_segmenter(path: str | Path) -> FrozenSegmenter:
    """The network of a checkpoint that a segmentation trainer wrote. Raises UserError."""
    net, known, _ = checkpoint.open_network(path)
    if "classes" not in known:
        raise UserError(f"{path} does not say which classes it tells apart: give a checkpoint that one of these "
                        "scripts wrote")
    return FrozenSegmenter(net, known["pixels"], tuple(known["classes"]), known["task"], known["align_corners"],
                           tuple(known["size"]) if "size" in known else None)


def loss_semantic(segmenter: nn.Module, fake: Tensor, x: Tensor, y: Tensor | None = None, ignore: int = 255) -> Tensor:
    """CyCADA Eq. 6: cross-entropy of f(fake) with argmax f(x), or with the labels y int64 [N, H, W] of x."""
    if y is None:
        with torch.no_grad():
            y = segmenter(x).argmax(1)
    total = F.cross_entropy(as_float32(segmenter(fake)), y, ignore_index=ignore, reduction="sum")
    return total / (y != ignore).sum().clamp(min=1)
