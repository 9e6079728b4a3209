"""DeepLab-v2 networks at output stride 8, with the state-dict names of the files that users have.

Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
Connected CRFs" (TPAMI 2018), in the forms that Tsai et al. (CVPR 2018) released for ResNet-101 and VGG-16 and Kang et
al. (NeurIPS 2020) for ResNet-101. MobileNetV2 is an addition, for small machines.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.errors import UserError
from lib.runtime import as_float32

ASPP_RATES = (6, 12, 18, 24)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (ResNet-18)."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, downsample: nn.Module | None,
                 stride_on: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the stride on the first 1x1 (Caffe's ResNet) or on the 3x3 (torchvision's)."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, downsample: nn.Module | None,
                 stride_on: str):
        super().__init__()
        stride1, stride2 = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, stride1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride2, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
# (expansion, channels, blocks, stride on ImageNet) of each stage of MobileNetV2: table 2 of its paper
MOBILENET_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                (6, 320, 1, 1))
ARCHITECTURES = (*RESNETS, "mobilenet_v2")


class InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 on each of them, 1x1 back without an activation (MobileNetV2)."""

    def __init__(self, inplanes: int, planes: int, stride: int, dilation: int, expansion: int):
        super().__init__()
        wide = inplanes * expansion
        expand = [_conv_bn_relu6(inplanes, wide, 1)] if expansion > 1 else []
        self.conv = nn.Sequential(*expand, _conv_bn_relu6(wide, wide, 3, stride, dilation, groups=wide),
                                  nn.Conv2d(wide, planes, 1, bias=False), nn.BatchNorm2d(planes))
        self.adds = stride == 1 and inplanes == planes

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


def _conv_bn_relu6(inplanes: int, planes: int, kernel: int, stride: int = 1, dilation: int = 1,
                   groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inplanes, planes, kernel, stride, kernel // 2 * dilation, dilation, groups, bias=False),
        nn.BatchNorm2d(planes), nn.ReLU6(inplace=True))


class ASPP(nn.Module):
    """Parallel 3x3 convolutions with dilation = padding = rate, summed (Atrous Spatial Pyramid Pooling).

    ``used`` of the four branches are summed. The release of AdaptSegNet returned from inside its summing loop, so
    only rates 6 and 12 counted; all its checkpoints hold four branches and are of that network.
    """

    def __init__(self, channels: int, num_classes: int, used: int):
        super().__init__()
        self.used = used
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate) for rate in ASPP_RATES)

    def forward(self, x: Tensor) -> Tensor:
        return sum(conv(x) for conv in self.conv2d_list[:self.used])


def _branches(aspp: str) -> int:
    return {"released": 2, "full": 4}[aspp]


