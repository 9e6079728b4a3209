"""LSD: GAN-based alignment of features.

Sankaranarayanan, Balaji, Jain, Lim, Chellappa: "Learning from Synthetic Data: Addressing Domain Shift for Semantic
Segmentation", CVPR 2018, https://arxiv.org/abs/1711.06969. Results: docs/gan_da.md.

    python train_gan_da.py --demo                    # a miniature pair, minutes on a laptop
    python train_gan_da.py --restore-from imagenet   # data/GTA5 to data/Cityscapes/data

F embeds an image, C labels its pixels, G draws the image back from the embedding. D tells source from target, real from
drawn (four classes a patch), and labels source images. F learns C's task, and embeddings from which G draws source
images that D takes for real target images, and the reverse (table 1). An iteration updates D, then G, then F with C:

    --order recomputed (default): each with the weights just updated, as a GAN is written down, and with a third less
        memory than the others. Passes are repeated only where weights changed: F runs once an image, G twice (before
        and after its step), D on four images for itself, then on the two drawn ones for G and again for F.
        --low-memory runs F a second time, with its own dropout masks, instead of holding its activations while D and
        G are updated.
    --order gradients_before_steps: one pass of everything, all gradients with the old weights, then the three steps;
        a fifth faster.
    --order released: one pass of everything, with a step right after each gradient, so that the later backward passes
        combine new weights with old activations. The release did that, on a PyTorch that did not notice.

Deviations from the release: images of any size (G's transposed convolutions are told the size they should reach, and
what remains is cropped); label maps for D are never transposed; D's fakes carry no gradient into G and F (the release
cleared it unused). The paper's residual blocks have two convolutions, the release's, and these, one. --padding same and
--base deeplab are additions.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, flags, ops, predict, runtime
from lib.datasets.description import Domain, load_description
from lib.datasets.folder import open_pair
from lib.datasets.transforms import Augment, to_unit
from lib.demo.comparison import train_and_compare
from lib.demo.streets import render_demo
from lib.errors import UserError
from lib.models.deeplab import Deeplab, downsample, set_bn_affine, upsample
from lib.models.fcn8s import FCN8s, scaled
from lib.models.lsd import InstanceNorm, Residual, init_released, up, upsampled
from lib.runtime import as_float32
from lib.session import Session

SOURCE_REAL, SOURCE_FAKE, TARGET_REAL, TARGET_FAKE = range(4)  # D's domain classes
# l1, adv, c for each reduction. sum: published, sums over pixels and patches against the one mean of L1. mean: averages
# of every term, with weights that let L1 shape G and D reach F within a short training from random weights (not tuned);
# the published ratios would be (1 / number of D's patches, 0.1 / 64, 0.1 / 64).
WEIGHTS = {"sum": (1.0, 0.1, 0.1), "mean": (10.0, 0.1, 0.1)}
# --demo: settings for a narrow FCN-8s from random weights on the rendered pair; flags given override them.
DEMO = dict(**flags.DEMO_DATA, snapshot_dir="snapshots/demo_gan/{seed}", width=0.125, padding="same",
            input_size=(96, 48), input_size_target=(96, 48), reduction="mean", batch_size=4, num_steps=1200,
            learning_rate=1e-3, lr_g=1e-3, lr_d=3e-4, lr_epochs=15, adv_weight=0.03, random_mirror=True,
            save_pred_every=1200, eval_every=1200)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__)
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
    net = flags.add_network(p)
    net.add_argument("--base", choices=["fcn8s", "deeplab"], default="fcn8s", help="F and C")
    net.add_argument("--width", type=flags.width, default=1.0, help="share of the channels of FCN-8s, G and D")
    net.add_argument("--padding", choices=["released", "same"], default="released",
                     help="of FCN-8s: 100 pixels around the image, or none: cheaper on small images")
    net.add_argument("--dropout", type=flags.below_one, default=0.5, help="after fc6 and fc7 of FCN-8s")
    data = flags.add_data(p, augmentation=True)
    data.add_argument("--dataroot", help="folder that takes the place of data/ in the descriptions' folders")
    data.add_argument("--crop-size", type=flags.size, default=(640, 320),
                      help="width,height of the random crops of both; at most the image")
    opt = p.add_argument_group("optimisation")
    opt.add_argument("--batchSize", "--batch-size", dest="batch_size", type=flags.batch, default=1,
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
                     help="passes over the source after which --lr falls to a tenth, again and again; 0: never")
    flags.add_run(p, aliases={"--snapshot-dir": "--logdir", "--eval-every": "--interval_validate"}, resume_file=True,
                  evaluate="iterations between evaluations")
    p.set_defaults(eval_every=500)
    args = flags.parse(p, argv, DEMO)
    if args.method == "sourceonly":
        p.note("with --method sourceonly", "l1_weight", "adv_weight", "c_weight", "order", "low_memory", "lr_g", "lr_d",
               "beta1_gan")
    p.note(f"with --base {args.base}", *(["arch"] if args.base == "fcn8s" else ["padding", "dropout"]))
    p.note(f"with --optimizer {args.optimizer}", "momentum" if args.optimizer == "Adam" else "beta1")
    if args.data_dir and args.data_dir_target:
        p.note("where both folders are named (--data-dir and --data-dir-target, --demo)", "dataroot")
    args.snapshot_dir = args.snapshot_dir or flags.run_folder(
        "gan_da", args.source, args.target, source_only=args.method == "sourceonly", deeplab=args.base == "deeplab")
    for name, value in zip(("l1_weight", "adv_weight", "c_weight"), WEIGHTS[args.reduction], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.order != "recomputed" and (args.low_memory or args.compile):
        p.error(f"--order {args.order} holds all graphs: --low-memory and --compile need --order recomputed")
    return args


# --- networks ---------------------------------------------------------------------------------------------------------


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
        self.stage1_upsample = nn.Sequential(*up(channels[0], c[0], kernel, 1, pad), *up(c[0], c[1], 3, stride, 1))
        self.stage2_upsample = nn.Sequential(*up(c[1] + channels[1], c[2], 3, stride, 1))
        self.stage3_upsample = nn.Sequential(*up(c[2] + channels[2], c[3], 5, 2, 2), *up(c[3], c[4], 5, 2, 2))
        self.stage4_upsample = nn.Sequential(nn.ConvTranspose2d(c[4], 3, 8, 2, pad_image))
        init_released(self)

    def forward(self, embedding: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """(embedding, skip 1, skip 2), each [N, C, h, w] -> image [N, 3, *size] in 0..1, in F's channel order."""
        x, skip1, skip2 = embedding
        half = [(n + 2 * self.pad_image - 5) // 2 for n in size]  # before the last layer, so that it reaches ``size``
        x = upsampled(self.stage1_upsample[5:], self.stage1_upsample[:5](x), skip1.shape[2:])
        x = upsampled(self.stage2_upsample, torch.cat([x, skip1], 1), skip2.shape[2:])
        x = upsampled(self.stage3_upsample[:5], torch.cat([x, skip2], 1), [(n + 1) // 2 for n in half])
        x = upsampled(self.stage3_upsample[5:], x, half)
        return torch.sigmoid(self.stage4_upsample(x))[:, :, :size[0], :size[1]]


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
        init_released(self)

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
        net = Deeplab(num_classes, arch, stride_on=stride_on)
        return net, lambda: Generator(net.channels[::-1], width, kernel=3, pad=1, stride=1, pad_image=3)
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
    world: int = 1                 # processes that share the batch


def label_for_d(label: Tensor, size: Sequence[int]) -> Tensor:
    """int64 [N, H, W] -> [N, *size], as Pillow's nearest."""
    return downsample(label, size, "nearest-exact")


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
    l1 = loss_l1(fake, real)
    if o.reduction == "sum":  # the release divides all of G's loss by the batch, this mean too
        l1 = l1 / (len(real) * o.world)
    loss = o.adv_g * loss_domain(score[0], domain, o) + o.l1 * l1
    return loss if label is None else loss + loss_label(score[1], label, o)


def loss_f(score: tuple[Tensor, Tensor], domain: int, label: Tensor | None, o: Objective) -> Tensor:
    """F on one domain, beside loss_seg: what is drawn from its embedding looks real and of the *other* domain."""
    loss = o.adv * loss_domain(score[0], domain, o)
    return loss if label is None else loss + o.c * loss_label(score[1], label, o)


# --- one iteration ----------------------------------------------------------------------------------------------------


class Networks(NamedTuple):
    """F with C, G and D, each in the run's precision; outputs are in at least float32."""

    net: nn.Module
    gen: nn.Module | None
    dis: nn.Module | None
    run: runtime.Run

    def embed(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """x -> (F(x): the embedding and two skips, C(F(x)): logits at the size of x)."""
        with self.run.autocast():
            *embedding, logits = self.net(x, return_features=True)
        return embedding, as_float32(logits) if logits.shape[2:] == x.shape[2:] else upsample(logits, x.shape[2:])

    def draw(self, embedding: Sequence[Tensor], real: Tensor) -> Tensor:
        """G(F(x)), at the size of x."""
        with self.run.autocast():
            return as_float32(self.gen(embedding, real.shape[2:]))

    def judge(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """D(image): domain and label scores of its patches."""
        with self.run.autocast():
            out_s, out_c = self.dis(image)
        return as_float32(out_s), as_float32(out_c)


def step(nets: Networks, x_s: Tensor, y_s: Tensor, x_t: Tensor | None, o: Objective, *, pixels: str,
         apply: Callable[[nn.Module], None], order: str = "recomputed", low_memory: bool = False,
         scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> dict[str, Tensor]:
    """One iteration (x_t None: source only). apply(module) must apply the gradients in its parameters.

    Returns the losses of D, G and F as they were minimised, and the unweighted terms a user watches.
    """
    net, gen, dis, run = nets
    o = o._replace(valid=run.sum((y_s != o.ignore).sum().to(x_s.dtype)) / run.world, world=run.world)
    if x_t is None:
        loss = loss_seg(nets.embed(x_s)[1], y_s, o)
        scale(loss).backward()
        apply(net)
        return {"loss_seg": loss}

    real_s, real_t = to_unit(x_s, pixels), to_unit(x_t, pixels)
    y_d = label_for_d(y_s, Discriminator.patches(x_s.shape[2:]))
    o = o._replace(valid_d=run.sum((y_d != o.ignore).sum().to(x_s.dtype)) / run.world)
    gen.requires_grad_(True)
    dis.requires_grad_(True)
    if order != "recomputed":
        return step_of_one_pass(nets, x_s, y_s, x_t, real_s, real_t, y_d, o, order=order, apply=apply, scale=scale)

    # D, on images without a graph behind them
    with torch.set_grad_enabled(not low_memory):
        (emb_s, logits), (emb_t, _) = nets.embed(x_s), nets.embed(x_t)
    fake_s, fake_t = (nets.draw([e.detach() for e in emb], real) for emb, real in ((emb_s, real_s), (emb_t, real_t)))
    total_d = 0.0
    for image, domain, label in ((real_s, SOURCE_REAL, y_d), (fake_s.detach(), SOURCE_FAKE, None),
                                 (real_t, TARGET_REAL, None), (fake_t.detach(), TARGET_FAKE, None)):
        loss = loss_d(nets.judge(image), domain, label, o)
        scale(loss).backward()
        total_d = total_d + loss.detach()
    apply(dis)

    # G, whose drawings are still those of its weights; D judges them anew
    dis.requires_grad_(False)
    total_g, l1 = 0.0, 0.0
    for fake, real, domain, label in ((fake_s, real_s, SOURCE_REAL, y_d), (fake_t, real_t, TARGET_REAL, None)):
        loss = loss_g(nets.judge(fake), fake, real, domain, label, o)
        scale(loss).backward()
        total_g, l1 = total_g + loss.detach(), l1 + loss_l1(fake.detach(), real) / 2
    apply(gen)
    del fake, fake_s, fake_t

    # F and C: drawn and judged with the new G and D
    gen.requires_grad_(False)
    if low_memory:
        emb_s, logits = nets.embed(x_s)
    seg = loss_seg(logits, y_s, o)
    loss = seg + loss_f(nets.judge(nets.draw(emb_s, real_s)), TARGET_REAL, y_d, o)
    scale(loss).backward()
    del emb_s, logits
    total_f = loss.detach()
    if low_memory:
        emb_t, _ = nets.embed(x_t)
    loss = loss_f(nets.judge(nets.draw(emb_t, real_t)), SOURCE_REAL, None, o)
    scale(loss).backward()
    apply(net)
    return {"loss_D": total_d, "loss_G": total_g, "loss_F": total_f + loss, "loss_seg": seg, "loss_l1": l1}


def step_of_one_pass(nets: Networks, x_s: Tensor, y_s: Tensor, x_t: Tensor, real_s: Tensor, real_t: Tensor, y_d: Tensor,
                     o: Objective, *, order: str, apply: Callable[[nn.Module], None],
                     scale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The orders gradients_before_steps and released: all losses from one pass with the old weights."""
    net, gen, dis, _ = nets
    (emb_s, logits), (emb_t, _) = nets.embed(x_s), nets.embed(x_t)
    fake_s, fake_t = nets.draw(emb_s, real_s), nets.draw(emb_t, real_t)
    score_s, score_t = nets.judge(fake_s), nets.judge(fake_t)
    seg, l1_s, l1_t = loss_seg(logits, y_s, o), loss_l1(fake_s, real_s), loss_l1(fake_t, real_t)
    losses = {
        dis: loss_d(nets.judge(real_s), SOURCE_REAL, y_d, o) + loss_d(score_s, SOURCE_FAKE, None, o)
        + loss_d(nets.judge(real_t), TARGET_REAL, None, o) + loss_d(score_t, TARGET_FAKE, None, o),
        gen: loss_g(score_s, fake_s, real_s, SOURCE_REAL, y_d, o)
        + loss_g(score_t, fake_t, real_t, TARGET_REAL, None, o),
        net: seg + loss_f(score_s, TARGET_REAL, y_d, o) + loss_f(score_t, SOURCE_REAL, None, o)}
    for module, loss in losses.items():
        parameters = [p for p in module.parameters() if p.requires_grad]
        grads = torch.autograd.grad(scale(loss), parameters, retain_graph=module is not net, allow_unused=True)
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        if order == "released":
            # a step that autograd does not see, as those of PyTorch before 0.4
            with torch.autograd._unsafe_preserve_version_counter(tuple(parameters)):
                apply(module)
    if order == "gradients_before_steps":
        for module in losses:
            apply(module)
    total_d, total_g, total_f = losses.values()
    return {"loss_D": total_d, "loss_G": total_g, "loss_F": total_f, "loss_seg": seg, "loss_l1": (l1_s + l1_t) / 2}


# --- the run ----------------------------------------------------------------------------------------------------------


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


def train(args: argparse.Namespace) -> Session:
    """One run; ``exit_code`` of the result is not 0 where it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)
    folder = Path(args.snapshot_dir)

    # initial weights decide the pixel convention
    backbone = "vgg16" if args.base == "fcn8s" else args.arch
    weights, meta = checkpoint.initial_weights(args.restore_from, backbone, fcn=args.base == "fcn8s")
    pixels, stride_on = args.pixels or meta.get("pixels", "caffe"), meta.get("stride_on", "1x1")

    # data
    for data, root, flag in ((args.source, args.data_dir, "--data-dir"),
                             (args.target, args.data_dir_target, "--data-dir-target")):
        if args.dataroot and not root and Path(own := load_description(data).root).parts[:1] != ("data",):
            raise UserError(f"--dataroot takes the place of data/, but {data} lies in {own}: name its folder by {flag}")
    source = Domain.open(args.source, args.data_dir, args.source_set, args.data_list, "source", args.dataroot)
    target = Domain.open(args.target, args.data_dir_target, args.set, args.data_list_target, dataroot=args.dataroot)
    size_s, size_t = args.input_size or source.size, args.input_size_target or target.size
    crop_s, crop_t = (tuple(map(min, args.crop_size, size)) for size in (size_s, size_t))
    if args.base == "deeplab" and min(*crop_s, *crop_t) < 17:
        raise UserError(f"--base deeplab needs images of at least 17x17, not {crop_s} and {crop_t}: choose a larger "
                        "--input-size, --input-size-target and --crop-size")
    data = open_pair(
        source, target, Augment(size_s, pixels, args.random_scale, args.random_mirror, args.ignore_label, crop_s),
        Augment(size_t, pixels, False, args.random_mirror, args.ignore_label, crop_t), val_set=args.val_set,
        num_classes=args.num_classes, ignore=args.ignore_label, seed=args.random_seed, check_all=args.check_data)
    if args.check_data:
        run.say(f"all files of {args.source} and {args.target} are fine")
        raise SystemExit(0)

    # networks
    classes = len(data.classes)
    net, make_generator = build(args.base, classes, args.arch, args.width, args.padding, args.dropout, pixels,
                                stride_on)
    loaded = checkpoint.initialise(net, weights, heads=not args.not_restore_last, source=args.restore_from,
                                   aspp=meta.get("aspp", "released"))
    set_bn_affine(net, weights is None)
    net = run.place_net(net, compiled=args.compile)
    gen = dis = None
    modules = {"": net}
    if args.method == "LSD":
        gen = run.place_net(make_generator(), compiled=args.compile)
        dis = run.place_net(Discriminator(classes, args.width), compiled=args.compile)
        modules |= {"_G": gen, "_D": dis}
    nets = Networks(net, gen, dis, run)
    objective = Objective(args.l1_weight, args.adv_weight, args.c_weight, args.reduction, args.ignore_label)

    # optimisers
    optimizers = make_optimizers(net, list(modules.values())[1:], optimizer=args.optimizer, lr=args.learning_rate,
                                 lr_g=args.lr_g, lr_d=args.lr_d, beta1=args.beta1, beta1_gan=args.beta1_gan,
                                 momentum=args.momentum, weight_decay=args.weight_decay)
    scaler = run.scaler()

    def apply(module: nn.Module) -> None:
        run.average_gradients([module])
        scaler.step(optimizers[module])
        module.zero_grad()

    def meta_of(iteration: int) -> dict[str, object]:
        model = {"model": "FCN8s", "width": args.width, "padding": args.padding} if args.base == "fcn8s" else \
            {"model": "Deeplab", "aspp": "released", "stride_on": stride_on}
        return {"script": "train_gan_da.py", "iteration": iteration, **model, "arch": backbone, "pixels": pixels,
                "task": args.target, "classes": list(data.classes), "size": list(size_t), "align_corners": True}

    validation = None if data.validation is None else predict.Validation(
        data, size_t, pixels, run, folder, bn_stats="running", workers=args.num_workers,
        max_pictures=args.save_num_images)
    with Session(run, args, folder, modules, optimizers.values(), scaler=scaler, meta=meta_of,
                 prefix=f"{source.name.upper()}_", validation=validation, free={"num_steps"}) as session:
        fcn8s = f", width {args.width:g}, padding {args.padding}" if args.base == "fcn8s" else ""
        low_memory = ", low memory" if args.low_memory else ""
        session.header({
            "weights": loaded, "networks": f"{args.base} {backbone}, {classes} classes{fcn8s}",
            "method": args.method if gen is None else
                      f"LSD, order {args.order}{low_memory}, {args.reduction}, weights l1 {args.l1_weight:g}, "
                      f"adv {args.adv_weight:g}, c {args.c_weight:g}",
            "pixels": pixels, **data.summary(f"{size_s}, crops {crop_s}", f"{size_t}, crops {crop_t}", gen is not None),
            "batch": f"{args.batch_size * run.world} pairs a step = {args.batch_size} x {run.world} processes",
            "steps": f"{session.iteration} to {args.num_steps}, {args.optimizer}"})
        pairs = session.pairs(data, args.random_seed, source_only=gen is None)
        for module in modules.values():
            module.train()
        for i in session.steps(args.num_steps):
            epoch = i * args.batch_size * run.world // len(data.source)
            lr = args.learning_rate * (0.1 ** (epoch // args.lr_epochs) if args.lr_epochs else 1.0)
            for group in optimizers[net].param_groups:
                group["lr"] = lr * group["lr_mult"]
            # dropout masks that a resumed run repeats, and that differ between processes
            torch.manual_seed(int(np.random.SeedSequence([args.random_seed, i, run.rank]).generate_state(1)[0]))
            x_s, y_s, x_t, names = next(pairs)
            losses = step(nets, x_s, y_s, x_t, objective, pixels=pixels, apply=apply, order=args.order,
                          low_memory=args.low_memory, scale=scaler.scale)
            scaler.update()
            session.end_step(losses, names, lr=lr)
            if session.is_due(args.eval_every) and gen is not None and run.is_main and args.save_num_images:
                predict.reconstructions([net, gen], lambda x: nets.draw(nets.embed(x)[0], x), data, (size_s, size_t),
                                        pixels, args.save_num_images, folder / "reconstructions" / f"{i + 1}.png", run)
    return session


def demo(args: argparse.Namespace) -> int:
    """Train source-only and adapted on the rendered pair, print their tables, draw result/demo_gan/report.png."""
    return train_and_compare(train, args, {"method": "sourceonly"}, {}, Path("result/demo_gan/report.png"))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.demo:
        render_demo(Path(f"data/demo/{args.random_seed}"), seed=args.random_seed)
    if args.demo and args.method == "LSD":
        return demo(args)
    return train(args).exit_code


if __name__ == "__main__":
    runtime.cli(main)
