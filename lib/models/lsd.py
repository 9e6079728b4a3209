"""The layers of LSD's generator and discriminator, for images of any size.

Sankaranarayanan, Balaji, Jain, Lim, Chellappa: "Learning from Synthetic Data: Addressing Domain Shift for Semantic
Segmentation", CVPR 2018, https://arxiv.org/abs/1711.06969.
"""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class InstanceNorm(nn.InstanceNorm2d):
    """Of a single pixel too, which is its own mean."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[2] * x.shape[3] > 1 else x - x


class Residual(nn.Module):
    """x + act(IN(conv(x)))."""

    def __init__(self, channels: int, bias: bool, act: nn.Module):
        super().__init__()
        self.conv_layer = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm, self.act = InstanceNorm(channels), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv_layer(x)))


def init_released(net: nn.Module) -> None:
    """Weights from N(0, 0.02), biases from U(-0.01, 0.01)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0, 0.02)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.01, 0.01)


def up(inplanes: int, planes: int, kernel: int, stride: int, pad: int) -> list[nn.Module]:
    """The five layers of one up-sampling step of G: a transposed convolution, norm, ReLU, two residual blocks."""
    return [nn.ConvTranspose2d(inplanes, planes, kernel, stride, pad, bias=False), InstanceNorm(planes),
            nn.ReLU(), Residual(planes, False, nn.ReLU()), Residual(planes, False, nn.ReLU())]


def upsampled(layers: nn.Sequential, x: Tensor, size: Sequence[int]) -> Tensor:
    """``layers`` of x; the transposed convolution in front comes as near to ``size`` as its stride allows."""
    conv = layers[0]
    reach = [(n - 1) * conv.stride[0] - 2 * conv.padding[0] + conv.kernel_size[0] for n in x.shape[2:]]
    size = [min(max(n, smallest), smallest + conv.stride[0] - 1) for n, smallest in zip(size, reach, strict=True)]
    x = conv(x, output_size=size)
    return layers[1:](x)