def _init_released(net: nn.Module) -> None:
    """Convolutions from N(0, 0.01); BN weight 1 and bias 0 are PyTorch's default (biases of heads keep theirs)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.01)


class Backbone(nn.Module):
    """A network of ImageNet at output stride 8, with torchvision's names: ``arch`` is one of ARCHITECTURES.

    ResNet: layer3 and layer4 keep their resolution with dilation 2 and 4 in every block.

    MobileNetV2 (Sandler et al., CVPR 2018): the strides of the stages of 64 and 160 channels are left out, and what
    follows each is dilated by 2 more, so that every 2nd and 4th pixel is exactly what ImageNet's network computes.
    The last convolution, to 1280 channels, is left out too: the paper (section 6.3) finds a DeepLab head on the 320
    channels before it as good, for a fraction of the work.
    """

    def __init__(self, arch: str = "resnet101", stride_on: str = "1x1"):
        super().__init__()
        self.arch = arch
        if arch == "mobilenet_v2":
            self._add_mobilenet_v2()
        else:
            self._add_resnet(arch, stride_on)

    def _add_resnet(self, arch: str, stride_on: str) -> None:
        block, depths = RESNETS[arch]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        inplanes = 64
        for i, (planes, depth, stride, dilation) in enumerate(
                zip((64, 128, 256, 512), depths, (1, 2, 1, 1), (1, 1, 2, 4), strict=True), 1):
            blocks = []
            for j in range(depth):
                downsample = None
                # Only the first block of a stage has the shortcut, basic blocks of stage 1 excepted (nothing to match).
                if j == 0 and (stride != 1 or inplanes != planes * block.expansion):
                    downsample = nn.Sequential(
                        nn.Conv2d(inplanes, planes * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(planes * block.expansion))
                blocks.append(block(inplanes, planes, stride if j == 0 else 1, dilation, downsample, stride_on))
                inplanes = planes * block.expansion
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.channels = (inplanes // 4, inplanes // 2, inplanes)  # of layer2, layer3, layer4

    def _add_mobilenet_v2(self) -> None:
        layers = [_conv_bn_relu6(3, 32, 3, 2)]
        ends = {}  # channels of a stage: the layer it ends with
        inplanes, output_stride, dilation = 32, 2, 1
        for expansion, planes, depth, stride in MOBILENET_V2:
            for n in range(depth):
                stride = stride if n == 0 else 1
                dilates = output_stride * stride > 8
                layers.append(InvertedResidual(inplanes, planes, 1 if dilates else stride, dilation, expansion))
                if dilates:
                    dilation *= stride
                else:
                    output_stride *= stride
                inplanes = planes
            ends[planes] = len(layers) - 1
        self.features = nn.Sequential(*layers)
        self.channels = (32, 96, 320)
        self.ends = [ends[planes] for planes in self.channels]

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, 3, H, W] -> three stages, each [N, channels, h, w] at stride 8: a ResNet's layer2, layer3, layer4."""
        if self.arch == "mobilenet_v2":
            found = []
            for n, layer in enumerate(self.features):
                x = layer(x)
                if n in self.ends:
                    found.append(x)
            return tuple(found)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        layer2 = self.layer2(self.layer1(x))
        layer3 = self.layer3(layer2)
        return layer2, layer3, self.layer4(layer3)


class DeeplabMulti(Backbone):
    """Two-level DeepLab-v2: head ``layer5`` on layer3 (auxiliary), ``layer6`` on layer4 (main).

    On MobileNetV2 these are the stages of 96 and of 320 channels.
    """

    head_names = ("layer5", "layer6")

    def __init__(self, num_classes: int, arch: str = "resnet101", aspp: str = "released", stride_on: str = "1x1"):
        super().__init__(arch, stride_on)
        self.layer5 = ASPP(self.channels[1], num_classes, _branches(aspp))
        self.layer6 = ASPP(self.channels[2], num_classes, _branches(aspp))
        _init_released(self)
        set_bn_affine(self, False)

    def forward(self, x: Tensor, return_features: bool = False) -> tuple[Tensor, ...]:
        """x [N, 3, H, W] -> logits (auxiliary, main), each [N, classes, h, w]; with features: (layer4, aux, main)."""
        _, layer3, layer4 = self.stages(x)
        logits = self.layer5(layer3), self.layer6(layer4)
        return (layer4, *logits) if return_features else logits


class Deeplab(Backbone):
    """Single-level DeepLab-v2: head ``layer5`` on layer4."""

    head_names = ("layer5",)

    def __init__(self, num_classes: int, arch: str = "resnet101", aspp: str = "released", stride_on: str = "1x1"):
        super().__init__(arch, stride_on)
        self.layer5 = ASPP(self.channels[2], num_classes, _branches(aspp))
        _init_released(self)
        set_bn_affine(self, False)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, ...]:
        """x [N, 3, H, W] -> logits [N, classes, h, w]; with features: (layer4, layer3, layer2, logits)."""
        layer2, layer3, layer4 = self.stages(x)
        logits = self.layer5(layer4)
        return (layer4, layer3, layer2, logits) if return_features else logits


# (channels, dilation, max-pooled afterwards): conv1 to conv5, then fc6 and fc7 as convolutions.
VGG16_LAYERS = ((64, 1, False), (64, 1, True), (128, 1, False), (128, 1, True), (256, 1, False), (256, 1, False),
                (256, 1, True), (512, 1, False), (512, 1, False), (512, 1, False), (512, 2, False), (512, 2, False),
                (512, 2, False), (1024, 4, False), (1024, 4, False))


