"""LSD: GAN-based alignment of features.

Sankaranarayanan, Balaji, Jain, Lim, Chellappa: "Learning from Synthetic Data: Addressing Domain Shift for Semantic
Segmentation", CVPR 2018, https://arxiv.org/abs/1711.06969. Results: README.md, section "GAN-based feature alignment".

    python train_gan_da.py --demo                    # a miniature pair, minutes on a laptop
    python train_gan_da.py --restore-from imagenet   # data/GTA5 to data/Cityscapes/data

F embeds an image, C labels its pixels, G draws the image back from the embedding. D tells source from target, real from
drawn (four classes a patch), and labels source images. F learns C's task, and embeddings from which G draws source
images that D takes for real target images, and the reverse (table 1). An iteration updates D, then G, then F with C:

    --order recomputed (default): each with the weights just updated, as a GAN is written down, and with a third less
        memory than the others (README.md). Passes are repeated only where weights changed: F runs once an image, G
        twice (before and after its step), D on four images for itself, then on the two drawn ones for G and again for
        F. --low-memory runs F a second time, with dropout masks of its own, instead of holding its activations while D
        and G are updated.
    --order gradients_before_steps: one pass of everything, all gradients with the old weights, then the three steps;
        a fifth faster.
    --order released: one pass of everything, but a step behind each gradient, so that the later backward passes combine
        new weights with old activations. The release did that, on a PyTorch that let it pass.

Deviations from the release: images of any size (G's transposed convolutions are told the size they should reach, and
what remains is cropped); label maps for D are never transposed; the L1 term, a mean over the batch, is not divided by
the batch once more; D's fakes carry no gradient into G and F (the release cleared it unused). The paper's residual
blocks have two convolutions, the release's, and these, one. --padding same and --base deeplab are additions.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, flags, ops, predict, runtime, visual
from lib.datasets.description import Domain, load_description
from lib.datasets.folder import DomainPair, endless, open_pair
from lib.datasets.transforms import PIXELS, Augment
from lib.demo.streets import render_demo
from lib.errors import UserError
from lib.models.deeplab import ARCHITECTURES, Deeplab, set_bn_affine
from lib.models.fcn8s import FCN8s, scaled
from lib.runtime import as_float32

SOURCE_REAL, SOURCE_FAKE, TARGET_REAL, TARGET_FAKE = range(4)  # D's domain classes
# l1, adv, c for each reduction. sum: published, sums over pixels and patches against the one mean of L1. mean: averages
# of every term, with weights that let L1 shape G and D reach F within a short training from random weights (not tuned);
# the published ratios would be (1 / number of D's patches, 0.1 / 64, 0.1 / 64).
WEIGHTS = {"sum": (1.0, 0.1, 0.1), "mean": (10.0, 0.1, 0.1)}
# Choices that change neither the data nor the mathematics of a run, so that a resumed run may change them.
FREE_ARGUMENTS = {"resume", "num_workers", "num_steps", "save_pred_every", "eval_every", "log_every", "log_dir",
                  "tensorboard", "save_num_images", "gpu", "cpu", "check_data", "snapshot_dir", "ops", "compile"}
# --demo: settings for a narrow FCN-8s from random weights on the rendered pair; any flag given besides wins.
DEMO = dict(source="gta5", target="demo", data_dir="data/demo/gta5", data_dir_target="data/demo/cityscapes",
            width=0.125, padding="same", input_size=(96, 48), input_size_target=(96, 48), reduction="mean",
            batch_size=4, num_steps=1200, learning_rate=1e-3, lr_g=1e-3, lr_d=3e-4, lr_epochs=15, adv_weight=0.03,
            random_mirror=True, snapshot_dir="snapshots/demo_gan", save_pred_every=1200, eval_every=1200, num_workers=0)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    method = p.add_argument_group("method")
    method.add_argument("--method", choices=["LSD", "sourceonly"], default="LSD")
    method.add_argument("--source-only", dest="method", action="store_const", const="sourceonly",
                        default=argparse.SUPPRESS, help="the same as --method sourceonly")
    method.add_argument("--reduction", choices=list(WEIGHTS), default="sum", help="cross-entropies: sums over pixels "
                        "divided by the batch, or means over pixels; the weights' defaults follow: "
                        + ", ".join(f"{k} {v}" for k, v in WEIGHTS.items()))
    method.add_argument("--l1_weight", type=flags.amount, help="G: |G(F(x)) - x|_1")
    method.add_argument("--adv_weight", type=flags.amount,
                        help="F: what is drawn must look real and of the other domain")
    method.add_argument("--c_weight", type=flags.amount, help="F: D must label the drawn source image")
    method.add_argument("--order", choices=["recomputed", "gradients_before_steps", "released"], default="recomputed",
                        help="which weights each gradient is taken with")
    method.add_argument("--low-memory", action="store_true", help="recomputed: run F twice, hold one graph at a time")
    method.add_argument("--demo", action="store_true", help="render a small pair, train source-only and adapted")
    net = p.add_argument_group("networks")
    net.add_argument("--base", choices=["fcn8s", "deeplab"], default="fcn8s", help="F and C")
    net.add_argument("--arch", choices=list(ARCHITECTURES), default="resnet101", help="of --base deeplab")
    net.add_argument("--width", type=flags.positive, default=1.0, help="share of the channels of FCN-8s, G and D")
    net.add_argument("--padding", choices=["released", "same"], default="released",
                     help="of FCN-8s: 100 pixels around the image, or none: cheaper on small images")
    net.add_argument("--dropout", type=flags.below_one, default=0.5, help="behind fc6 and fc7")
    net.add_argument("--restore-from", metavar="FILE|imagenet", help="initial weights in any dialect; none: random")
    net.add_argument("--not-restore-last", action="store_true", help="leave the heads of --restore-from out")
    net.add_argument("--pixels", choices=list(PIXELS), help="pixel convention (default: the weights', else caffe)")
    net.add_argument("--num-classes", type=flags.count, help="how many of the target's classes (default: all shared)")
    data = p.add_argument_group("data")
    data.add_argument("--dataroot", help="folder that takes the place of data/ in the descriptions' folders")
    data.add_argument("--source", default="gta5", help="a description in lib/datasets, or a .json file")
    data.add_argument("--target", default="cityscapes", help="likewise")
    data.add_argument("--data-dir", help="source folder (default: the description's)")
    data.add_argument("--data-list", help="file with one source image a line")
    data.add_argument("--source-set", help="set of the source (default: the description's)")
    data.add_argument("--data-dir-target", help="target folder")
    data.add_argument("--data-list-target", help="file with one target image a line")
    data.add_argument("--set", help="set of the target to train on (default: the description's)")
    data.add_argument("--val-set", help="labelled set of the target to score on (default: the description's, if there)")
    data.add_argument("--input-size", type=flags.size, help="width,height source images are resized to (default: the "
                      "description's)")
    data.add_argument("--input-size-target", type=flags.size, help="width,height target images are resized to")
    data.add_argument("--crop-size", type=flags.size, default=(640, 320),
                      help="width,height of the random crops of both; at most the image")
    data.add_argument("--random-mirror", action="store_true", help="mirror images at random")
    data.add_argument("--random-scale", action="store_true", help="scale source images by 0.5..1.5 at random")
    data.add_argument("--ignore-label", type=flags.label, default=255,
                      help="class index without loss; void labels get it")
    data.add_argument("--num-workers", type=flags.natural, default=min(4, os.cpu_count() or 1),
                      help="loader processes of each of the two data sets")
    data.add_argument("--check-data", action="store_true", help="read every file, report, and leave")
    opt = p.add_argument_group("optimisation")
    opt.add_argument("--batchSize", "--batch-size", dest="batch_size", type=flags.count, default=1,
                     help="pairs a process")
    opt.add_argument("--num_iters", "--num-steps", dest="num_steps", type=flags.count, default=100000)
    opt.add_argument("--optimizer", choices=["Adam", "SGD"], default="Adam", help="of F and C")
    opt.add_argument("--lr", "--learning-rate", dest="learning_rate", type=flags.amount, default=1e-5,
                     help="of F and C; biases take twice as much")
    opt.add_argument("--lr-g", type=flags.amount, default=1e-4, help="of G (Adam)")
    opt.add_argument("--lr-d", type=flags.amount, default=1e-4, help="of D (Adam)")
    opt.add_argument("--beta1", type=flags.below_one, default=0.9, help="of F's Adam")
    opt.add_argument("--beta1-gan", type=flags.below_one, default=0.7, help="of G's and D's Adam")
    opt.add_argument("--momentum", type=flags.below_one, default=0.9, help="of F's SGD")
    opt.add_argument("--weight_decay", "--weight-decay", type=flags.amount, default=0.0, help="of F and C")
    opt.add_argument("--lr-epochs", type=flags.natural, default=8,
                     help="passes over the source behind which --lr falls to a tenth, again and again; 0: never")
    out = p.add_argument_group("run")
    out.add_argument("--logdir", "--snapshot-dir", dest="snapshot_dir", default="snapshots/gan_da",
                     help="weights, resume file, log, pictures")
    out.add_argument("--save-pred-every", type=flags.count, default=5000, help="iterations between snapshots")
    out.add_argument("--interval_validate", "--eval-every", dest="eval_every", type=flags.count, default=500,
                     help="iterations between evaluations")
    out.add_argument("--save-num-images", type=flags.natural, default=2, help="rows of the pictures at each evaluation")
    out.add_argument("--log-every", type=flags.count, default=10)
    out.add_argument("--tensorboard", action="store_true")
    out.add_argument("--log-dir", help="folder for TensorBoard (default: --logdir)")
    out.add_argument("--resume", nargs="?", const="", metavar="FILE", help="go on from FILE, by default --logdir's "
                     "resume.pth")
    out.add_argument("--random-seed", type=flags.natural, default=1234)
    out.add_argument("--deterministic", action="store_true")
    out.add_argument("--cpu", action="store_true")
    out.add_argument("--gpu", type=flags.natural, default=0, help="number of the GPU of a single process")
    out.add_argument("--amp", choices=list(runtime.AMP_DTYPES), default="off", help="mixed precision")
    out.add_argument("--compile", action="store_true", help="torch.compile the networks")
    out.add_argument("--ops", choices=["auto", "compiled", "reference"], default="auto", help="kernels of csrc/")
    if p.parse_known_args(argv)[0].demo:
        p.set_defaults(**DEMO)
    args = p.parse_args(argv)
    for name, value in zip(("l1_weight", "adv_weight", "c_weight"), WEIGHTS[args.reduction], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.order != "recomputed" and (args.low_memory or args.compile):
        p.error(f"--order {args.order} holds all graphs: --low-memory and --compile need --order recomputed")
    return args


# --- networks ---------------------------------------------------------------------------------------------------------


class DeeplabBase(Deeplab):
    """DeepLab-v2 as F and C: the embedding is layer4, with layer3 and layer2 as G's skips, all at stride 8."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, ...]:
        """x [N, 3, H, W] -> logits [N, classes, h, w]; with features: (layer4, layer3, layer2, logits)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        layer2 = self.layer2(self.layer1(x))
        layer3 = self.layer3(layer2)
        layer4 = self.layer4(layer3)
        logits = self.layer5(layer4)
        return (layer4, layer3, layer2, logits) if return_features else logits


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


def _init_released(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0, 0.02)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.01, 0.01)


class Generator(nn.Module):
    """G: an image from an embedding and two skips. Section 3.1; the layers of the release.

    channels: of embedding and skips, deepest first. kernel, pad: of the first transposed convolution, which undoes the
    deepest one of F. stride: from the embedding to each skip. pad_image: what F's first convolution padded.
    """

    def __init__(self, channels: Sequence[int], width: float = 1.0, kernel: int = 7, pad: int = 0, stride: int = 2,
                 pad_image: int = 100):
        super().__init__()
        c = [scaled(n, width) for n in (256, 512, 256, 128, 64)]
        self.pad_image = pad_image

        def up(inplanes: int, planes: int, kernel: int, stride: int, pad: int) -> list[nn.Module]:
            return [nn.ConvTranspose2d(inplanes, planes, kernel, stride, pad, bias=False), InstanceNorm(planes),
                    nn.ReLU(), Residual(planes, False, nn.ReLU()), Residual(planes, False, nn.ReLU())]

        self.stage1_upsample = nn.Sequential(*up(channels[0], c[0], kernel, 1, pad), *up(c[0], c[1], 3, stride, 1))
        self.stage2_upsample = nn.Sequential(*up(c[1] + channels[1], c[2], 3, stride, 1))
        self.stage3_upsample = nn.Sequential(*up(c[2] + channels[2], c[3], 5, 2, 2), *up(c[3], c[4], 5, 2, 2))
        self.stage4_upsample = nn.Sequential(nn.ConvTranspose2d(c[4], 3, 8, 2, pad_image))
        _init_released(self)

    def forward(self, embedding: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """(embedding, skip 1, skip 2), each [N, C, h, w] -> image [N, 3, *size] in 0..1, in F's channel order."""
        x, skip1, skip2 = embedding
        half = [(n + 2 * self.pad_image - 5) // 2 for n in size]  # before the last layer, so that it reaches ``size``
        x = draw(self.stage1_upsample[5:], self.stage1_upsample[:5](x), skip1.shape[2:])
        x = draw(self.stage2_upsample, torch.cat([x, skip1], 1), skip2.shape[2:])
        x = draw(self.stage3_upsample[:5], torch.cat([x, skip2], 1), [(n + 1) // 2 for n in half])
        x = draw(self.stage3_upsample[5:], x, half)
        return torch.sigmoid(self.stage4_upsample(x))[:, :, :size[0], :size[1]]


def draw(layers: nn.Sequential, x: Tensor, size: Sequence[int]) -> Tensor:
    """A transposed convolution, told which of the sizes that its stride allows comes nearest, and what follows it."""
    conv = layers[0]
    reach = [(n - 1) * conv.stride[0] - 2 * conv.padding[0] + conv.kernel_size[0] for n in x.shape[2:]]
    size = [min(max(want, least), least + conv.stride[0] - 1) for want, least in zip(size, reach, strict=True)]
    x = conv(x, output_size=size)
    for layer in layers[1:]:
        x = layer(x)
    return x


class Discriminator(nn.Module):
    """D: for each patch of an image in 0..1 its domain (four classes) and, for source images, its label."""

    def __init__(self, num_classes: int, width: float = 1.0):
        super().__init__()
        c, act = scaled(128, width), nn.LeakyReLU(0.2)

        def residuals() -> list[nn.Module]:
            return [Residual(c, True, act) for _ in range(3)]

        self.feature = nn.Sequential(nn.Conv2d(3, c, 4, 2, 2), InstanceNorm(c), act, *residuals(),
                                     nn.MaxPool2d(2), *residuals(), nn.MaxPool2d(2), *residuals())
        self.out_s = nn.Sequential(nn.Conv2d(c, 4, 3, padding=1))
        self.out_c = nn.Sequential(nn.Conv2d(c, num_classes, 3, padding=1))
        _init_released(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, 3, H, W] -> out_s [N, 4, h, w], out_c [N, classes, h, w], h and w from patches()."""
        # instance norm needs more than one patch: tiny images are continued by their last row and column
        x = F.pad(x, (0, max(16 - x.shape[3], 0), 0, max(16 - x.shape[2], 0)), mode="replicate")
        x = self.feature(x)
        return self.out_s(x), self.out_c(x)

    @staticmethod
    def patches(size: Sequence[int]) -> list[int]:
        """Height and width of the output for an image of (height, width)."""
        return [(max(n, 16) // 2 + 1) // 2 // 2 for n in size]


def build(base: str, num_classes: int, arch: str, width: float, padding: str, dropout: float, pixels: str,
          stride_on: str) -> tuple[nn.Module, Callable[[], Generator]]:
    """(F with C, what makes the G that fits it)."""
    if base == "deeplab":
        net = DeeplabBase(num_classes, arch, stride_on=stride_on)
        channels = (net.channels[1], net.channels[0], net.channels[0] // 2)
        return net, lambda: Generator(channels, width, kernel=3, pad=1, stride=1, pad_image=3)
    net = FCN8s(num_classes, width, padding, dropout, image_std=64.0 if pixels == "caffe" else 1.0)
    fit = dict(pad=0, pad_image=100) if padding == "released" else dict(pad=3, pad_image=3)
    return net, lambda: Generator(net.channels, width, **fit)


# --- losses: real and fake are images [N, 3, H, W] in 0..1, score is D's (out_s, out_c) of one of them ----------------


class Objective(NamedTuple):
    """Weights and normalisation of the terms (section 3.2)."""

    l1: float
    adv: float
    c: float
    reduction: str = "sum"
    ignore: int = 255
    adv_g: float = 0.1             # fixed in the release
    valid: Tensor | None = None    # labelled pixels a process, where others hold pixels of the batch too
    valid_d: Tensor | None = None  # the same at the size of D's output


def unit(x: Tensor, pixels: str) -> Tensor:
    """F's input [N, 3, H, W] as D sees it: 0..1, not normalised, the same channel order."""
    p = PIXELS[pixels]
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (p.mean, p.std))
    return (x * std + mean) / (255 * p.scale)


def label_for_d(label: Tensor, size: Sequence[int]) -> Tensor:
    """int64 [N, H, W] -> [N, *size], nearest (Pillow's)."""
    return F.interpolate(label[:, None].double(), tuple(size), mode="nearest-exact")[:, 0].long()


def cross_entropy(score: Tensor, label: Tensor, reduction: str, ignore: int = 255,
                  valid: Tensor | None = None) -> Tensor:
    """[N, C, H, W] against int64 [N, H, W]: the sum over labelled pixels / N, or their mean (0 where there is none).

    valid: the count to divide the mean by, where other processes hold pixels of the batch too.
    """
    total = F.cross_entropy(score, label, ignore_index=ignore, reduction="sum")
    if reduction == "sum":
        return total / len(score)
    return total / ((label != ignore).sum() if valid is None else valid).clamp(min=1e-3)


def loss_seg(logits: Tensor, label: Tensor, o: Objective) -> Tensor:
    """CE(C(F(x_s)), y_s)."""
    return cross_entropy(logits, label, o.reduction, o.ignore, o.valid)


def loss_domain(out_s: Tensor, domain: int, o: Objective) -> Tensor:
    """CE(out_s, domain)."""
    return cross_entropy(out_s, torch.full_like(out_s[:, 0], domain, dtype=torch.int64), o.reduction)


def loss_label(out_c: Tensor, label: Tensor, o: Objective) -> Tensor:
    """CE(out_c, y_s); the label at the size of out_c."""
    return cross_entropy(out_c, label, o.reduction, o.ignore, o.valid_d)


def loss_l1(fake: Tensor, real: Tensor) -> Tensor:
    """|G(F(x)) - x|_1, a mean in both reductions."""
    return F.l1_loss(fake, real)


def loss_d(score: tuple[Tensor, Tensor], domain: int, label: Tensor | None, o: Objective) -> Tensor:
    """D on one image: its domain, and the label map of a real source image."""
    loss = loss_domain(score[0], domain, o)
    return loss if label is None else loss + loss_label(score[1], label, o)


def loss_g(score: tuple[Tensor, Tensor], fake: Tensor, real: Tensor, domain: int, label: Tensor | None,
           o: Objective) -> Tensor:
    """G on one domain: what it draws is like x, real for D, and (source) still shows the labels."""
    loss = o.adv_g * loss_domain(score[0], domain, o) + o.l1 * loss_l1(fake, real)
    return loss if label is None else loss + loss_label(score[1], label, o)


def loss_f(score: tuple[Tensor, Tensor], domain: int, label: Tensor | None, o: Objective) -> Tensor:
    """F on one domain, beside loss_seg: what is drawn from its embedding looks real and of the *other* domain."""
    loss = o.adv * loss_domain(score[0], domain, o)
    return loss if label is None else loss + o.c * loss_label(score[1], label, o)


def update(net: nn.Module, gen: nn.Module | None, dis: nn.Module | None, x_s: Tensor, y_s: Tensor, x_t: Tensor | None,
           o: Objective, *, pixels: str, run: runtime.Run, step: Callable[[nn.Module], None], order: str = "recomputed",
           low_memory: bool = False, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> dict[str, Tensor]:
    """One iteration (x_t None: source only). step(module) must apply the gradients in its parameters.

    Returns the losses of D, G and F as they were minimised, and the unweighted terms a user watches.
    """
    o = o._replace(valid=run.sum((y_s != o.ignore).sum().to(x_s.dtype)) / run.world)

    def embed(x: Tensor) -> tuple[list[Tensor], Tensor]:
        with run.autocast():
            *embedding, logits = net(x, return_features=True)
        logits = as_float32(logits)
        if logits.shape[2:] != x.shape[2:]:
            logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=True)
        return embedding, logits

    def drawn(embedding: Sequence[Tensor], real: Tensor) -> Tensor:
        with run.autocast():
            return as_float32(gen(embedding, real.shape[2:]))

    def judged(image: Tensor) -> tuple[Tensor, Tensor]:
        with run.autocast():
            out_s, out_c = dis(image)
        return as_float32(out_s), as_float32(out_c)

    if x_t is None:
        loss = loss_seg(embed(x_s)[1], y_s, o)
        scale(loss).backward()
        step(net)
        return {"loss_seg": loss}

    real_s, real_t = unit(x_s, pixels), unit(x_t, pixels)
    y_d = label_for_d(y_s, Discriminator.patches(x_s.shape[2:]))
    o = o._replace(valid_d=run.sum((y_d != o.ignore).sum().to(x_s.dtype)) / run.world)
    gen.requires_grad_(True)
    dis.requires_grad_(True)

    if order != "recomputed":
        (emb_s, logits), (emb_t, _) = embed(x_s), embed(x_t)
        fake_s, fake_t = drawn(emb_s, real_s), drawn(emb_t, real_t)
        score_s, score_t = judged(fake_s), judged(fake_t)
        terms = loss_seg(logits, y_s, o), loss_l1(fake_s, real_s), loss_l1(fake_t, real_t)
        losses = {
            dis: loss_d(judged(real_s), SOURCE_REAL, y_d, o) + loss_d(score_s, SOURCE_FAKE, None, o)
            + loss_d(judged(real_t), TARGET_REAL, None, o) + loss_d(score_t, TARGET_FAKE, None, o),
            gen: loss_g(score_s, fake_s, real_s, SOURCE_REAL, y_d, o)
            + loss_g(score_t, fake_t, real_t, TARGET_REAL, None, o),
            net: terms[0] + loss_f(score_s, TARGET_REAL, y_d, o) + loss_f(score_t, SOURCE_REAL, None, o)}
        for module, loss in losses.items():
            parameters = [p for p in module.parameters() if p.requires_grad]
            grads = torch.autograd.grad(scale(loss), parameters, retain_graph=module is not net, allow_unused=True)
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad
            if order == "released":
                # a step that autograd does not see, as those of PyTorch before 0.4
                with torch.autograd._unsafe_preserve_version_counter(tuple(parameters)):
                    step(module)
        if order != "released":
            for module in losses:
                step(module)
        total_d, total_g, total_f = losses.values()
        return {"loss_D": total_d, "loss_G": total_g, "loss_F": total_f, "loss_seg": terms[0],
                "loss_l1": (terms[1] + terms[2]) / 2}

    # D, on images without a graph behind them
    with torch.set_grad_enabled(not low_memory):
        (emb_s, logits), (emb_t, _) = embed(x_s), embed(x_t)
    fake_s, fake_t = (drawn([e.detach() for e in emb], real) for emb, real in ((emb_s, real_s), (emb_t, real_t)))
    total_d = 0.0
    for image, domain, label in ((real_s, SOURCE_REAL, y_d), (fake_s.detach(), SOURCE_FAKE, None),
                                 (real_t, TARGET_REAL, None), (fake_t.detach(), TARGET_FAKE, None)):
        loss = loss_d(judged(image), domain, label, o)
        scale(loss).backward()
        total_d = total_d + loss.detach()
    step(dis)

    # G, whose drawings are still those of its weights; D judges them anew
    dis.requires_grad_(False)
    total_g, l1 = 0.0, 0.0
    for fake, real, domain, label in ((fake_s, real_s, SOURCE_REAL, y_d), (fake_t, real_t, TARGET_REAL, None)):
        loss = loss_g(judged(fake), fake, real, domain, label, o)
        scale(loss).backward()
        total_g, l1 = total_g + loss.detach(), l1 + loss_l1(fake.detach(), real) / 2
    step(gen)
    del fake, fake_s, fake_t

    # F and C: drawn and judged with the new G and D
    gen.requires_grad_(False)
    if low_memory:
        emb_s, logits = embed(x_s)
    seg = loss_seg(logits, y_s, o)
    loss = seg + loss_f(judged(drawn(emb_s, real_s)), TARGET_REAL, y_d, o)
    scale(loss).backward()
    del emb_s, logits
    total_f = loss.detach()
    if low_memory:
        emb_t, _ = embed(x_t)
    loss = loss_f(judged(drawn(emb_t, real_t)), SOURCE_REAL, None, o)
    scale(loss).backward()
    step(net)
    return {"loss_D": total_d, "loss_G": total_g, "loss_F": total_f + loss, "loss_seg": seg, "loss_l1": l1}


# --- the run ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstructions(net: nn.Module, gen: nn.Module, data: DomainPair, size_s: tuple[int, int], size_t: tuple[int, int],
                    pixels: str, most: int, path: Path, run: runtime.Run) -> None:
    """Write panels [source, G(F(source)), target, G(F(target))] of ``most`` training images, spread over each set."""
    modes = net.training, gen.training
    net.eval()
    gen.eval()
    columns: list[list[Image.Image]] = []
    for images, working in ((data.source.images, size_s), (data.target.images, size_t)):
        views, originals, fakes = predict.ViewSet(images, working, pixels), [], []
        for index in np.linspace(0, len(views) - 1, most).astype(int).tolist():
            x = run.place(views[index].tensors[0][None])
            with run.autocast():
                fake = as_float32(gen(net(x, return_features=True)[:3], x.shape[2:]))
            for cells, image in ((originals, unit(x, pixels)), (fakes, fake)):
                array = (255 * image[0].clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
                cells.append(Image.fromarray(np.ascontiguousarray(array[..., ::-1] if PIXELS[pixels].bgr else array)))
        columns += [originals, fakes]
    net.train(modes[0])
    gen.train(modes[1])
    rows = [list(row) for row in zip(*columns, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    visual.panel(rows, ["source", "G(F(source))", "target", "G(F(target))"], min(max(size_s[0], 192), 480)).save(path)


def make_optimizers(net: nn.Module, others: Sequence[nn.Module], *, optimizer: str, lr: float, lr_g: float, lr_d: float,
                    beta1: float, beta1_gan: float, momentum: float,
                    weight_decay: float) -> dict[nn.Module, torch.optim.Optimizer]:
    """F and C: biases of convolutions at twice the rate, what does not train left out. ``others``: G, D or nothing."""
    biases = {id(m.bias) for m in net.modules() if isinstance(m, nn.Conv2d)}
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if id(p) not in biases], lr=lr, lr_mult=1.0),
              dict(params=[p for p in trained if id(p) in biases], lr=2 * lr, lr_mult=2.0)]
    first = torch.optim.Adam(groups, betas=(beta1, 0.999), weight_decay=weight_decay) if optimizer == "Adam" else \
        torch.optim.SGD(groups, lr, momentum, weight_decay=weight_decay)
    return {net: first, **{m: torch.optim.Adam(m.parameters(), rate, (beta1_gan, 0.999))
                           for m, rate in zip(others, (lr_g, lr_d), strict=False)}}


class Outcome(NamedTuple):
    net: nn.Module
    data: DomainPair
    confusion: np.ndarray | None  # of the last weights on the validation set
    pixels: str


def train(args: argparse.Namespace) -> Outcome | int:
    """One run; returns its outcome, or an exit code when it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)

    # initial weights decide the pixel convention
    backbone = "vgg16" if args.base == "fcn8s" else args.arch
    weights, meta = checkpoint.initial_weights(args.restore_from, backbone, fcn=args.base == "fcn8s")
    pixels, stride_on = args.pixels or meta.get("pixels", "caffe"), meta.get("stride_on", "1x1")

    # data
    roots = [given or (str(Path(args.dataroot, Path(d.root).relative_to("data")))
                       if args.dataroot and Path(d.root).parts[0] == "data" else None)
             for given, d in ((args.data_dir, load_description(args.source)),
                              (args.data_dir_target, load_description(args.target)))]
    source = Domain.open(args.source, roots[0], args.source_set, args.data_list, "source")
    target = Domain.open(args.target, roots[1], args.set, args.data_list_target)
    size_s = args.input_size or source.size
    size_t = args.input_size_target or target.size
    crop_s, crop_t = (tuple(map(min, args.crop_size, working)) for working in (size_s, size_t))
    if args.base == "deeplab" and min(*crop_s, *crop_t) < 17:
        raise UserError(f"--base deeplab needs images of at least 17x17, not {crop_s} and {crop_t}: choose a larger "
                        "--input-size, --input-size-target and --crop-size")
    data = open_pair(
        source, target, Augment(size_s, pixels, args.random_scale, args.random_mirror, args.ignore_label, crop_s),
        Augment(size_t, pixels, False, args.random_mirror, args.ignore_label, crop_t), val_set=args.val_set,
        num_classes=args.num_classes, ignore=args.ignore_label, seed=args.random_seed, check_all=args.check_data)
    if args.check_data:
        run.say(f"all files of {args.source} and {args.target} are fine")
        return 0
    prefix = f"{source.name.upper()}_"
    folder = Path(args.snapshot_dir)
    resume_file = Path(args.resume) if args.resume else folder / "resume.pth"

    # networks
    classes = len(data.classes)
    net, make_generator = build(args.base, classes, args.arch, args.width, args.padding, args.dropout, pixels,
                                stride_on)
    loaded = "none, random weights (the paper starts from ImageNet: --restore-from imagenet or a file)"
    if weights is not None:
        loaded = checkpoint.load_into(net, weights, heads=not args.not_restore_last, source=args.restore_from)
    set_bn_affine(net, weights is None)
    net.to(run.device, memory_format=run.memory_format)
    if run.world > 1 and run.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    gen = dis = None
    if args.method == "LSD":
        gen, dis = make_generator().to(run.device), Discriminator(classes, args.width).to(run.device)
    modules = [module for module in (net, gen, dis) if module is not None]

    # optimisers
    optimizers = make_optimizers(net, modules[1:], optimizer=args.optimizer, lr=args.learning_rate, lr_g=args.lr_g,
                                 lr_d=args.lr_d, beta1=args.beta1, beta1_gan=args.beta1_gan, momentum=args.momentum,
                                 weight_decay=args.weight_decay)
    scaler = run.scaler()

    def step(module: nn.Module) -> None:
        run.average_gradients([module])
        scaler.step(optimizers[module])
        module.zero_grad()

    # resume
    validation = None if data.validation is None else predict.Validation(
        data, size_t, pixels, run, folder, bn_stats="running", workers=args.num_workers, most=args.save_num_images)
    first = 0
    everything = net, modules[1:], list(optimizers.values()), scaler
    arguments = {**{k: v for k, v in vars(args).items() if k not in FREE_ARGUMENTS}, "nproc_per_node": run.world}
    if args.resume is not None and resume_file.exists():
        state = checkpoint.load_resume(resume_file, *everything, arguments, FREE_ARGUMENTS)
        first = state["iteration"]
        if validation is not None and state["validation"]:
            validation.load_state_dict(state["validation"])
        loaded = f"resumed at iteration {first}"
    elif args.resume:
        raise UserError(f"--resume {resume_file}: no such file")
    elif args.resume is not None:
        run.say(f"note: there is no {resume_file} yet: starting at the beginning")
    elif resume_file.exists():
        run.say(f"note: {resume_file} of an earlier run will be overwritten (--resume goes on with it)")
    resume_file = folder / "resume.pth"

    runtime.header(run, {
        "kernels": ops.backend(), "weights": loaded,
        "networks": f"{args.base} {backbone}, {classes} classes, width {args.width:g}"
                    + f", padding {args.padding}" * (args.base == "fcn8s"),
        "method": args.method + ("" if gen is None else f", order {args.order}{', low memory' * args.low_memory}, "
                                 f"{args.reduction}, weights l1 {args.l1_weight:g}, adv {args.adv_weight:g}, "
                                 f"c {args.c_weight:g}"),
        "pixels": pixels, "source": f"{len(data.source)} images of {args.source} at {size_s}, crops {crop_s}",
        "target": "none in training" if gen is None else
                  f"{len(data.target)} images of {args.target} at {size_t}, crops {crop_t}",
        "validation": "none" if data.validation is None else f"{len(data.validation)} images of {args.target}",
        "batch": f"{args.batch_size * run.world} pairs a step = {args.batch_size} x {run.world} processes",
        "steps": f"{first} to {args.num_steps}, {args.optimizer}", "output": folder})
    if args.compile:
        for module in modules:
            module.compile()

    def meta_of(iteration: int) -> dict[str, object]:
        model = {"model": "FCN8s", "width": args.width, "padding": args.padding} if args.base == "fcn8s" else \
            {"model": "Deeplab", "aspp": "released", "stride_on": stride_on}
        return {"script": "train_gan_da.py", "iteration": iteration, **model, "arch": backbone, "pixels": pixels,
                "task": args.target, "classes": list(data.classes), "size": list(size_t), "align_corners": True}

    def save(iteration: int, snapshot: bool) -> None:
        """The resume file, and with ``snapshot`` the weights under the names of the release."""
        if not run.is_main:
            return
        if snapshot:
            for module, name in zip(modules, ("", "_G", "_D"), strict=False):
                checkpoint.save_weights(module, folder / f"{prefix}{iteration}{name}.pth", meta_of(iteration))
        checkpoint.save_resume(resume_file, *everything, meta_of(iteration), iteration=iteration, arguments=arguments,
                               validation=validation and validation.state_dict())

    def evaluate(iteration: int) -> None:
        if validation is not None:
            validation(net, iteration, meta_of(iteration), log)
        if gen is not None and run.is_main and args.save_num_images:
            reconstructions(net, gen, data, size_s, size_t, pixels, args.save_num_images,
                            folder / "reconstructions" / f"{iteration}.png", run)

    # the loop
    tensorboard = Path(args.log_dir or folder) if args.tensorboard else None
    log = runtime.Log(run, folder / "log.jsonl", first, args.num_steps, tensorboard)
    stream = dict(batch=args.batch_size, workers=args.num_workers, start=first, rank=run.rank, world=run.world,
                  pin=run.device.type == "cuda")
    batches_s = endless(data.source, seed=args.random_seed, **stream)
    batches_t = None if gen is None else endless(data.target, seed=args.random_seed + 1, **stream)
    objective = Objective(args.l1_weight, args.adv_weight, args.c_weight, args.reduction, args.ignore_label)
    for module in modules:
        module.train()
    last_good = resume_file if first else None
    with runtime.StopRequest() as stop:
        for i in range(first, args.num_steps):
            epoch = i * args.batch_size * run.world // len(data.source)
            lr = args.learning_rate * (0.1 ** (epoch // args.lr_epochs) if args.lr_epochs else 1.0)
            for group in optimizers[net].param_groups:
                group["lr"] = lr * group["lr_mult"]
            # dropout masks that a resumed run repeats, and that differ between processes
            torch.manual_seed(int(np.random.SeedSequence([args.random_seed, i, run.rank]).generate_state(1)[0]))
            batch_s = next(batches_s)
            batch_t = next(batches_t) if batches_t is not None else None
            losses = update(
                net, gen, dis, run.place(batch_s.image), batch_s.label.to(run.device),
                None if batch_t is None else run.place(batch_t.image), objective, pixels=pixels, run=run, step=step,
                order=args.order, low_memory=args.low_memory, scale=scaler.scale)
            scaler.update()
            values = run.mean_values({k: v.detach() for k, v in losses.items()})
            names = [*batch_s.name, *(batch_t.name if batch_t is not None else ())]
            runtime.require_finite(values, i + 1, names, last_good)

            done = i + 1
            runtime.require_finite_weights(modules, done, names, last_good)
            log.step()
            if done % args.log_every == 0 or done == args.num_steps:
                log.losses(done, {**values, "lr": lr})
            if done % args.eval_every == 0 or done == args.num_steps:
                evaluate(done)
            leaving = run.any(stop.signal is not None)
            snapshot = done % args.save_pred_every == 0 or done == args.num_steps
            if snapshot or leaving:
                save(done, snapshot)
                last_good = resume_file
            if leaving and done < args.num_steps:
                log.close()
                run.say(f"stopped at iteration {done}; --resume goes on from {resume_file}")
                return 128 + (stop.signal or 0)
    if validation is not None:
        if validation.iteration != args.num_steps:  # resumed at its end, which had not been scored
            evaluate(args.num_steps)
        validation.report()
    log.close()
    run.barrier()
    return Outcome(net, data, validation and validation.confusion, pixels)


def demo(args: argparse.Namespace) -> int:
    """Train source-only and adapted on the rendered pair, print their tables, draw result/demo_gan/report.png."""
    outcomes = []
    for name, method in (("source only", "sourceonly"), ("adapted", "LSD")):
        print(f"--- {name}")
        folder = f"{args.snapshot_dir}/{name.replace(' ', '_')}"
        outcome = train(argparse.Namespace(**{**vars(args), "method": method, "snapshot_dir": folder}))
        if isinstance(outcome, int):
            return outcome
        outcomes.append(outcome)
    source_only, adapted = outcomes
    run = runtime.Run(next(adapted.net.parameters()).device, 0, 1, "off")
    predict.compare((source_only.net, source_only.confusion), (adapted.net, adapted.confusion), adapted.data,
                    args.input_size_target, adapted.pixels, run, Path("result/demo_gan/report.png"),
                    bn_stats="running", workers=args.num_workers)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.demo:
        render_demo(Path("data/demo"), seed=args.random_seed)
    if args.demo and args.method == "LSD":
        return demo(args)
    outcome = train(args)
    return outcome if isinstance(outcome, int) else 0


if __name__ == "__main__":
    runtime.cli(main)
