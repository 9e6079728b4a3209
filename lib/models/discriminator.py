"""The fully-convolutional patch discriminator of AdaptSegNet (Tsai et al., CVPR 2018, section 4.2)."""
from __future__ import annotations

from torch import Tensor, nn


class FCDiscriminator(nn.Module):
    """Five 4x4 convolutions of stride 2; LeakyReLU(0.2) between them, no BN, no sigmoid.

    The paper mentions an up-sampling layer at the end; the released code has none, and neither has this.
    """

    def __init__(self, num_classes: int, ndf: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(num_classes, ndf, 4, 2, 1)
        self.conv2 = nn.Conv2d(ndf, ndf * 2, 4, 2, 1)
        self.conv3 = nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1)
        self.conv4 = nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1)
        self.classifier = nn.Conv2d(ndf * 8, 1, 4, 2, 1)
        self.leaky_relu = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, num_classes, H, W], H and W at least 32 -> domain scores [N, 1, H // 32, W // 32] (no sigmoid)."""
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self.leaky_relu(conv(x))
        return self.classifier(x)
