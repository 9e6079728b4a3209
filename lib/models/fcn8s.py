"""FCN-8s on VGG-16, with the state-dict names of the files that users have.

Long, Shelhamer, Darrell: "Fully Convolutional Networks for Semantic Segmentation" (CVPR 2015), in the form that
Sankaranarayanan et al. (CVPR 2018) released.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# (name, channels, max-pooled afterwards) of VGG-16's convolutions
CONVOLUTIONS = (("conv1_1", 64, False), ("conv1_2", 64, True), ("conv2_1", 128, False), ("conv2_2", 128, True),
                ("conv3_1", 256, False), ("conv3_2", 256, False), ("conv3_3", 256, True),
                ("conv4_1", 512, False), ("conv4_2", 512, False), ("conv4_3", 512, True),
                ("conv5_1", 512, False), ("conv5_2", 512, False), ("conv5_3", 512, True))


class FCN8s(nn.Module):
    """Scores of fc7, pool4 and pool3, each at 1x1, summed on the way up by fixed bilinear transposed convolutions.

    width: share of VGG-16's channels. padding "released": conv1_1 pads by 100 on each side, which makes room for fc6
    (7x7, unpadded) on any image; "same": conv1_1 pads by 1 and fc6 by 3, which computes the same layers with the same
    weights on the image alone: on 96x72 pixels an eleventh of the work. image_std: of the pixels it will be fed, by
    which random weights of conv1_1 are divided.
    """

    head_names = ("score_fr", "score_pool3", "score_pool4", "upscore2", "upscore8", "upscore_pool4")
    not_pretrained = ("fc6", "fc7")  # files of VGG-16's convolutions alone do not have them

    def __init__(self, num_classes: int, width: float = 1.0, padding: str = "released", dropout: float = 0.5,
                 image_std: float = 64.0):
        super().__init__()
        self.padding = padding
        released = padding == "released"
        inplanes = 3
        for name, channels, _ in CONVOLUTIONS:
            channels = scaled(channels, width)
            self.add_module(name, nn.Conv2d(inplanes, channels, 3, padding=100 if released and inplanes == 3 else 1))
            inplanes = channels
        wide = scaled(4096, width)
        self.fc6 = nn.Conv2d(inplanes, wide, 7, padding=0 if released else 3)
        self.fc7 = nn.Conv2d(wide, wide, 1)
        self.score_fr = nn.Conv2d(wide, num_classes, 1)
        self.score_pool3 = nn.Conv2d(scaled(256, width), num_classes, 1)
        self.score_pool4 = nn.Conv2d(scaled(512, width), num_classes, 1)
        self.upscore2 = nn.ConvTranspose2d(num_classes, num_classes, 4, 2, bias=False)
        self.upscore8 = nn.ConvTranspose2d(num_classes, num_classes, 16, 8, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(num_classes, num_classes, 4, 2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.drop = nn.Dropout2d(dropout)
        self.channels = (wide, scaled(512, width), scaled(256, width))  # of fc7, pool4, pool3
        for name, module in self.named_children():
            if isinstance(module, nn.ConvTranspose2d):
                module.weight.data.copy_(bilinear(module.kernel_size[0], num_classes))
                module.weight.requires_grad_(False)
            elif isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.bias)
                if name.startswith("score"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.kaiming_normal_(module.weight)
        self.conv1_1.weight.data /= image_std

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, 3, H, W] -> fc7 (after dropout), pool4, pool3."""
        pools = []
        for name, _, pooled in CONVOLUTIONS:
            x = self.relu(getattr(self, name)(x))
            if pooled:
                x = self.pool(x)
                pools.append(x)
        fc7 = self.drop(self.relu(self.fc7(self.drop(self.relu(self.fc6(x))))))
        return fc7, pools[3], pools[2]

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, ...]:
        """x [N, 3, H, W] of any size -> logits [N, classes, H, W]; with features: (fc7, pool4, pool3, logits)."""
        fc7, pool4, pool3 = self.features(x)
        fr, four, three = self.score_fr(fc7), self.score_pool4(pool4), self.score_pool3(pool3)
        if self.padding == "released":
            up = self.upscore2(fr)
            up = self.upscore_pool4(up + crop(four, 5, up))
            logits = crop(self.upscore8(up + crop(three, 9, up)), 31, x)
        else:
            up = self.upscore_pool4(crop(self.upscore2(fr), 1, four) + four)
            logits = crop(self.upscore8(crop(up, 1, three) + three), 4, x)
        return (fc7, pool4, pool3, logits) if return_features else logits


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def crop(x: Tensor, offset: int, like: Tensor) -> Tensor:
    """As much of ``x`` as ``like`` is wide and high, from ``offset`` on."""
    height, width = like.shape[2:]
    return x[:, :, offset:offset + height, offset:offset + width]


def bilinear(kernel: int, channels: int) -> Tensor:
    """[channels, channels, kernel, kernel]: up-sampling by kernel / 2, each channel on its own."""
    ramp = 1 - (torch.arange(kernel) - (kernel - 1) / 2).abs() / (kernel / 2)
    return torch.eye(channels)[:, :, None, None] * ramp[:, None] * ramp


def from_vgg16(state: dict[str, Tensor], convolutions: Sequence[tuple] = CONVOLUTIONS) -> dict[str, Tensor]:
    """torchvision's VGG-16 under our names: features.* in their order, fc6 and fc7 from the first two linear layers,
    where these are there."""
    numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith("features.")})
    renamed = {f"{name}.{kind}": state[f"features.{number}.{kind}"]
               for (name, *_), number in zip(convolutions, numbers, strict=True) for kind in ("weight", "bias")}
    if "classifier.0.weight" not in state:
        return renamed
    fc6, fc7 = state["classifier.0.weight"], state["classifier.3.weight"]
    return {**renamed, "fc6.weight": fc6.view(len(fc6), -1, 7, 7), "fc6.bias": state["classifier.0.bias"],
            "fc7.weight": fc7.view(*fc7.shape, 1, 1), "fc7.bias": state["classifier.3.bias"]}
