"""The ResNet generator of CycleGAN and SPGAN, under the keys of CycleGAN's release (model.1.weight, ...).

Zhu, Park, Isola, Efros: "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV 2017,
https://arxiv.org/abs/1703.10593. Deng, Zheng, Ye, Kang, Yang, Jiao: "Image-Image Domain Adaptation with Preserved
Self-Similarity and Domain-Dissimilarity for Person Re-identification", CVPR 2018, https://arxiv.org/abs/1711.07027.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint
from lib.errors import UserError
from lib.runtime import as_float32

BLOCKS = {"resnet_9blocks": 9, "resnet_6blocks": 6}


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) over each channel of each image, without parameters; in float32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(as_float32(x), eps=1e-5).to(x.dtype)


class ResizeConv(nn.Conv2d):
    """Twice the size by nearest neighbours, then a 3x3 convolution: free of the checkerboard of transposed ones."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, bias: bool):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=bias), InstanceNorm(), nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), InstanceNorm())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    """Images [N, 3, H, W] in -1..1 to images of the other domain; sides are multiples of 4 (others grow to the next).

    bias: of the convolutions before a norm, where it has no effect; CycleGAN has it, SPGAN only in the second
    convolution of a block. upsample: "transposed" as released, or "resize".
    """

    def __init__(self, ngf: int = 64, blocks: int = 9, bias: bool = True, upsample: str = "transposed"):
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7, bias=bias), InstanceNorm(), nn.ReLU(True)]
        for c in (ngf, 2 * ngf):
            layers += [nn.Conv2d(c, 2 * c, 3, stride=2, padding=1, bias=bias), InstanceNorm(), nn.ReLU(True)]
        layers += [ResnetBlock(4 * ngf, bias) for _ in range(blocks)]
        for c in (4 * ngf, 2 * ngf):
            up = ResizeConv(c, c // 2, bias) if upsample == "resize" else \
                nn.ConvTranspose2d(c, c // 2, 3, stride=2, padding=1, output_padding=1, bias=bias)
            layers += [up, InstanceNorm(), nn.ReLU(True)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@torch.no_grad()
def init_normal(net: nn.Module, std: float = 0.02) -> nn.Module:
    """CycleGAN's start: weights N(0, std), biases 0. SPGAN leaves PyTorch's."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.weight.normal_(0, std)
            if module.bias is not None:
                module.bias.zero_()
    return net


def from_release(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Generator weights of any release under the keys above.

    Understood: the prefix module. of DataParallel; running statistics and num_batches_tracked, which files of old
    PyTorch versions hold and instance norm does not use; the keys ls.N of SPGAN's PyTorch release.
    """
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    blocks = {int(m[1]) for key in weights if (m := re.match(r"ls\.(\d+)\.ls\.1\.0\.weight", key))}
    renamed = {}
    for key, value in weights.items():
        if key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked"):
            continue
        if blocks and (m := re.fullmatch(r"ls\.(\d+)\.(?:ls\.(1\.0|3)\.|0\.)?(weight|bias)", key)):
            n, inner, leaf = int(m[1]), m[2], m[3]
            first, last = min(blocks), max(blocks)
            if inner:  # a block
                key = f"model.{n + 10 - first}.conv_block.{1 if inner == '1.0' else 5}.{leaf}"
            elif n < first:
                key = f"model.{3 * n - 2}.{leaf}"
            else:  # two up-sampling layers, padding, the last convolution
                end = 10 + len(blocks)
                key = f"model.{({1: end, 2: end + 3}).get(n - last, end + 7)}.{leaf}"
        renamed[key] = value
    return renamed


def load_networks(nets: Mapping[str, nn.Module], folder: Path, label: str) -> str:
    """Fill networks {suffix: net} from LABEL_net_SUFFIX.pth, ours or the release's; what the header says of them.

    Raises UserError where a file does not fit.
    """
    for suffix, net in nets.items():
        path = folder / f"{label}_net_{suffix}.pth"
        weights = from_release(checkpoint.load(path))
        if isinstance(net, ResnetGenerator):
            build_generator(weights, str(path))
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{path} is of another network than the flags say: {' '.join(str(error).split())[:300]}") \
                from None
    return f"{folder}/{label}_net_*.pth"


def build_generator(weights: Mapping[str, Tensor], source: str = "the checkpoint") -> ResnetGenerator:
    """The generator that these weights (of from_release) are of, filled. Raises UserError where they are of another."""
    blocks = len({key.split(".")[1] for key in weights if ".conv_block." in key})
    first, up = weights.get("model.1.weight"), weights.get(f"model.{10 + blocks}.weight")
    if first is None or up is None or first.shape[1:] != (3, 7, 7):
        raise UserError(f"{source} holds no ResNet generator of CycleGAN or SPGAN for RGB images; its keys: "
                        + ", ".join(list(weights)[:4]) + ", ...")
    if "model.2.weight" in weights:
        raise UserError(f"{source}: generators with batch normalisation (--norm batch of the release) are not read; "
                        "CycleGAN's default is instance normalisation")
    ngf = len(first)
    resize = len(up) == 2 * ngf  # [out, in, 3, 3]; a transposed convolution has [in, out, 3, 3]
    net = ResnetGenerator(ngf, blocks, "model.1.bias" in weights, "resize" if resize else "transposed")
    try:
        net.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise UserError(f"{source} does not fit a ResNet generator of {ngf} filters and {blocks} blocks: "
                        + " ".join(str(error).split())[:300]) from None
    return net
