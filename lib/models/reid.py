"""Networks of person re-identification: a ResNet that learns to name people, and whose features find them again.

Two layouts, with the state-dict names of the files that users have:

    IDNet     base.*, feat.*, feat_bn.*, classifier.*    CamStyle (CVPR 2018) and ECN (Zhong et al., CVPR 2019)
    SPGANNet  model.*, model.fc.0|1, classifier.0        SPGAN's second stage as in eSPGAN's release (Deng et al.)

Both keep the trunk's last stride of 2: a map of 8 x 4 for an image of 256 x 128.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import ResNet, resnet18, resnet50

from lib.errors import UserError

ARCHITECTURES = {"resnet18": resnet18, "resnet50": resnet50}
EARLY = ("conv1", "bn1", "layer1", "layer2")  # what ECN does not train


def feature_map(trunk: ResNet, x: Tensor) -> Tensor:
    """x [N, 3, H, W] -> the last map [N, C, H/32, W/32]; C = 512 (ResNet-18) or 2048 (ResNet-50)."""
    x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
    return trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(x))))


class IDNet(nn.Module):
    """v = mean of the last map -> FC -> BN = h; from h the logits of the source, or the target's feature.

    features: width of h; 0 leaves FC and BN out, so that h = v (SPGAN's Caffe network). base.fc is torchvision's and
    never used; it stands here because it stands in the released files.
    """

    head_names = ("feat", "feat_bn", "classifier")
    not_pretrained = ("base.fc",)

    def __init__(self, num_classes: int, arch: str = "resnet50", features: int = 4096, dropout: float = 0.5):
        super().__init__()
        self.base = ARCHITECTURES[arch]()
        width = self.channels = self.base.fc.in_features
        if features:
            self.feat = nn.Linear(width, features)
            self.feat_bn = nn.BatchNorm1d(features)
            nn.init.kaiming_normal_(self.feat.weight, mode="fan_out")
            nn.init.zeros_(self.feat.bias)
        self.features = features or width
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.features, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    @property
    def trunk(self) -> ResNet:
        return self.base

    def embed(self, v: Tensor) -> Tensor:
        """v [N, C] -> h [N, features]."""
        return self.feat_bn(self.feat(v)) if hasattr(self, "feat") else v

    def forward(self, x: Tensor, output: str = "source") -> Tensor:
        """Images [N, 3, H, W] -> logits [N, ids] ("source"), or the feature [N, features] of the memory ("target").

        The target branch has no ReLU, and its dropout comes after the norm: what the memory and its logits see has
        half of its entries at zero and a length of about 1.4.
        """
        h = self.embed(feature_map(self.base, x).mean((2, 3)))
        if output == "target":
            return self.dropout(F.normalize(h))
        return self.classifier(self.dropout(F.relu(h) if hasattr(self, "feat") else h))


class SPGANNet(nn.Module):
    """v = mean of the last map -> FC -> BN = h -> LeakyReLU -> dropout -> logits."""

    head_names = ("classifier",)
    not_pretrained = ("model.fc.0", "model.fc.1")

    def __init__(self, num_classes: int, arch: str = "resnet50", features: int = 512, dropout: float = 0.5):
        super().__init__()
        self.model = ARCHITECTURES[arch]()
        self.channels, self.features = self.model.fc.in_features, features
        self.model.fc = nn.Sequential(nn.Linear(self.channels, features), nn.BatchNorm1d(features), nn.LeakyReLU(0.1),
                                      nn.Dropout(dropout))
        self.classifier = nn.Sequential(nn.Linear(features, num_classes))
        nn.init.kaiming_normal_(self.model.fc[0].weight, mode="fan_out")
        nn.init.zeros_(self.model.fc[0].bias)
        nn.init.normal_(self.classifier[0].weight, std=0.001)
        nn.init.zeros_(self.classifier[0].bias)

    @property
    def trunk(self) -> ResNet:
        return self.model

    def embed(self, v: Tensor) -> Tensor:
        """v [N, C] -> h [N, features]."""
        return self.model.fc[1](self.model.fc[0](v))

    def forward(self, x: Tensor, output: str = "source") -> Tensor:
        """Images [N, 3, H, W] -> logits [N, ids]."""
        return self.classifier(self.model.fc(feature_map(self.model, x).mean((2, 3))))


# --- features for retrieval ----------------------------------------------------------------------------------------


def local_max_pool(maps: Tensor, parts: int) -> Tensor:
    """Maximum over each of ``parts`` horizontal stripes of maps [N, C, h, w] -> [N, C * parts] (SPGAN's LMP).

    Part i covers rows floor(i h / parts) to ceil((i + 1) h / parts) - 1. On the 7 x 7 map of the Caffe network two
    parts are its window of 4 x 7 with stride 3.
    """
    return F.adaptive_max_pool2d(maps, (parts, 1)).flatten(1)


def retrieval_features(net: IDNet | SPGANNet, x: Tensor, output: str = "pool5", *, lmp: int = 0,
                       mirrored: bool = False) -> Tensor:
    """Images [N, 3, H, W] -> features of length 1, by which people are found; ``net`` is in eval mode.

    output: "pool5" (v, [N, C]) or "fc" (h, [N, features]). lmp: the maxima of that many horizontal parts in place of v
    ([N, C * lmp]; not with "fc"). mirrored: the feature of the mirrored image is added, as eSPGAN's release does.
    """
    def of(image: Tensor) -> Tensor:
        maps = feature_map(net.trunk, image)
        v = local_max_pool(maps, lmp) if lmp else maps.mean((2, 3))
        return net.embed(v) if output == "fc" else v

    return F.normalize(of(x) + of(x.flip(3)) if mirrored else of(x))


# --- what trains ---------------------------------------------------------------------------------------------------


def set_train_mode(net: IDNet | SPGANNet, bn: str) -> None:
    """Training mode, but for the batch norms whose statistics stay as they are.

    bn: "train" (every norm uses and updates batch statistics), "trunk" (those of the trunk stay), "fixed" (all stay)
    or "ecn": those before layer3 stay, the shortcuts' excepted. ECN's release selects by "bn" in the name, and the
    norms of the shortcuts are called downsample.1.
    """
    net.train()
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm) and _stays(name, bn):
            module.eval()


def _stays(name: str, bn: str) -> bool:
    root, _, rest = name.partition(".")
    in_trunk = root in ("base", "model") and not rest.startswith("fc.")
    return {"train": False, "trunk": in_trunk, "fixed": True,
            "ecn": in_trunk and rest.split(".")[0] in EARLY and rest.split(".")[-1].startswith("bn")}[bn]


def freeze(net: IDNet | SPGANNet, modules: Iterable[str] = EARLY) -> None:
    """No gradient for these parts of the trunk, the weights and biases of their norms included."""
    for name in modules:
        getattr(net.trunk, name).requires_grad_(False)


# --- files ---------------------------------------------------------------------------------------------------------


def recognise(weights: Mapping[str, Tensor], source: object = "the checkpoint") -> dict[str, object]:
    """Layout, depth, width of h and number of identities, from keys and shapes. Raises UserError."""
    for prefix, layout in (("base", IDNet), ("model", SPGANNet)):
        classifier = "classifier.weight" if layout is IDNet else "classifier.0.weight"
        if f"{prefix}.conv1.weight" in weights and classifier in weights and weights[classifier].dim() == 2:
            arch = "resnet50" if f"{prefix}.layer1.0.conv3.weight" in weights else "resnet18"
            width = weights["feat.weight" if layout is IDNet else "model.fc.0.weight"].shape[0] \
                if layout is SPGANNet or "feat.weight" in weights else 0
            return {"layout": layout, "arch": arch, "features": width, "num_classes": len(weights[classifier])}
    some = ", ".join(list(weights)[:4])
    raise UserError(f"{source} holds no re-identification network: expected base.* and classifier.*, or model.* and "
                    f"classifier.0.*, and found {some}, ...")


def from_weights(weights: Mapping[str, Tensor], source: object = "the checkpoint") -> IDNet | SPGANNet:
    """The network of a state dict in either layout, in eval mode. Raises UserError where they do not fit."""
    known = recognise(weights, source)
    net = known.pop("layout")(**known)
    own = net.state_dict()
    missing = [k for k in own if k not in weights and not k.startswith("base.fc.")
               and not k.endswith("num_batches_tracked")]
    shapes = [k for k in own if k in weights and weights[k].shape != own[k].shape]
    if missing or shapes:
        raise UserError(f"{source} is not complete: missing {', '.join(missing[:4]) or 'nothing'}; of another shape "
                        f"{', '.join(shapes[:4]) or 'nothing'}")
    net.load_state_dict({k: weights.get(k, v) for k, v in own.items()})
    return net.eval()