class DeeplabVGG(nn.Module):
    """VGG-16 without pool4 and pool5, conv5 dilated by 2, fc6 and fc7 as 3x3 convolutions dilated by 4."""

    head_names = ("classifier",)
    not_pretrained = ("features.29", "features.31")  # fc6 and fc7: ImageNet weights have none of this shape
    channels = (512, 1024)

    def __init__(self, num_classes: int, aspp: str = "released"):
        super().__init__()
        layers: list[nn.Module] = []
        inplanes = 3
        for planes, dilation, pool in VGG16_LAYERS:
            layers += [nn.Conv2d(inplanes, planes, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
            if pool:
                layers.append(nn.MaxPool2d(2, 2))
            inplanes = planes
        self.features = nn.Sequential(*layers)
        self.classifier = ASPP(1024, num_classes, _branches(aspp))
        _init_released(self)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x [N, 3, H, W] -> logits [N, classes, h, w]; with features: (fc7, logits)."""
        fc7 = self.features(x)
        logits = self.classifier(fc7)
        return (fc7, logits) if return_features else logits


class SummedConvs(nn.Module):
    """ASPP of four rates without biases, under the names of pixel-level cycle association's release."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate, bias=False))
            for rate in ASPP_RATES)

    def forward(self, x: Tensor) -> Tensor:
        return sum(conv(x) for conv in self.convs)


class DeeplabPixelAssoc(nn.Module):
    """DeepLab-v2 of pixel-level cycle association: ``backbone``, ``classifier`` on layer4; all BN layers train."""

    head_names = ("classifier",)

    def __init__(self, num_classes: int, arch: str = "resnet101", stride_on: str = "1x1"):
        super().__init__()
        self.backbone = Backbone(arch, stride_on)
        self.classifier = nn.Sequential(SummedConvs(self.backbone.channels[2], num_classes))
        _init_released(self)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x [N, 3, H, W] -> logits [N, classes, h, w]; with features: (layer4, logits)."""
        layer4 = self.backbone.stages(x)[2]
        logits = self.classifier(layer4)
        return (layer4, logits) if return_features else logits


MODELS = {"DeeplabMulti": DeeplabMulti, "Deeplab": Deeplab, "DeeplabVGG": DeeplabVGG,
          "DeeplabPixelAssoc": DeeplabPixelAssoc}


def build(model: str, num_classes: int, arch: str = "resnet101", aspp: str = "released",
          stride_on: str = "1x1") -> nn.Module:
    """The network called ``model`` in MODELS; ``arch`` does not concern DeeplabVGG, ``stride_on`` only ResNets.

    DeeplabPixelAssoc has one head, of four rates, whatever ``aspp`` says. Raises UserError for what a checkpoint or a
    flag may name that is none of these networks.
    """
    if model not in MODELS or model != "DeeplabVGG" and arch not in ARCHITECTURES:
        raise UserError(f"{model} on {arch} is not a network that is used here: choose a checkpoint of "
                        f"{', '.join(MODELS)} ({', '.join(ARCHITECTURES)}), or --model and --arch to fit")
    if model == "DeeplabVGG":
        return DeeplabVGG(num_classes, aspp)
    if model == "DeeplabPixelAssoc":
        return DeeplabPixelAssoc(num_classes, arch, stride_on)
    return MODELS[model](num_classes, arch, aspp, stride_on)


def set_bn_affine(net: nn.Module, trains: bool) -> None:
    """Let the weights and biases of all BN layers train, or freeze them (running statistics are another matter)."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.requires_grad_(trains)
            module.bias.requires_grad_(trains)


def set_train_mode(net: nn.Module, freeze_bn: bool = False) -> nn.Module:
    """net.train(), and with ``freeze_bn`` all BN layers in eval mode: statistics are used, not updated."""
    net.train()
    if freeze_bn:
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    return net


def named_groups(net: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, whether it belongs to a head) of every parameter that trains."""
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, name.split(".")[0] in net.head_names


def logits_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The main logits of any of these networks' outputs."""
    return output if isinstance(output, torch.Tensor) else output[-1]


def upsample(pred: Tensor, size: Sequence[int], align_corners: bool = True) -> Tensor:
    """Bilinear, in at least float32: [N, C, h, w] -> [N, C, *size]."""
    return F.interpolate(as_float32(pred), tuple(size), mode="bilinear", align_corners=align_corners)


def downsample(label: Tensor, size: Sequence[int], mode: str = "nearest") -> Tensor:
    """Labels at the size of a feature map: int64 [N, H, W] -> [N, *size]. mode: or "nearest-exact", as Pillow does."""
    return F.interpolate(label[:, None].double(), tuple(size), mode=mode)[:, 0].long()
