"""A trained segmentation network that judges pictures and is itself not trained: f of CyCADA's semantic consistency.

Hoffman et al.: "CyCADA: Cycle-Consistent Adversarial Domain Adaptation", ICML 2018, https://arxiv.org/abs/1711.03213.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lib import checkpoint
from lib.datasets.transforms import PIXELS
from lib.errors import UserError
from lib.models.deeplab import build, logits_of, upsample
from lib.models.fcn8s import FCN8s


class FrozenSegmenter(nn.Module):
    """Pictures [N, 3, H, W] in -1..1 -> logits [N, C, H, W], through any network of lib.models in eval mode.

    classes, task: the names of the C classes, and the description whose names they are.
    """

    def __init__(self, net: nn.Module, pixels: str, classes: tuple[str, ...], task: str, align_corners: bool = True):
        super().__init__()
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
        x = x.flip(1) if self.bgr else x
        return upsample(logits_of(self.net(x * self.gain + self.offset)), x.shape[2:], self.align_corners)


def load_segmenter(path: str | Path) -> FrozenSegmenter:
    """The network of a checkpoint that a segmentation trainer wrote. Raises UserError."""
    weights, meta = checkpoint.read_weights(path)
    known = {"aspp": "released", "pixels": "caffe", "stride_on": "1x1", "align_corners": True,
             **checkpoint.recognise(weights), **meta}
    if "classes" not in known or "task" not in known:
        raise UserError(f"{path} does not say which classes it tells apart: give a checkpoint that one of these "
                        "scripts wrote")
    if known["model"] == "FCN8s":
        net = FCN8s(known["num_classes"], known.get("width", 1.0), known.get("padding", "released"))
    else:
        net = build(known["model"], known["num_classes"], known["arch"], known["aspp"], known["stride_on"])
    report = checkpoint.load_into(net, weights, source=str(path))
    if report.missing or report.mismatched:
        raise UserError(f"{path} does not fill its network: {report}")
    return FrozenSegmenter(net, known["pixels"], tuple(known["classes"]), known["task"], known["align_corners"])
